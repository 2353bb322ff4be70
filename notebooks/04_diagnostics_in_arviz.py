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
# A variational fit always returns something. This notebook asks whether it is the posterior, and
# which order, or width, is enough: with `to_arviz`, with k-hat, with simulation-based calibration
# and with leave-one-out densities. The first example is small enough for an exact answer, so that
# one sees what each diagnostic can and cannot tell.

# %%
import warnings
from collections.abc import Callable

import arviz as az
import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import nn

from pyro_vnd import diagnostics as diag
from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.infer import (
    AutoNested,
    KLWeights,
    MaskSchedule,
    NestedELBO,
    Plateau,
    PoorFitWarning,
    fit,
)
from pyro_vnd.nn import NestedClassifier, nest

num_epochs, num_draws, num_simulations = 500, 1000, 300
_ = torch.manual_seed(3)
# ArviZ warns of rows that are not to be trusted, and `fit` of guides; tables tell of them here.
warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto distribution")
warnings.simplefilter("ignore", PoorFitWarning)
plt.rcParams["figure.constrained_layout.use"] = True

# %% [markdown]
# ## A posterior that is known
#
# How many terms does a polynomial need? Weights past a random order do not count. On features that
# are orthonormal on the data, weights are independent given the order: with $a = N / \sigma^2 + 1$
# they have means $m_j = \phi_j^\top y / (\sigma^2 a)$ and variances $1 / a$, and $p(y \mid L = k)
# \propto \prod_{j \le k} e^{a m_j^2 / 2} / \sqrt a$.

# %%
K, N, noise = 8, 60, 0.5
points = torch.rand(N) * 2 - 1
features, r = torch.linalg.qr(points[:, None] ** torch.arange(K))  # polynomials in their order
features = features * r.diagonal().sign() * N**0.5  # mean square one
y = 1 + points - 0.7 * points**2 + 0.4 * points**3 + noise * torch.randn(N)


def model(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    mask = pyro.sample("mask", OrderedMask.uniform(K))
    w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("y", dist.Normal((x * (mask * w)).sum(-1), noise), obs=y)


def exact(x: torch.Tensor, y: torch.Tensor) -> NestedNormal:
    a = torch.tensor(len(x) / noise**2 + 1)
    mean = x.T @ y / noise**2 / a
    return NestedNormal(mean, a.rsqrt().expand(K), (0.5 * a * mean**2 - 0.5 * a.log()).cumsum(-1))


print("exact p(L | y):", [round(p, 3) for p in exact(features, y).length_probs.tolist()])

# %% [markdown]
# ## Four fits
#
# `AutoNested` has weights of its own for each order, and `fit` settings for such a guide. The
# bound reaches the log-probability of the data, which is known here: nothing is lost.

# %%
guides = [AutoNested(model) for _ in range(4)]
options = {"num_epochs": num_epochs, "progress": False}
results = [fit(model, guides[i], (features, y), seed=i, **options) for i in range(4)]
kept = features * torch.ones(K, K).tril().unsqueeze(-2)
given_order = dist.LowRankMultivariateNormal(torch.zeros(N), kept, torch.full((N,), noise**2))
log_evidence = (given_order.log_prob(y).logsumexp(0) - torch.tensor(K).log()) / N
figure, ax = plt.subplots(figsize=(7, 2.8))
for i, result in enumerate(results):
    ax.plot(result.elbo, label=f"fit {i}")
ax.axhline(log_evidence, color="k", linestyle=":", label="log p(y)")
ax.set(xlabel="epoch", ylabel="ELBO (nats per row)", ylim=(-1, -0.73))
ax.legend(loc="lower right")
plt.show()
print(results[0])

# %% [markdown]
# ## To ArviZ
#
# `to_arviz` draws from the guides and scores the draws under guide and model. Each fit is a chain:
# R-hat then says whether the fits agree. Of a single fit it says nothing, as its draws are
# independent by construction.

# %%
dims = {"mask": ["term"], "w": ["term"]}
data = diag.to_arviz(model, guides, (features, y), num_samples=num_draws, dims=dims)
print(data)
diag.summary(data, ["mask_length", "w"])

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
diag.plot_length_posterior(data, ["mask"], ax=left)
left.plot(range(1, K + 1), exact(features, y).length_probs, "k_", markersize=12, label="exact")
left.set_ylim(0, 0.85)
left.legend(fontsize="small")
diag.plot_keep_probs(data, ["mask"], ax=right)
plt.show()

# %% [markdown]
# ## Is it the posterior?
#
# That fits agree does not mean that they are right: what is common to all of them, such as a
# guide that lacks a dependence, R-hat cannot see. k-hat can. It looks at the importance ratios
# $p(y, z) / q(z)$ of the draws; above .7 the guide misses mass of the posterior. Here is mean
# field, a guide whose weights know nothing of the order. Each fit goes on until `Plateau` finds
# that the ELBO provably changes by less than a tolerance from one window of epochs to the next.

# %%
options = {"num_epochs": 6 * num_epochs, "lr": 0.02, "progress": False}
options |= {"callbacks": [Plateau(window=200, tolerance=0.02)]}
options |= {"elbo": NestedELBO(16, vectorize_particles=True, max_plate_nesting=1)}
poor_guides = [AutoNested(model, latents="mean_field") for _ in range(4)]
stopped = [fit(model, poor_guides[i], (features, y), seed=i, **options) for i in range(4)]
print("epochs:", [len(result.elbo) for result in stopped])
poor = diag.to_arviz(model, poor_guides, (features, y), num_samples=num_draws, num_prior=0)
both = {"AutoNested": data, "mean field": poor}
r_hats = {name: diag.summary(d, ["mask_length"])["r_hat"].max() for name, d in both.items()}
k_hats = {name: diag.khat(d).values.round(2) for name, d in both.items()}
pd.DataFrame({"R-hat of the length": r_hats, "k-hat of each fit": k_hats})

# %% [markdown]
# So the draws of mean field are neither corrected nor used for a ranking, unless one insists.
# Those of the other guide need no correction.

# %%
for use in (diag.resample, diag.loo):
    try:
        use(poor)
    except ValueError as error:
        print(error, end="\n\n")
laws = {
    name: found.posterior["mask_length"].to_series().value_counts(normalize=True)
    for name, found in both.items()
}
laws["exact"] = pd.Series(exact(features, y).length_probs.numpy(), index=range(1, K + 1))
pd.DataFrame(laws).sort_index().fillna(0).rename_axis("order").round(3)

# %% [markdown]
# ## Calibration over many data sets
#
# Simulation-based calibration draws weights and data from the model, infers, and ranks the truth
# among draws of the posterior; over many simulations the ranks of a right method are uniform.
# Lengths are ranked with ties broken at random. Beside the exact posterior we try a famous
# mistake: probabilities handed to something that wants logits.


# %%
def as_guide(law: NestedNormal) -> Callable[..., None]:

    def guide(x: torch.Tensor, y: torch.Tensor) -> None:
        mask = pyro.sample("mask", law.mask_law)
        pyro.sample(
            "w", dist.Normal(mask * law.loc, torch.where(mask == 1, law.scale, 1.0)).to_event(1)
        )

    return guide


def right(simulated: dict[str, torch.Tensor]) -> Callable[..., None]:
    return as_guide(exact(features, simulated["y"]))


def mistaken(simulated: dict[str, torch.Tensor]) -> Callable[..., None]:
    law = exact(features, simulated["y"])
    return as_guide(NestedNormal(law.loc, law.scale, law.length_probs))


figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True)
for ax, infer in zip(axes, (right, mistaken), strict=True):
    options = {"num_simulations": num_simulations, "progress": False}
    ranks = diag.sbc(model, infer, features, observed="y", **options)
    diag.plot_ranks(ranks, ["mask_length", "log_likelihood"], ax=ax)
    p_values = diag.rank_uniformity(ranks)
    p = [p_values[name].item() for name in ("mask_length", "log_likelihood")]
    ax.set_title(f"{infer.__name__}: p = {p[0]:.1g}, {p[1]:.1g}")
