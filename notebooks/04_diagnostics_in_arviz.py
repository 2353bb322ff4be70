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
# # Diagnostics in ArviZ
#
# A variational fit always returns something. This notebook asks whether it is the posterior, and which order, or width,
# is enough: with `to_arviz`, with k-hat, with simulation-based calibration and with leave-one-out densities. The first
# example is small enough for an exact answer, so that one sees what each diagnostic can and cannot tell.

# %%
import os
import sys
import warnings
from collections.abc import Callable

import arviz as az
import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

sys.path.insert(0, "..")  # `models` lies beside this folder
from models.datasets import load
from models.order_selection import legendre, orthonormalise
from pyro_vnd.diagnostics import (
    compare,
    khat,
    loo,
    loo_widths,
    plot_elbo,
    plot_keep_probs,
    plot_length_posterior,
    plot_ranks,
    rank_uniformity,
    resample,
    sbc,
    smallest_width,
    summary,
    to_arviz,
)
from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.infer import AutoNested, FitResult, MaskSchedule, NestedELBO, Plateau, fit
from pyro_vnd.nn import NestedClassifier, nest

QUICK = "PYRO_VND_SMOKE" in os.environ  # the tests want to know only whether all of this runs
num_epochs, num_draws, num_simulations = (40, 50, 20) if QUICK else (3000, 1000, 300)
_ = torch.manual_seed(3)
# Of rows that are not to be trusted ArviZ warns, and `compare` has a column that tells which estimates have some.
warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto distribution")
plt.rcParams["figure.constrained_layout.use"] = True

# %% [markdown]
# ## A posterior that is known
#
# How many terms does a polynomial need? Weights past a random order do not count. On features that are orthonormal on
# the data, weights are independent given the order: with $a = N / \sigma^2 + 1$ they have means
# $m_j = \phi_j^\top y / (\sigma^2 a)$ and variances $1 / a$, and
# $p(y \mid L = k) \propto \prod_{j \le k} e^{a m_j^2 / 2} / \sqrt a$.

# %%
K, N, noise = 8, 60, 0.5
points = torch.rand(N) * 2 - 1
features = orthonormalise(legendre(points, K))
y = 1 + points - 0.7 * points**2 + 0.4 * points**3 + noise * torch.randn(N)


