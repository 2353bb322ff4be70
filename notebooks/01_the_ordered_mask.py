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
# # The ordered mask
#
# A mask over K ordered units keeps a random prefix: $z_i = 1[i \le L]$ with a random length $L \in
# \{1, \dots, K\}$. `OrderedMask` is its exact law; `OrderedMaskStraightThrough` draws the same
# masks with a gradient to the parameters. This notebook looks at the law, at the gradient, and at
# a mistake that makes a learned law useless.

# %%
import matplotlib.pyplot as plt
import torch

from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough

_ = torch.manual_seed(0)
plt.rcParams["figure.constrained_layout.use"] = True

# %% [markdown]
# ## The law
#
# The parameters are the probabilities $p_k$ of the lengths, as `probs` or as `logits`; the keep
# probability of unit $i$ is $S_i = \sum_{j \ge i} p_j$. A sample is a row of ones, then zeros.

# %%
law = OrderedMask.geometric(0.9, 16)
masks = law.sample((12,))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
left.imshow(masks, cmap="Blues", aspect="auto", extent=(0.5, 16.5, 12.5, 0.5))
left.set(xlabel="unit", ylabel="draw", title="twelve masks")
left.set(xticks=[1, 4, 8, 12, 16], yticks=[1, 4, 8, 12])
right.bar(range(1, 17), law.probs, label="$p_k$")
right.plot(range(1, 17), law.keep_probs, "o-", color="tab:orange", label="$S_k$")
right.set(xlabel="length, or unit", ylabel="probability", title="lengths and keep probabilities")
right.legend()
plt.show()

# %% [markdown]
# ## The gradient
#
# The straight-through law draws one uniform number $u$ a mask and keeps the units with $u < S_i$.
# Its backward pass pretends that the mask was $\sigma((\mathrm{logit} S_i - \mathrm{logit} u) /
# \tau)$. How good is that? Compare it with the exact gradient of $E f(z)$, a sum over all K
# lengths, for a nonlinear $f$.

# %%
K = 16
logits = torch.linspace(1, -1, K).requires_grad_()
values = torch.randn(K)


def objective(z: torch.Tensor) -> torch.Tensor:
    """A smooth, nonlinear function of the mask."""
    return torch.tanh((z * values).sum(-1)) + 0.1 * z.sum(-1)


all_masks = OrderedMask(logits=logits).enumerate_support()
(exact,) = torch.autograd.grad((logits.softmax(-1) * objective(all_masks)).sum(), logits)
figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True)
for ax, noise in zip(axes, ("logistic", "gumbel"), strict=True):
    guide = OrderedMaskStraightThrough(0.2, logits=logits, noise=noise)
    estimates = torch.stack(
        [torch.autograd.grad(objective(guide.rsample((4,))).mean(), logits)[0] for _ in range(500)]
    )
    units = torch.arange(1, K + 1)
    ax.plot(units, exact, "k.-", label="exact")
    ax.errorbar(
        units,
        estimates.mean(0),
        estimates.std(0),
        fmt="o",
        alpha=0.6,
        label="4 draws: mean and deviation",
    )
    ax.set(title=f"noise {noise!r}", xlabel="length")
axes[0].set(ylabel="gradient to the logit")
axes[0].legend()
plt.show()

# %% [markdown]
# ## Why it matters what is a logit
#
# `gumbel_softmax` expects log-probabilities. Handed probabilities, which lie between 0 and 1, it
# samples from $\mathrm{softmax}(p)$: nearly uniform, whatever was learned. With keyword-only
# `probs` and `logits` the mistake is hard to make here, and this is what it looks like.

# %%
peaked = torch.tensor([0.01, 0.02, 0.02, 0.9, 0.02, 0.01, 0.01, 0.01])
right_lengths = OrderedMask(probs=peaked).sample((20_000,)).sum(-1)
wrong_lengths = OrderedMask(logits=peaked).sample((20_000,)).sum(-1)
figure, ax = plt.subplots(figsize=(5, 2.8))
bins = torch.arange(0.5, 9.5)
ax.hist(
    [right_lengths, wrong_lengths],
    bins=bins,
    density=True,
    label=["probs=p", "logits=p, the mistake"],
)
ax.plot(range(1, 9), peaked, "k_", markersize=14, label="$p_k$")
ax.set(xlabel="length", ylabel="share of draws")
ax.legend()
plt.show()

# %% [markdown]
# ## Learning a law
#
# Gradient ascent on $E f(z) - \mathrm{KL}(q \| p)$ has a known answer: $q_k \propto p_k e^{f_k}$,
# with $f_k$ the value of the mask of length k. The straight-through gradient comes close to it.
# What is left is its bias: it looks at neighbouring lengths and smooths sharp peaks. That is good
# enough for a net, where the law is the way to good prefixes. Where the law itself is the result,
# take the answer: `AutoNested` finds out $f_k$ at every length and has the law in closed form
# (notebook 05).

# %%
prior = OrderedMask.uniform(K)
q_logits = torch.zeros(K, requires_grad=True)
optimizer = torch.optim.Adam([q_logits], lr=0.02)
for _ in range(1500):
    guide = OrderedMaskStraightThrough(0.2, logits=q_logits)
    loss = (
        torch.distributions.kl_divergence(guide, prior)
        - 2 * objective(guide.rsample((16,))).mean()
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
learned = q_logits.detach().softmax(-1)
answer = (2 * objective(all_masks)).detach().softmax(-1)
figure, ax = plt.subplots(figsize=(5, 2.8))
ax.plot(range(1, K + 1), answer, "k.-", label="exact")
ax.plot(range(1, K + 1), learned, "o", alpha=0.7, label="learned")
ax.set(xlabel="length", ylabel="probability")
ax.legend()
plt.show()
print(f"total variation {(learned - answer).abs().sum().item() / 2:.3f}")
