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
# `OrderedMask` is an ordinary distribution: wherever a Pyro model has things in an order and the
# question is how many of them, put a mask on them. This notebook does so for the order of a
# polynomial, where the answer is known exactly and several ways of inference can be compared; for
# the number of components of a mixture; for the order of an autoregression; and for several groups
# at once.

# %%
import math
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from matplotlib.patches import Ellipse
from pyro.infer import MCMC, NUTS, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, NestedELBO, cosine_to_zero, fit, linear, module_local_params

num_steps, num_draws, num_starts = 1000, 1500, 3
_ = torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
plt.rcParams["figure.constrained_layout.use"] = True

# %% [markdown]
# ## The order of a polynomial
#
# The model is four lines of Pyro: a mask, weights with a Normal prior, and data around what the
# mask keeps. Weights past the order do not touch the data and follow their prior.

# %%
K = 8


def regression(x: Tensor, y: Tensor, scale: float) -> None:
    mask = pyro.sample("mask", OrderedMask.uniform(K))
    w = pyro.sample("w", dist.Normal(torch.zeros(K), scale).to_event(1))
    with pyro.plate("data", len(y), dim=-1):
        pyro.sample("y", dist.Normal((x * (mask * w)).sum(-1), 1.0), obs=y)


# %% [markdown]
# The law of the order given the data is known: with $A = X^\top X + I / s^2 = R R^\top$ and $u =
# R^{-1} X^\top y$, up to a constant, $\log p(y \mid L = k) = \sum_{j \le k} (u_j^2 / 2 - \log
# R_{jj} - \log s)$. NUTS draws the weights, with the mask summed out by Pyro; its law is the mean
# of the exact $p(L \mid w, y)$ over the draws.


# %%
def closed_form(x: Tensor, y: Tensor, scale: float) -> Tensor:
    root = torch.linalg.cholesky(x.T @ x + torch.eye(K) / scale**2)
    u = torch.linalg.solve_triangular(root, (x.T @ y)[:, None], upper=False)[:, 0]
    return (u**2 / 2 - root.diagonal().log() - math.log(scale)).cumsum(-1).softmax(-1)


