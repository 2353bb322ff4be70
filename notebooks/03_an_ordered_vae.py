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
# # An ordered VAE
#
# A variational autoencoder whose code comes in order: the first number says most, the next ones
# add detail, and the code may be cut anywhere: at one length for all images, or where each image
# has said what it has to say.
#
# The loader of the images is an example in `models`, no part of the package. Run this in a
# checkout, and start Jupyter in its root, by `PYTHONPATH=$PWD jupyter lab`.

# %%
import matplotlib.pyplot as plt
import torch

from models.datasets import load
from pyro_vnd.autoencoders import Bodies, GaussianLikelihood, OrderedVAE, full_length, mlp_bodies
from pyro_vnd.diagnostics import (
    evaluate_lengths,
    evaluate_prefixes,
    plot_lengths,
    plot_prefixes,
    plot_rate_distortion,
    plot_samples,
    plot_traversals,
)
from pyro_vnd.infer import (
    KLWeights,
    OptimizerSettings,
    PriceSchedule,
    cosine_to_zero,
    distil_lengths,
    fit,
    linear,
)

name, num_epochs, num_rows = "fashion-mnist", 10, 20_000
_ = torch.manual_seed(0)
plt.rcParams["figure.constrained_layout.use"] = True

# %% [markdown]
# ## The model
#
# $$L \sim p, \qquad z_i \sim N(0, 1) \text{ for } i \le L, \text{ else } 0, \qquad
# x \sim N(f(z, L), \sigma_L^2).$$
#
# One Pyro site, a `NestedNormal`, carries the length and the latents. What is dropped from a code
# can partly be told from what is kept, so a small net completes codes before the decoder sees them
# (`tail="completion"`); and short codes explain an image less well, so each length has a noise of
# its own (`noise="by_length"`). Beside it an ordinary VAE: the same nets, all latents always.

# %%
data = load(name)
images, shape, K = data.train.images[:num_rows], data.image_shape, 16
lengths = [1, 2, 4, 8, 16]


def bodies() -> Bodies:
    """Make an encoder and a decoder, without what touches the code."""
    return mlp_bodies(shape, hidden=(256, 128))


ordered = OrderedVAE(
    shape,
    K,
    bodies=bodies(),
    likelihood=GaussianLikelihood(K, noise="by_length"),
    tail="completion",
    posterior_lengths="priced",
)
ordinary = OrderedVAE(
    shape, K, bodies=bodies(), prior_lengths=full_length(K), posterior_lengths="prior"
)

# %% [markdown]
# ## Training
#
# Every prefix must be trained. A `PriceSchedule` draws a price for each row, and its length is the
# one that is worth it at that price, by what the encoder predicts; three tenths of the rows have
# all numbers. The weight of the latents' KL rises from zero, or the last latents would be switched
# off before the decoder uses them.


# %%
def train(method: str, vae: OrderedVAE, schedule: PriceSchedule | None) -> None:
    """Fit a model and say what came out."""
    result = fit(
        vae,
        vae.guide,
        images,
        num_epochs=num_epochs,
        batch_size=128,
        lr=0.003,
        optimizer=OptimizerSettings(lr_schedule=cosine_to_zero()),
        weights=KLWeights(local=linear(0, 1)),
        schedule=schedule,
        progress=False,
    )
    print(f"{method}: ELBO {result.elbo[-1]:.0f} nats per image; {result.lengths['code']}")


vaes = {"ordered": ordered, "ordinary": ordinary}
train("ordered", ordered, PriceSchedule())
train("ordinary", ordinary, None)

# %% [markdown]
# ## What is a prefix worth?
#
# Test images, one a class, and what the mean code of each length keeps of them. One number tells
# tops from shoes, and dark from light; with two, trousers are trousers and a dress is one; letters
# on a jumper are beyond all sixteen.

# %%
test = data.test
shown = test.images[
    torch.stack([(test.labels == label).nonzero()[0, 0] for label in test.labels.unique()])
]
plot_prefixes(shown[:, 0], {k: ordered.reconstruct(shown, k)[:, 0] for k in lengths})
plt.show()

# %% [markdown]
# The yardstick is principal components, which come in order, too. From two numbers on the ordered
# VAE is better, by a fifth with two and two fifths with four; a single one is hardly ever worth
# stopping at, and is little trained. Prefixes of the ordinary VAE are worth little, as its numbers
# come in no order; but with all of them it is better than the ordered one. That is the price, if
# nothing is ever cut.

# %%
centre = images.flatten(1).mean(0)
components = torch.pca_lowrank(images.flatten(1), q=K, niter=4)[2]
errors = {method: [] for method in ("PCA", *vaes)}
for k in lengths:
    centred = test.images.flatten(1) - centre
    projected = centred @ components[:, :k] @ components[:, :k].T
    errors["PCA"].append((projected - centred).square().mean().item() * 1000)
    for method, vae in vaes.items():
        errors[method].append(
            (vae.reconstruct(test.images, k) - test.images).square().mean().item() * 1000
        )
