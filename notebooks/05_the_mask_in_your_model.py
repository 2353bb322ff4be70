# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The mask in a model of your own
#
# `OrderedMask` is an ordinary distribution: wherever a Pyro model has things in an order and the question is how many
# of them, put a mask on them. This notebook does so for the order of a polynomial, where the answer is known exactly
# and four ways of inference can be compared; for the number of components of a mixture; for the order of an
# autoregression; and for several groups at once.

# %%
import os
import sys
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from matplotlib.patches import Ellipse
from pyro.infer import TraceEnum_ELBO

sys.path.insert(0, "..")  # `models` lies beside this folder
from models.autoregression import Autoregression, lags
from models.mixture import GaussianMixture
from models.order_selection import (
    OrderedRegression,
    legendre,
    order_by_enumeration,
    order_by_nuts,
    order_by_straight_through,
    orthonormalise,
)
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, cosine_to_zero, fit, linear, module_local_params

QUICK = "PYRO_VND_SMOKE" in os.environ  # the tests want to know only whether all of this runs
num_steps, num_draws = (20, 20) if QUICK else (1000, 1500)
_ = torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
plt.rcParams["figure.constrained_layout.use"] = True

# %% [markdown]
# ## The order of a polynomial, four ways
#
# The model is four lines of Pyro: `mask = pyro.sample("mask", prior)`, weights `w` with a Normal prior, and data around
# `(features * (mask * w)).sum(-1)`. Weights past the order do not touch the data and keep their prior. Here are 40
# points of a polynomial with five terms, in features that are orthonormal on the data.

# %%
K, N, noise = 8, 40, 1.0
x = 2 * torch.rand(N) - 1
features = orthonormalise(legendre(x, K))
y = features[:, :5] @ torch.tensor([0.8, -0.7, 0.7, -0.6, 0.4]) + noise * torch.randn(N)
model = OrderedRegression(OrderedMask.uniform(K), noise, weight_scale=0.3)