def by_nuts(x: Tensor, y: Tensor, scale: float) -> Tensor:
    kernel = NUTS(partial(regression, scale=scale), max_plate_nesting=1)
    mcmc = MCMC(kernel, num_draws, warmup_steps=num_draws // 4, disable_progbar=True)
    mcmc.run(x, y)
    weights = mcmc.get_samples()["w"][:, None] * OrderedMask.uniform(K).enumerate_support()
    return dist.Normal(weights @ x.T, 1.0).log_prob(y).sum(-1).softmax(-1).mean(0)


# %% [markdown]
# For SVI there are two guides. `AutoNested` is the one for any model: it draws masks, with the
# straight-through gradient, or enumerates them where the model is marked so, and its weights know
# nothing of the mask (mean field). `Conditional` enumerates, too, and its weights know the mask:
# past the order they follow their prior, as they do in the posterior.


# %%
class Conditional(PyroModule):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.prior_scale = scale
        self.logits, self.loc = PyroParam(torch.zeros(K)), PyroParam(torch.zeros(K))
        # Narrow: wide weights would rule out the long orders before they are learned.
        self.scale = PyroParam(torch.full((K,), 0.1 * scale), constraints.positive)

    @property
    def laws(self) -> dict[str, OrderedMask]:
        return {"mask": OrderedMask(logits=self.logits)}

    def forward(self, x: Tensor, y: Tensor) -> None:
        mask = pyro.sample("mask", self.laws["mask"], infer={"enumerate": "parallel"})
        scale = torch.where(mask == 1, self.scale, self.prior_scale)
        pyro.sample("w", dist.Normal(mask * self.loc, scale).to_event(1))


def by_svi(x: Tensor, y: Tensor, scale: float, tau: float | None, knows_mask: bool) -> Tensor:
    model = partial(regression, scale=scale)
    options = {"vectorize_particles": True, "max_plate_nesting": 1}
    if tau is None:
        model, elbo = config_enumerate(model), TraceEnum_ELBO(8, **options)
    else:
        elbo = NestedELBO(64, **options)
    guide = Conditional(scale) if knows_mask else AutoNested(model, temperature=tau or 0.2)
    options = {"num_epochs": num_steps, "lr": 0.1, "lr_schedule": cosine_to_zero()}
    fit(model, guide, (x, y), elbo=elbo, progress=False, **options)
    return guide.laws["mask"].probs.detach()


# %% [markdown]
# Here are 40 points of a polynomial with five terms, in features that are orthonormal on the data.

# %%
q, r = torch.linalg.qr((2 * torch.rand(40, 1) - 1) ** torch.arange(K))
x = q * r.diagonal().sign() * 40**0.5
y = x[:, :5] @ torch.tensor([0.8, -0.7, 0.7, -0.6, 0.4]) + torch.randn(40)
laws = {
    "closed form": closed_form(x, y, 0.3),
    "NUTS": by_nuts(x, y, 0.3),
    "Conditional": by_svi(x, y, 0.3, tau=None, knows_mask=True),
    "AutoNested": by_svi(x, y, 0.3, tau=0.1, knows_mask=False),
}
table = pd.DataFrame({way: law.numpy() for way, law in laws.items()}, index=range(1, K + 1))
ax = table.plot.bar(figsize=(7, 2.8), rot=0, xlabel="order", ylabel="probability")
plt.show()

# %%
distances = table.sub(table["closed form"], axis=0).abs().sum() / 2
distances.rename("total variation").round(3).to_frame()

# %% [markdown]
# NUTS and the guide whose weights know the mask have the law. Mean field does not: a weight pays
# its KL for the orders that keep it and for those that do not.
#
# ## Where straight-through goes wrong
#
# Two things can put the law of the order off, and it pays to tell them apart. One is the gradient:
# a hard mask has none, and the soft mask of the backward pass mixes in the slopes of steps further
# off, the more so the higher the temperature. The other is mean field, and has nothing to do with
# gradients. Sharp evidence, from a wide prior of the weights, shows both.

# %%
y = x[:, :5] @ torch.tensor([1.0, -0.9, 0.8, 0.7, -0.7]) + torch.randn(40)
truth = closed_form(x, y, 1.0)
ways = {"Conditional": (None, True), "AutoNested, enumerated": (None, False)}
ways |= {f"AutoNested, temperature {tau}": (tau, False) for tau in (0.5, 0.2, 0.05)}
laws = {way: by_svi(x, y, 1.0, *choice) for way, choice in ways.items()}
rows = {way: [*law.tolist(), 0.5 * (law - truth).abs().sum().item()] for way, law in laws.items()}
rows["closed form"] = [*truth.tolist(), 0.0]
pd.DataFrame(rows, index=[*range(1, K + 1), "total variation"]).T.round(3)

# %% [markdown]
# Mean field is far off even when every order is enumerated, and so is `AutoNested` at a low
# temperature, whose gradient has little bias. A high temperature errs to the other side, so that
# the worst gradient looks best: a coincidence, not a cure. Where the law of the order is the
# result, enumerate, and let the weights know the mask. Where it is the way to a net or a code of
# any width, mean field with straight-through gradients is good enough.
#
# ## How many components?
#
# Keep the first L of eight Gaussians. The mask is marked for enumeration: a dropped component has
# weight zero, and no slope tells what it would be worth. `AutoNested` sees the mark and gives that
# site an enumerated guide. Mixtures have local optima: means start at scattered points, each the
# farthest from those before it, lengths are held near their prior at first, and we keep the best
# of three starts.


# %%
def mixture(x: Tensor) -> None:
    mask = pyro.sample("mask", OrderedMask.uniform(8), infer={"enumerate": "parallel"})
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(8)))
    means = pyro.sample("means", dist.Normal(torch.zeros(8, 2), 5.0).to_event(2))
    scales = pyro.sample("scales", dist.LogNormal(torch.zeros(8, 2), 0.3).to_event(2))
    logits = torch.where(mask > 0, weights.clamp_min(1e-300).log(), -torch.inf)
    parts = dist.Normal(means, scales).to_event(1).expand(logits.shape)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(logits=logits), parts), obs=x)


