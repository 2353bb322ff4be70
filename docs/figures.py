"""The figure of the README: a mask, and what cutting does. `python docs/figures.py` draws it, in half a minute."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from sklearn.datasets import load_digits

from pyro_vnd.autoencoders import GaussianLikelihood, OrderedVAE, mlp_bodies
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import KLWeights, MaskSchedule, OptimizerSettings, cosine_to_zero, fit, linear

FIGURE = Path(__file__).parent / "images" / "mask_and_cut.png"
UNITS, DRAWS, SHOWN = 16, 7, (0, 2, 3, 4, 9)
LENGTHS = (1, 2, 4, 8, 16)


def draw_mask(figure: SubFigure) -> None:
    """Draw the keep probabilities of a law, and masks from it."""
    law = OrderedMask.geometric(0.88, UNITS)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.15))
    above.bar(range(1, UNITS + 1), law.keep_probs, width=0.85, color="C0")
    above.set(ylabel="keep probability", ylim=(0, 1.05))
    above.spines[["top", "right"]].set_visible(False)
    masks = law.sample((DRAWS,))
    below.pcolormesh(
        torch.arange(UNITS + 1) + 0.5, torch.arange(DRAWS + 1), masks, cmap="Blues", vmin=-0.1, vmax=1.4, edgecolor="w"
    )
    below.set(xlabel="unit", ylabel=f"{DRAWS} masks", xticks=(1, 4, 8, 12, 16), yticks=())
    below.spines[:].set_visible(False)
    figure.suptitle("A mask keeps a random prefix")


def draw_codes(figure: SubFigure) -> None:
    """Train a VAE on digits and draw its reconstructions of images that it has not seen, by length of the code."""
    data = load_digits()
    x, labels = torch.as_tensor(data.data, dtype=torch.float32) / 16, data.target
    train, others, labels = x[:1400], x[1400:], labels[1400:]
    vae = OrderedVAE(
        (64,),
        UNITS,
        bodies=mlp_bodies((64,), hidden=(128, 128)),
        likelihood=GaussianLikelihood(UNITS, noise="by_length"),
        tail="completion",
    )
    fit(
        vae,
        vae.guide,
        train,
        num_epochs=400,
        batch_size=128,
        lr=0.002,
        optimizer=OptimizerSettings(lr_schedule=cosine_to_zero()),
        weights=KLWeights(local=linear(0.0, 1.0, warmup=0.7)),
        schedule=MaskSchedule(learned=0.1, budget=0.75, full=0.15, law="log-uniform"),
    )
    images = others[[int((labels == digit).nonzero()[0][0]) for digit in SHOWN]]
    columns = {str(k): vae.reconstruct(images, k) for k in LENGTHS} | {"image": images}
    axes = figure.subplots(len(SHOWN), len(columns), gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    for column, (name, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(name, fontsize=10)
        for ax, picture in zip(axes[:, column], pictures, strict=True):
            _show(ax, picture)
    figure.suptitle("One training, codes cut to 1, 2, 4, ... numbers")


def _show(ax: Axes, picture: torch.Tensor) -> None:
    ax.imshow(picture.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
    ax.set(xticks=(), yticks=())
    ax.spines[:].set_visible(False)


def main() -> None:
    """Draw and save."""
    torch.manual_seed(0)
    whole = plt.figure(figsize=(8, 4), layout="constrained")
    left, right = whole.subfigures(1, 2, width_ratios=(1, 1.25), wspace=0.04)
    draw_mask(left)
    draw_codes(right)
    whole.savefig(FIGURE, dpi=200)


if __name__ == "__main__":
    main()
