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
# question is how many of them, put a mask on them, and `fit` an `AutoNested`. This notebook does
# so for the order of a polynomial, where the answer is known exactly and several ways of
# inference can be compared; for an autoregression, a mixture and principal components; and for
# several groups at once.

# %%
import math
import warnings
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from matplotlib.patches import Ellipse
from pyro.infer import MCMC, NUTS, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import init_to_value
from sklearn.datasets import load_wine
from torch import Tensor

from pyro_vnd.diagnostics import length_posterior
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, PoorFitWarning, fit

num_epochs, num_draws, num_starts = 500, 1500, 3
_ = torch.manual_seed(4)
torch.set_default_dtype(torch.float64)
plt.rcParams["figure.constrained_layout.use"] = True

# %% [markdown]
# ## The order of a polynomial
#
# The model is a few lines of Pyro: a mask, weights with a Normal prior, and data around what the
# mask keeps.

# %%
K = 8


def regression(x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    mask = pyro.sample("mask", OrderedMask.uniform(K))
    w = pyro.sample("w", dist.Normal(torch.zeros(K), scale).to_event(1))
    with pyro.plate("data", len(y), dim=-1):
        pyro.sample("y", dist.Normal((x * (mask * w)).sum(-1), 1.0), obs=y)


# %% [markdown]
# The law of the order given the data is known: with $A = X^\top X + I / s^2 = R R^\top$ and $u =
# R^{-1} X^\top y$, up to a constant, $\log p(y \mid L = k) = \sum_{j \le k} (u_j^2 / 2 - \log
# R_{jj} - \log s)$. NUTS draws the weights, with the mask summed out by Pyro; `length_posterior`
# gives its law from the draws.


# %%
def closed_form(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    root = torch.linalg.cholesky(x.T @ x + torch.eye(K) / scale**2)
    u = torch.linalg.solve_triangular(root, (x.T @ y)[:, None], upper=False)[:, 0]
    return (u**2 / 2 - root.diagonal().log() - math.log(scale)).cumsum(-1).softmax(-1)


def by_nuts(x: Tensor, y: Tensor) -> Tensor:
    kernel = NUTS(regression, max_plate_nesting=1)
    mcmc = MCMC(kernel, num_draws, warmup_steps=num_draws // 4, disable_progbar=True)
    mcmc.run(x, y)
    return torch.tensor(length_posterior(regression, mcmc, (x, y))["probs"].values)


# %% [markdown]
# `AutoNested` has weights of its own for each order, and `fit` settings for it. Beside it we look
# at mean field, whose weights know nothing of the order: with the mask drawn, by straight-through
# gradients, and with the mask enumerated, which has no such gradients. `fit` warns of the large
# k-hats of these two; here they are in a table instead.

# %%
warnings.simplefilter("ignore", PoorFitWarning)
points = 2 * torch.rand(40) - 1
x = points[:, None] ** torch.arange(K)
y = x[:, :5] @ torch.tensor([0.5, -2.0, -2.0, 1.0, 3.0]) + torch.randn(40)
slow = {"num_epochs": 4 * num_epochs, "lr": 0.02, "progress": False}
ways = {"AutoNested": (AutoNested(regression), {"num_epochs": num_epochs, "progress": False})}
ways["mean field, drawn"] = AutoNested(regression, latents="mean_field"), slow
marked = AutoNested(config_enumerate(regression), latents="mean_field")
ways["mean field, enumerated"] = marked, slow | {"elbo": TraceEnum_ELBO(max_plate_nesting=1)}
laws, khats = {"closed form": closed_form(x, y), "NUTS": by_nuts(x, y)}, {}
for way, (guide, options) in ways.items():
    khats[way] = fit(regression, guide, (x, y), **options).khat
    laws[way] = guide.laws["mask"].probs
table = pd.DataFrame({way: law.numpy() for way, law in laws.items()}, index=range(1, K + 1))
ax = table.plot.bar(figsize=(8, 2.8), rot=0, xlabel="order", ylabel="probability")
plt.show()

# %%
distances = table.sub(table["closed form"], axis=0).abs().sum() / 2
pd.DataFrame({"total variation": distances, "k-hat": pd.Series(khats)}).loc[list(laws)].round(3)

# %% [markdown]
# `AutoNested` has the law. Mean field does not, however its gradients come about: a weight pays
# its KL for the orders that keep it and for those that do not, and one value of it must do for
# all of them. k-hat sees one of the two, not the other: where a guide never draws, it has no say.
#
# A draw of the guide is an order with weights of that order, so that predictions are a mixture
# over the orders.

# %%
grid = torch.linspace(-1, 1, 101)[:, None] ** torch.arange(K)
guide = ways["AutoNested"][0]
with torch.no_grad():
    draws = [guide(x, y) for _ in range(num_draws)]
curves = torch.stack([grid @ (draw["mask"] * draw["w"]) for draw in draws])
lengths = torch.stack([draw["mask"].sum() for draw in draws])
figure, ax = plt.subplots(figsize=(6, 2.8))
ax.fill_between(grid[:, 1], *curves.quantile(torch.tensor([0.05, 0.95]), 0), color="0.9")
for k in (2, 4, 8):
    if (lengths == k).any():
        ax.plot(grid[:, 1], curves[lengths == k].mean(0), label=f"order {k}")
ax.plot(points, y, "k.", markersize=4)
ax.set(xlabel="input", ylabel="output", title="means by order; 90 % of all curves")
ax.legend()
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
_ = fit(model, guide, (lags, now), num_epochs=num_epochs, progress=False)
laws = {"AutoNested": guide.laws["mask"].probs, "closed form": closed_form(lags, now, 0.5)}
pd.DataFrame(laws, index=range(1, K + 1)).rename_axis("order").T.round(3)

# %% [markdown]
# ## How many components?
#
# Keep the first L of eight Gaussians. A dropped component has weight zero, and no slope tells what
# it would be worth; but each length has a mixture of its own, fitted beside the others. Mixtures
# have local optima: by `init_loc_fn` the means start at scattered points, each the farthest from
# those before it, and we keep the best of three starts.


# %%
def mixture(x: Tensor) -> None:
    mask = pyro.sample("mask", OrderedMask.uniform(8))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(8)))
    means = pyro.sample("means", dist.Normal(torch.zeros(8, 2), 5.0).to_event(2))
    scales = pyro.sample("scales", dist.LogNormal(torch.zeros(8, 2), 0.3).to_event(2))
    logits = torch.where(mask > 0, weights.clamp_min(1e-300).log(), -torch.inf)
    parts = dist.Normal(means, scales).to_event(1)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(logits=logits), parts), obs=x)