def guide_from(start: int) -> AutoNested:
    rows = [start]
    for _ in range(7):
        rows.append(int(torch.cdist(points, points[rows]).amin(-1).argmax()))
    values = {
        "means": points[rows],
        "scales": torch.ones(8, 2),
        "weights": torch.full((8,), 1 / 8),
    }
    return AutoNested(mixture, base=partial(AutoNormal, init_loc_fn=init_to_value(values=values)))


centres = torch.tensor([[-5.0, -3.0], [0.0, 4.0], [5.0, -3.0]])
kinds = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), 200, replacement=True)
points = centres[kinds] + 0.8 * torch.randn(200, 2)
options = {"lr": 0.1, "lr_schedule": cosine_to_zero(), "progress": False}
options |= {"length_weight": linear(300, 1, 0.5), "elbo": TraceEnum_ELBO(max_plate_nesting=1)}
options |= {"optimizer": partial(torch.optim.Adam, betas=(0.9, 0.95))}
fits = []
for start in range(num_starts):
    guide = guide_from(start)
    result = fit(mixture, guide, points, num_epochs=num_steps // 2, seed=start, **options)
    fits.append((sum(result.elbo[-20:]) / 20, guide))
best = max(fits, key=lambda found: found[0])[1]

# %%
with module_local_params(best):
    values = best.median(points)
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
left.bar(range(1, 9), best.laws["mask"].probs.detach())
left.set(xlabel="components", ylabel="probability")
right.plot(*points.T, ".", color="0.7")
for k in range(int(best.laws["mask"].mode.sum())):
    mean, scale = (values[name][k].tolist() for name in ("means", "scales"))
    right.add_patch(Ellipse(mean, 4 * scale[0], 4 * scale[1], fill=False, color=f"C{k}"))
right.set(xlabel="first coordinate", ylabel="second coordinate")
plt.show()

# %% [markdown]
# ## How far back?
#
# An autoregression keeps the first L lags. Given the first values it is the regression from above
# on its own past. The planted order is three.

# %%
series = torch.zeros(300)
for t in range(300):
    past = sum(a * series[t - 1 - i] for i, a in enumerate((0.6, -0.5, 0.4)) if t > i)
    series[t] = past + torch.randn(())
lags, now = series.unfold(0, K, 1)[:-1].flip(-1), series[K:]
model = partial(regression, scale=0.5)
guide = AutoNested(model)
_ = fit(model, guide, (lags, now), num_epochs=num_steps, lr=0.05, progress=False)
found = guide.laws["mask"].probs.detach()
laws = {"AutoNested": found, "closed form": closed_form(lags, now, 0.5)}
pd.DataFrame(laws, index=range(1, K + 1)).rename_axis("order").T.round(3)

# %% [markdown]
# The most probable order is right; the rest of the law is that of mean field.
#
# ## One mask a group
#
# A mask in a plate is one mask a row of the plate: here each of four groups has an order of its
# own, and `AutoNested` a law for each.


# %%
def groups(x: Tensor, y: Tensor) -> None:
    with pyro.plate("groups", len(x), dim=-2):
        mask = pyro.sample("mask", OrderedMask.uniform(6))
        w = pyro.sample("w", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        with pyro.plate("data", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal((x * (mask * w)).sum(-1), 0.5), obs=y)


planted = torch.tensor([1, 2, 4, 6])
x = torch.randn(4, 300, 6)
y = (x * (torch.arange(6) < planted[:, None, None])).sum(-1) + 0.5 * torch.randn(4, 300)
guide = AutoNested(groups)
_ = fit(groups, guide, (x, y), num_epochs=num_steps, lr=0.05, plate="groups", progress=False)
found = guide.laws["mask"].mode.sum(-1).flatten().int()
print("planted:", planted.tolist(), "found:", found.tolist())