plt.show()

# %% [markdown]
# The mistake shows in the log-likelihood, not in the lengths alone: a law that ignores the data,
# such as the prior, passes for each site. That is why `sbc` ranks the log-likelihood, too.
#
# ## Which order is enough?
#
# With the mask given, the order is fixed. `loo` estimates how well each row is predicted from all
# others, and `compare` ranks the orders; `smallest_width` takes the lowest order that is within a
# standard error of the best, where the error is that of differences row by row.

# %%
posterior = exact(features, y)
by_order = {}
for order in range(1, K + 1):
    model_at = pyro.poutine.condition(model, {"mask": (torch.arange(K) < order).float()})
    guide_at = pyro.poutine.block(as_guide(posterior.cut(order)), hide=["mask"])
    options = {"num_samples": num_draws, "num_prior": 0}
    by_order[order] = diag.to_arviz(model_at, guide_at, (features, y), **options)
scores = {order: diag.loo(found, var_name="y") for order, found in by_order.items()}
print("smallest order:", diag.smallest_width(scores))
diag.compare(scores).round(2)

# %% [markdown]
# The law of the order says what is true, the density what predicts well; here they agree on three
# terms. Orders of six and more have a row whose estimate is not to be trusted.
#
# ## Which width is enough?
#
# The same for a nested net on digits. Its weights are too many for k-hat to say anything about the
# whole posterior; predictions can still be scored. `loo_widths` narrows the net at draws of
# its weights.

# %%
pixels, labels = load_digits(return_X_y=True)
digits = torch.tensor(pixels).float() / 16, torch.tensor(labels)
plain = nn.Sequential(
    nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
)
net = nest(plain, digits[0][:1], num_blocks=16)
options = {"batch_size": 128, "weights": KLWeights(latents=0.05), "progress": False}
options |= {"elbo": NestedELBO(local_reparam=True)}
classifier, schedule = NestedClassifier(net), MaskSchedule()
result = fit(classifier, classifier.guide, digits, num_epochs=40, schedule=schedule, **options)
diag.plot_elbo(result, figsize=(5, 2.8))
plt.show()

# %%
scores = diag.loo_widths(net, digits, [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0], 200, progress=False)
print("smallest width:", diag.smallest_width(scores))
table = diag.compare(scores).sort_index().rename_axis("width")
table.round(3)

# %%
figure, ax = plt.subplots(figsize=(5, 2.8))
ax.errorbar(table.index, table["elpd_diff"], table["dse"], marker="o")
ax.set(xlabel="width", ylabel="elpd - that of the best (nats)", xscale="log")
ax.set_xticks(table.index, ["1/16", "1/8", "1/4", "1/2", "1"])
ax.minorticks_off()
plt.show()

# %% [markdown]
# ## ArviZ's own figures
#
# What `to_arviz` returns is an ordinary ArviZ object: save it as netCDF, and use any of ArviZ's
# functions.

# %%
axes = az.plot_forest(data, var_names=["w"], combined=False, figsize=(6, 4))
axes[0].set(xlabel="weight", ylabel="term, a line a fit")
plt.show()