laws = {
    "closed form": model.order_posterior(features, y),
    "NUTS": order_by_nuts(model, features, y, num_samples=num_draws, warmup_steps=num_draws // 4),
    "SVI, enumerated": order_by_enumeration(model, features, y, num_steps=num_steps),
    "SVI, straight-through": order_by_straight_through(model, features, y, num_steps=num_steps),
}
table = pd.DataFrame({name: law.probs.detach().numpy() for name, law in laws.items()}, index=range(1, K + 1))
ax = table.plot.bar(figsize=(7, 2.8), rot=0, xlabel="order", ylabel="probability")
plt.show()


# %%
def distance(law: OrderedMask, truth: OrderedMask) -> float:
    """Total variation between two laws."""
    return 0.5 * (law.probs.detach() - truth.probs).abs().sum().item()


distances = {name: distance(law, laws["closed form"]) for name, law in laws.items()}
pd.Series(distances, name="total variation").round(3).to_frame()

# %% [markdown]
# They agree. NUTS sums the mask out and averages the exact $p(L \mid w, y)$ over its draws of the weights; enumeration
# sums over the orders of the guide at every step; straight-through draws them, which is the way that scales.
#
# ## Where straight-through goes wrong
#
# Two things can put the law of the order off, and it pays to tell them apart. One is the gradient: a hard mask has
# none, and the soft mask of the backward pass mixes in the slopes of steps further off, the more so the higher the
# temperature. The other has nothing to do with gradients: in a mean-field guide, such as `AutoNested`, weights do not
# know the mask, so that a weight pays its KL for the orders that keep it and for those that do not. Sharp evidence,
# from a wide prior of the weights, shows both.

# %%
generator = torch.Generator().manual_seed(2)
basis = legendre(2 * torch.rand(N, generator=generator) - 1, K)
targets = basis[:, :5] @ torch.tensor([1.0, -0.9, 0.8, 0.7, -0.7]) + noise * torch.randn(N, generator=generator)
sharp = OrderedRegression(OrderedMask.uniform(K), noise, weight_scale=1.0), orthonormalise(basis), targets
ways = {"enumerated": order_by_enumeration}
ways |= {f"temperature {t}": partial(order_by_straight_through, temperature=t) for t in (0.5, 0.2, 0.05)}
truth = sharp[0].order_posterior(*sharp[1:])
rows = {
    name: {
        kind: distance(infer(*sharp, conditional=kind != "mean field", num_steps=num_steps), truth)
        for kind in ("weights know the mask", "mean field")
    }
    for name, infer in ways.items()
}
pd.DataFrame(rows).T.round(3)

# %% [markdown]
# Where the weights know the mask, what is left is the bias of the gradient, which goes away with the temperature (a low
# one has more noise: here are 64 draws a step). Mean field is far off even when every order is enumerated. Its error
# and that of a high temperature have opposite signs, so that the worst gradient looks best: a coincidence, not a cure.
# Where the law of the order is the result, enumerate, or let the weights know the mask. Where it is the way to a net or
# a code of any width, mean field with straight-through gradients is good enough.
#
# ## How many components?
#
# `GaussianMixture` keeps the first L of eight components. Its mask is marked for enumeration: a dropped component has
# weight zero, and no slope tells what it would be worth. `AutoNested` sees the mark and gives that site an enumerated
# guide. Mixtures have local optima, so we keep the best of three starts.

# %%
centres = torch.tensor([[-5.0, -3.0], [0.0, 4.0], [5.0, -3.0]])
points = centres[torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), 200, replacement=True)] + 0.8 * torch.randn(200, 2)
mixture = GaussianMixture(8)
options = {"lr": 0.1, "lr_schedule": cosine_to_zero(), "length_weight": linear(300, 1, 0.5), "progress": False}
options |= {"elbo": TraceEnum_ELBO(max_plate_nesting=1), "optimizer": partial(torch.optim.Adam, betas=(0.9, 0.95))}
fits = []
for start in range(1 if QUICK else 3):
    guide = mixture.guide_from(points, start)
    result = fit(mixture, guide, points, num_epochs=num_steps // 2, seed=start, **options)
    fits.append((sum(result.elbo[-20:]) / 20, guide))
best = max(fits, key=lambda found: found[0])[1]

with module_local_params(mixture, best):
    values = best.median(points)
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
left.bar(range(1, 9), best.laws["mask"].probs.detach())
left.set(xlabel="components", ylabel="probability")
right.plot(*points.T, ".", color="0.7")
kept = int(best.laws["mask"].mode.sum())
for k, (mean, scale) in enumerate(zip(values["means"].detach()[:kept], values["scales"].detach()[:kept], strict=True)):
    right.add_patch(Ellipse(mean.tolist(), *(4 * scale).tolist(), fill=False, color=f"C{k}", linewidth=2))
plt.show()

# %% [markdown]
# ## How far back?
#
# An autoregression keeps the first L lags. Given the first values it is a regression on its own past, so that the
# closed form from above holds for it, too. The planted order is three.

# %%
series = torch.zeros(300)
for t in range(300):
    past = sum(a * series[t - 1 - i] for i, a in enumerate((0.6, -0.5, 0.4)) if t > i)
    series[t] = past + torch.randn(())
autoregression = Autoregression(10, noise=1.0)
guide = AutoNested(autoregression)
_ = fit(autoregression, guide, series, num_epochs=num_steps, lr=0.05, progress=False)
closed = OrderedRegression(autoregression.prior, 1.0, weight_scale=0.5).order_posterior(lags(series, 10), series[10:])
columns = {"AutoNested": guide.laws["mask"].probs.detach(), "closed form": closed.probs}
pd.DataFrame(columns, index=range(1, 11)).rename_axis("order").T.round(3)

# %% [markdown]
# The order is right; where the exact law is spread, that of mean field is too sharp.
#
# ## One mask a group
#
# A mask in a plate is one mask a row of the plate: here each of four groups has an order of its own, and `AutoNested`
# a law for each.


# %%
def groups(x: torch.Tensor, y: torch.Tensor) -> None:
    """Regress each group, a row of x and y, on terms of its own number."""
    with pyro.plate("groups", len(x), dim=-2):
        mask = pyro.sample("mask", OrderedMask.uniform(6))
        w = pyro.sample("w", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        with pyro.plate("data", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal((x * (mask * w)).sum(-1), 0.5), obs=y)


planted = torch.tensor([1, 2, 4, 6])
x = torch.randn(4, 300, 6)
y = (x * (torch.arange(6) < planted[:, None, None])).sum(-1) + 0.5 * torch.randn(4, 300)
guide = AutoNested(groups)
_ = fit(groups, guide, [x, y], num_epochs=num_steps, lr=0.05, plate="groups", progress=False)
print("planted:", planted.tolist(), "found:", guide.laws["mask"].mode.sum(-1).flatten().int().tolist())