figure, ax = plt.subplots(figsize=(5, 3))
print("squared error of a pixel x 1000, by length", *lengths)
for method, values in errors.items():
    ax.plot(lengths, values, "o-", label=method)
    print(f"{method:10}", *(f"{value:6.1f}" for value in values))
ax.set(xlabel="code length", ylabel="squared error of a pixel x 1000", xscale="log", ylim=0)
ax.set_xticks(lengths, lengths)
ax.minorticks_off()
ax.legend()
plt.show()

# %% [markdown]
# ## Which images need long codes?
#
# What a length is worth to an image is $v_L(x) = E_q \log p(x \mid z_{\le L}) -
# \mathrm{KL}(q(z_{\le L} \mid x) \| p(z_{\le L}))$, in nats. At a price of $\lambda$ nats a number
# the best law of its length is $q(L \mid x, \lambda) \propto p(L) \, e^{v_L(x) - \lambda L}$, and
# each price leads to a mean length. The values are predicted by a small net on the encoder's
# features, which has learned from the lengths that rows had in training. `distil_lengths` decodes
# some thousand images at twelve lengths and teaches it more, in seconds; it serves any fit. "Share
# of gain" is what choosing by it gains, on other images, of what the true values would.

# %%
print(distil_lengths(ordered, images, progress=False))
by_length = evaluate_lengths(ordered, test, [2, 3, 4, 6, 8], progress=False)
plot_lengths(by_length, test.images[:, 0], mean_length=4)
plt.show()

# %% [markdown]
# Test images from the one with the shortest code to that with the longest, at a mean of four
# numbers: a sneaker is much like another one, a jumper with a print is not. For the same mean
# length the error is a tenth to three tenths less than with one length for all images, up to four
# numbers. By class:

# %%
at_four = by_length.sel(seed=0, law="model", mean_length=4)
for c in at_four["length_by_class"].argsort().values:
    print(f"{data.class_names[c]:12} {at_four['length_by_class'].values[c]:5.1f}")

# %% [markdown]
# Nothing is decoded to choose these lengths, and one net serves every budget:
# `ordered.encode(x, mean_length=4.0)`, `reconstruct` and `embed` likewise, or `price=` for a price
# in nats.

# %% [markdown]
# ## Rate and distortion
#
# What a code costs, in nats, against the error that it leaves: lower and further to the left is
# better. Half of the ordered numbers get most of what all get; prefixes of the ordinary code cost
# hardly less and explain little. Stars are at the lengths of the posterior.

# %%
scores = {
    method: evaluate_prefixes(vae, test, lengths, num_importance=0, progress=False)
    for method, vae in vaes.items()
}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
plot_rate_distortion(scores, ax=left)
plot_rate_distortion({"ordered": scores["ordered"]}, ax=right)
left.set(title="both", xmargin=0.1, ymargin=0.1)
right.set(title="the ordered one alone", xmargin=0.1, ymargin=0.1)
plt.show()

# %% [markdown]
# ## Samples by length
#
# Each row has the same random numbers: a column is one code, cut at growing lengths. Short codes
# are blurred, and longer ones fill the same shape in, not always with a garment: the later numbers
# of real codes repeat part of what the earlier ones say, and independent draws do not.

# %%
plot_samples(ordered, lengths, 12)
plt.show()

# %% [markdown]
# The prior can be learned with the rest: each number given those before it
# (`prior_latents="autoregressive"`). It is one prior for all lengths, as that of a code that is
# cut is that of whole codes, cut. The bound is higher, and most samples are garments now, at every
# length.

# %%
learned_prior = OrderedVAE(
    shape,
    K,
    bodies=bodies(),
    likelihood=GaussianLikelihood(K, noise="by_length"),
    tail="completion",
    prior_latents="autoregressive",
    posterior_lengths="priced",
)
train("learned prior", learned_prior, PriceSchedule())
with torch.no_grad():
    for method, vae in {"simple prior": ordered, "learned prior": learned_prior}.items():
        values = (vae.elbo(test.images, k).elbo.mean().item() for k in lengths)
        print(f"{method:13} ELBO by length:", *(f"{value:6.0f}" for value in values))
plot_samples(learned_prior, lengths, 12)
plt.show()

# %% [markdown]
# ## What does each number say?
#
# One image, and one number of its code after the other moved from -2.5 to 2.5. The first one makes
# a shirt light or dark; the last ones hardly show.

# %%
plot_traversals(ordered, shown[0], [1, 2, 3, 4, 8, 12, 16])
plt.show()

# %% [markdown]
# ## A plain encoder and decoder for four numbers
#
# `narrow` makes smaller nets, for codes of one length. They are torch, without Pyro and without
# this library.

# %%
encoder, decoder = ordered.narrow(4)
codes = encoder(shown)
print(f"{tuple(shown.shape)} -> {tuple(codes.shape)} -> {tuple(decoder(codes).shape)}")
print(
    f"largest difference {(decoder(codes) - ordered.reconstruct(shown, 4)).abs().max().item():.0e}"
)
