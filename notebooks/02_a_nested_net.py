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
# # A nested net
#
# One net, trained once, that runs at any width and knows when it does not know. `nest` puts a
# learned ordered mask on every hidden layer of an ordinary torch net and a Gaussian posterior on
# its weights; `fit` trains both by SVI. We do this on 10,000 images of Fashion-MNIST, beside a net
# whose law of widths is prescribed, to see what learning buys.
#
# The loaders of the images are examples in `models`, no part of the package. Run this in a
# checkout, and start Jupyter in its root, by `PYTHONPATH=$PWD jupyter lab`.

# %%
import matplotlib.pyplot as plt
import pyro
import torch
from torch import nn

from models.datasets import load
from models.ood import ood_sets
from pyro_vnd.diagnostics import (
    evaluate,
    evaluate_widths,
    plot_laws,
    plot_ood,
    plot_reliability,
    plot_widths,
)
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import (
    KLWeights,
    MaskSchedule,
    NestedELBO,
    OptimizerSettings,
    cosine_to_zero,
    fit,
    module_local_params,
)
from pyro_vnd.nn import NestedClassifier, narrow, nest

name, num_epochs, num_draws = "fashion-mnist", 16, 10
_ = torch.manual_seed(0)
plt.rcParams["figure.constrained_layout.use"] = True

# %% [markdown]
# ## The images, and images from elsewhere
#
# A net should doubt what it was not trained for. `ood_sets` gives four kinds of foreign images:
# handwritten digits, the test images inverted, the test images on their side, and noise.

# %%
data = load(name)
foreign = {key: x for key, x in ood_sets(data.test.images).items() if key != name}
figure, axes = plt.subplots(1, 1 + len(foreign), figsize=(9, 1.4))
for ax, (key, x) in zip(axes, {"test": data.test.images, **foreign}.items(), strict=True):
    ax.imshow(torch.cat([*x[:3, 0]], 1), cmap="gray_r", vmin=0, vmax=1)
    ax.set(title=key, xticks=[], yticks=[])
plt.show()


# %% [markdown]
# ## Nesting a net
#
# The net is any torch net; here it begins with its own standardisation, so that it takes images as
# they are. `nest` traces which layers share units: two groups, each in 16 blocks, and so 16
# widths. The weights given are where the posterior starts.

# %%
mean, deviation = data.train.images.mean(), data.train.images.std()


class Standardize(nn.Module):
    """Centre and scale pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return images with mean zero and deviation one over the training part."""
        return (x - mean.item()) / deviation.item()


num_pixels = data.train.images[0].numel()
plain = nn.Sequential(
    Standardize(),
    nn.Flatten(),
    nn.Linear(num_pixels, 256),
    nn.ReLU(),
    nn.Linear(256, 256),
    nn.ReLU(),
    nn.Linear(256, 10),
)
net = nest(plain, data.train.images[:1], num_blocks=16)
print(net.widths)

# %% [markdown]
# ## Training
#
# `NestedClassifier(net)` is the Pyro model, and its `guide`, which is that of the net, the guide.
# What matters in the call of `fit`:
#
# - `schedule=MaskSchedule(...)`: a quarter of the masks come from the learned law, the others from
#   budgets that favour narrow nets, or are full. Without it the law would settle on the widths
#   that do best at the moment, and the others would no longer be trained. `sliced=True,
#   num_particles=2`: a step takes two widths for the whole batch and computes only what they keep.
# - `NestedELBO(local_reparam=True)`: outputs of layers are drawn in place of weights, which has
#   less noise.
# - `KLWeights(latents=0.05)`: at weight one, mean-field posteriors of nets underfit. The posterior
#   is colder than Bayes'. `lengths=0.01`, likewise: widths differ by hundredths of a nat, too
#   little to move a law at weight one.
# - `lr={"laws": 0.03, "*": 0.003}`: laws have few parameters and small gradients, and get ten
#   times the learning rate.
#
# The baseline is nested dropout: the same net, steps and widths in a step, a prescribed law
# (geometric), and no posterior. The one between has the posterior, but not the learned law.


# %%
geometric = OrderedMask.geometric(0.85, 16)
point = nest(plain, data.train.images[:1], num_blocks=16, prior=None)
prescribed = nest(plain, data.train.images[:1], num_blocks=16)
methods = {
    "nested dropout": (point, MaskSchedule(0, 1, 0, law=geometric, num_particles=2, sliced=True)),
    "prescribed law": (
        prescribed,
        MaskSchedule(0, 1, 0, law=geometric, num_particles=2, sliced=True),
    ),
    "learned law": (
        net,
        MaskSchedule(0.25, 0.65, 0.1, law="log-uniform", num_particles=2, sliced=True),
    ),
}
for method, (nested, schedule) in methods.items():
    bayesian = (
        {}
        if nested is point
        else {
            "weights": KLWeights(latents=0.05, lengths=0.01),
            "elbo": NestedELBO(local_reparam=True),
        }
    )
    result = fit(
        NestedClassifier(nested),
        nested.guide,
        [part[:10_000] for part in data.train],
        num_epochs=num_epochs,
        batch_size=256,
        lr={"laws": 0.03, "*": 0.003},
        optimizer=OptimizerSettings(lr_schedule=cosine_to_zero()),
        schedule=schedule,
        progress=False,
        **bayesian,
    )
    print(f"{method}: log-likelihood {result.log_likelihood[-1]:.3f} nats per image")