def guide_from(start: int) -> AutoNested:
    rows = [start]
    for _ in range(7):
        rows.append(int(torch.cdist(points, points[rows]).amin(-1).argmax()))
    values = {"means": points[rows], "scales": torch.ones(8, 2), "weights": torch.ones(8) / 8}
    return AutoNested(mixture, init_loc_fn=init_to_value(values=values))


centres = torch.tensor([[-5.0, -3.0], [0.0, 4.0], [5.0, -3.0]])
kinds = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), 200, replacement=True)
points = centres[kinds] + 0.8 * torch.randn(200, 2)
guides = [guide_from(start) for start in range(num_starts)]
elbos = [fit(mixture, g, points, num_epochs=num_epochs, progress=False).elbo[-1] for g in guides]
best = guides[elbos.index(max(elbos))]
print("ELBO of each start, nats per row:", [round(elbo, 3) for elbo in elbos])

# %%
values = best.median(points)
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
left.bar(range(1, 9), best.laws["mask"].probs)
left.set(xlabel="components", ylabel="probability")
right.plot(*points.T, ".", color="0.7")
for k in range(int(best.laws["mask"].mode.sum())):
    mean, scale = (values[name][k].tolist() for name in ("means", "scales"))
    right.add_patch(Ellipse(mean, 4 * scale[0], 4 * scale[1], fill=False, color=f"C{k}"))
right.set(xlabel="first coordinate", ylabel="second coordinate")
plt.show()

# %% [markdown]
# ## How many factors?
#
# Bayesian principal components, $x_n \sim N(0, V \mathrm{diag}(z) V^\top + \sigma^2 I)$, keep the
# first L columns of V. The data are real: 13 measurements of 178 wines, standardised. Rotated, the
# kept loadings explain them as well, so that no Normal law of V is right, and k-hat is large; the
# lengths are compared by their bounds all the same.


# %%
def factors(x: Tensor) -> None:
    mask = pyro.sample("mask", OrderedMask.geometric(0.7, 8))
    loadings = pyro.sample("loadings", dist.Normal(torch.zeros(x.shape[1], 8), 1.0).to_event(2))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    kept, variances = loadings * mask, noise.square().expand(x.shape[1])
    with pyro.plate("data", len(x)):
        law = dist.LowRankMultivariateNormal(torch.zeros(x.shape[1]), kept, variances)
        pyro.sample("x", law, obs=x)


wine = torch.tensor(load_wine().data)
wine = (wine - wine.mean(0)) / wine.std(0)
guide = AutoNested(factors)
_ = fit(factors, guide, wine, num_epochs=num_epochs, progress=False)
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
left.bar(range(1, 9), guide.laws["mask"].probs)
left.set(xlabel="factors", ylabel="probability")
right.plot(range(1, 14), torch.linalg.eigvalsh(wine.T @ wine / len(wine)).flip(0), "o-")
right.set(xlabel="component", ylabel="variance", title="principal components")
plt.show()

# %% [markdown]
# ## One mask a group
#
# A mask in a plate is one mask a row of the plate: here each of four groups has an order of its
# own, and `AutoNested` a law for each, with weights that know it.


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
_ = fit(groups, guide, (x, y), num_epochs=num_epochs, plate="groups", progress=False)
found = guide.laws["mask"].mode.sum(-1).flatten().int()
print("planted:", planted.tolist(), "found:", found.tolist())