def model(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """Draw an order, weights and data; all orders are equally likely."""
    mask = pyro.sample("mask", OrderedMask.uniform(K))
    w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("y", dist.Normal((x * (mask * w)).sum(-1), noise), obs=y)


def exact(x: torch.Tensor, y: torch.Tensor) -> NestedNormal:
    """Return the posterior of order and kept weights, for orthonormal features."""
    a = torch.tensor(len(x) / noise**2 + 1)
    mean = x.T @ y / noise**2 / a
    return NestedNormal(mean, a.rsqrt().expand(K), (0.5 * a * mean**2 - 0.5 * a.log()).cumsum(-1))


print("exact p(L | y):", [round(p, 3) for p in exact(features, y).length_probs.tolist()])

# %% [markdown]
# ## Four fits that stop by themselves
#
# `AutoNested` is the usual guide: it draws masks, with the straight-through gradient, and weights that know nothing of
# them. `Plateau` stops a fit once the ELBO provably changes by less than a tolerance from one window of epochs to the
# next.


# %%
def train(guide: Callable[..., object], seed: int, elbo: object = None) -> FitResult:
    """Fit a guide until its ELBO rests."""
    rule = Plateau(window=200, tolerance=0.02)
    options = {"num_epochs": num_epochs, "lr": 0.02, "progress": False}
    return fit(model, guide, [features, y], elbo=elbo, stop=rule, seed=seed, **options)


particles = {"num_particles": 16, "vectorize_particles": True, "max_plate_nesting": 1}
guides = [AutoNested(model) for _ in range(4)]
results = [train(guide, seed, NestedELBO(**particles)) for seed, guide in enumerate(guides)]
ax = plot_elbo({f"fit {i}": result for i, result in enumerate(results)}, parts=False, figsize=(7, 2.8))
plt.show()

# %% [markdown]
# ## To ArviZ
#
# `to_arviz` draws from the guides and scores the draws under guide and model. Each fit is a chain: R-hat then says
# whether the fits agree. Of a single fit it says nothing, as its draws are independent by construction.

# %%
data = to_arviz(model, guides, (features, y), num_samples=num_draws, dims={"mask": ["term"], "w": ["term"]})
print(data)
summary(data, ["mask_length", "w"])

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
plot_length_posterior(data, ["mask"], ax=left)
left.plot(range(1, K + 1), exact(features, y).length_probs, "k_", markersize=12, label="exact")
left.set_ylim(0, 0.85)
left.legend(fontsize="small")
plot_keep_probs(data, ["mask"], ax=right)
plt.show()

# %% [markdown]
# ## Is it the posterior?
#
# The fits agree, and agree to be wrong: what is common to all of them, such as the bias of the gradient or a guide
# that lacks a dependence, R-hat cannot see. k-hat can. It looks at the importance ratios $p(y, z) / q(z)$ of the draws;
# above .7 the guide misses mass of the posterior, and `resample` refuses to correct its draws.

# %%
print("k-hat:", khat(data).values.round(2))
try:
    resample(data)
except ValueError as error:
    print("resample:", error)

# %% [markdown]
# The remedy is a better guide. This one enumerates the orders, so that its gradient has no bias, and lets the weights
# past the order follow their prior, as they do in the posterior. The rest is corrected by `resample`.


# %%
class Conditional(PyroModule):
    """Draws the order, and weights given the order."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.logits = PyroParam(torch.zeros(K)), PyroParam(torch.zeros(K))
        # Narrow: wide weights would rule out an order before they are learned, which k-hat would tell as well.
        self.scale = PyroParam(torch.full((K,), 0.1), constraints.positive)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        """Draw mask and weights; the data have told the parameters all they know."""
        mask = pyro.sample("mask", OrderedMask(logits=self.logits), infer={"enumerate": "parallel"})
        pyro.sample("w", dist.Normal(mask * self.loc, torch.where(mask == 1, self.scale, 1.0)).to_event(1))


better = Conditional()
result = train(better, 0, TraceEnum_ELBO(**particles))
good = to_arviz(model, better, (features, y), num_samples=num_draws, num_prior=0)
print("k-hat:", khat(good).values.round(2))
columns = {"AutoNested": data, "conditional": good} | ({} if QUICK else {"resampled": resample(good)})
laws = {
    name: found.posterior["mask_length"].to_series().value_counts(normalize=True) for name, found in columns.items()
}
laws["exact"] = pd.Series(exact(features, y).length_probs.numpy(), index=range(1, K + 1))
pd.DataFrame(laws).sort_index().fillna(0).rename_axis("order").round(3)

# %% [markdown]
# ## Calibration over many data sets
#
# Simulation-based calibration draws weights and data from the model, infers, and ranks the truth among draws of the
# posterior; over many simulations the ranks of a right method are uniform. Lengths are ranked with ties broken at
# random. Beside the exact posterior we try a famous mistake: probabilities handed to something that wants logits.


# %%
def as_guide(law: NestedNormal) -> Callable[..., None]:
    """Return a guide that draws from the posterior, dropped weights from their prior."""

    def guide(x: torch.Tensor, y: torch.Tensor) -> None:
        mask = pyro.sample("mask", law.mask_law)
        pyro.sample("w", dist.Normal(mask * law.loc, torch.where(mask == 1, law.scale, 1.0)).to_event(1))

    return guide


def right(simulated: dict[str, torch.Tensor]) -> Callable[..., None]:
    """Return the exact posterior."""
    return as_guide(exact(features, simulated["y"]))


def mistaken(simulated: dict[str, torch.Tensor]) -> Callable[..., None]:
    """Return it with a law of the order that is near uniform whatever the data say."""
    law = exact(features, simulated["y"])
    return as_guide(NestedNormal(law.loc, law.scale, law.length_probs))


figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True)
for ax, infer in zip(axes, (right, mistaken), strict=True):
    ranks = sbc(model, infer, features, observed="y", num_simulations=num_simulations, progress=False)
    plot_ranks(ranks, ["mask_length", "log_likelihood"], ax=ax)
    p_values = rank_uniformity(ranks)
    ax.set_title(f"{infer.__name__}: p = {p_values['mask_length'].item():.1g}, {p_values['log_likelihood'].item():.1g}")
plt.show()

# %% [markdown]
# The mistake shows in the log-likelihood, not in the lengths alone: a law that ignores the data, such as the prior,
# passes for each site. That is why `sbc` ranks the log-likelihood, too.
#
# ## Which order is enough?
#
# With the mask given, the order is fixed. `loo` estimates how well each row is predicted from all others, and `compare`
# ranks the orders; `smallest_width` takes the lowest order that is within a standard error of the best, where the error
# is that of differences row by row.

# %%
posterior = exact(features, y)
by_order = {}
for order in range(1, K + 1):
    model_at = pyro.poutine.condition(model, {"mask": (torch.arange(K) < order).float()})
    guide_at = pyro.poutine.block(as_guide(posterior.cut(order)), hide=["mask"])
    by_order[order] = to_arviz(model_at, guide_at, (features, y), num_samples=num_draws, num_prior=0)
scores = {order: loo(found, var_name="y") for order, found in by_order.items()}
print("smallest order:", smallest_width(scores))
compare(scores).round(2)

# %% [markdown]
# The law of the order says what is true, the density what predicts well; here they agree on three terms. Orders of six
# and more have a row whose estimate is not to be trusted.
#
# ## Which width is enough?
#
# The same for a nested net on digits. Its weights are too many for k-hat to say anything about the whole posterior;
# predictions can still be scored. `loo_widths` cuts the net at draws of its weights.

# %%
digits = load("digits", flatten=True)
plain = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
net = nest(plain, digits.train.images[:1], num_blocks=16)
options = {"batch_size": 128, "lr": 0.01, "kl_weight": 0.05, "schedule": MaskSchedule(), "local_reparam": True}
record = fit(NestedClassifier(net), net.guide, digits.train, num_epochs=2 if QUICK else 40, progress=False, **options)
scores = loo_widths(net, digits.train, [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0], 30 if QUICK else 200, progress=False)
print("smallest width:", smallest_width(scores))
table = compare(scores).sort_index().rename_axis("width")
table.round(3)

# %%
label = "elpd - that of the best (nats)"
table["elpd_diff"].plot(yerr=table["dse"], logx=True, marker="o", figsize=(5, 2.8), ylabel=label)
plt.show()

# %% [markdown]
# ## ArviZ's own figures
#
# What `to_arviz` returns is an ordinary ArviZ object: save it as netCDF, and use any of ArviZ's functions.

# %%
axes = az.plot_forest(data, var_names=["w"], combined=False, figsize=(6, 4))
plt.show()