# %% [markdown]
# ## The learned law
#
# For a fixed net the best law is the prior reweighed by $e^{-\mathrm{loss}_k / \lambda}$, where
# $\lambda$ is the weight of the lengths: units stay as long as they still pay. Here seven masks in
# ten or more keep the first half of a layer, and the first layer is kept longer than the second;
# past that, more units hardly change the loss, and all lengths are about equally likely, as they
# were before.

# %%
priors = {site: OrderedMask.uniform(16) for site in net.laws}
plot_laws(net.laws, priors, figsize=(5, 3))
plt.show()

# %% [markdown]
# ## Every width from one training
#
# `evaluate_widths` narrows the net for each of several draws of the weights and averages their
# probabilities. Half of the units are as good as all. Bands are standard errors over the test
# images.

# %%
widths = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
scores = {
    method: evaluate_widths(
        nested,
        data.test,
        widths,
        1 if nested is point else num_draws,
        foreign,
        batch_size=1000,
        progress=False,
    )
    for method, (nested, _) in methods.items()
}
axes = plot_widths(scores, figsize=(10, 3))
for ax in axes:
    ax.set_xscale("log", base=2)
    ax.set_xticks(widths, ["1/16", "1/8", "1/4", "1/2", "1"])
plt.show()
ours = scores["learned law"].sel(seed=0)
print(ours[["accuracy", "nll", "ece"]].to_dataframe()[["accuracy", "nll", "ece"]].round(3))

# %% [markdown]
# ## Are its probabilities right?
#
# When the net is 80 % sure it should be right in 80 % of cases: on the diagonal. The narrowest net
# is too modest, the whole one slightly too sure; bins at the left have next to no rows.

# %%
plot_reliability(scores["learned law"].sel(width=[1 / 16, 1 / 4, 1.0]))
plt.show()

# %% [markdown]
# ## Does it doubt foreign images?
#
# The entropy of the averaged probabilities says how doubtful a prediction is; the mutual
# information of class and weights says how much of that is for want of data, and needs a
# posterior. AUROC is the probability that a foreign image scores higher than a test image. Noise
# is seen through at once; clothes that lie on their side look much like clothes.

# %%
plot_ood(scores["learned law"].sel(width=[1 / 4, 1.0]), figsize=(9, 3.6))
plt.show()
print("AUROC, mean over the foreign sets, by width", *(f"{width:.3g}" for width in widths))
for method, score in (
    *((method, "entropy") for method in methods),
    ("learned law", "mutual_information"),
):
    auroc = scores[method]["auroc"].sel(seed=0, score=score).mean("ood").values
    print(f"{method + ', ' + score:33}", *(f"{value:.3f}" for value in auroc))

# %% [markdown]
# ## A plain net of a quarter of the width
#
# `narrow` makes a torch net that needs neither Pyro nor this library. Its outputs are those of
# the nested net under masks: condition the Pyro program on the same draw of the weights and see.

# %%
images = data.test.images[:500]
with module_local_params(net), torch.no_grad(), net.cut(1 / 4):
    draw = net.guide(images)
    masked = pyro.poutine.condition(net, draw)(images)
    same = narrow(net, 1 / 4, draw)(images)
print(
    f"largest difference of a logit, masked and narrowed: {(masked - same).abs().max().item():.0e}"
)
small = narrow(net, 1 / 4)  # at the posterior mean
print(small)
alone = evaluate(small, data.test, progress=False)
parameters = [sum(p.numel() for p in each.parameters()) for each in (plain, small)]
print(
    f"{parameters[1]:,} of {parameters[0]:,} parameters, accuracy {alone['accuracy'].item():.3f}"
)

# %% [markdown]
# ## What learning buys, and what it does not
#
# **The posterior of the weights** buys calibration and doubt. At full width the ECE is about .02
# in place of .04, the NLL .41 in place of .42, and the AUROC of the entropy .85 in place of .7:
# nested dropout grows sure of itself with its width. At 1/16 hardly anything is left of that, and
# in accuracy there is no gain at any width. Mutual information is the worse score here.
#
# **The learned law** buys no better scores at a given width than a prescribed one under the same
# posterior, and here a slightly lower AUROC; both are trained at budgets most of the time. What it
# buys is the answer to a question: how many units of which layer does this problem need?
#
# This was one fit of each, on few images. The benchmark of nested nets
# ([docs/benchmarks](../docs/benchmarks/nested_nets.md)) has all images, more seeds and more
# baselines.
