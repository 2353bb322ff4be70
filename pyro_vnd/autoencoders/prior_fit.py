"""The learned prior of a trained VAE, fitted on to the codes of its encoder."""

import pyro
import torch
from torch import Tensor

from pyro_vnd._compat import QuietModule
from pyro_vnd._data import Rows, batches
from pyro_vnd._sizes import check_count
from pyro_vnd.autoencoders.conditioner import Conditioner
from pyro_vnd.autoencoders.lengths import full_length
from pyro_vnd.autoencoders.vae import OrderedVAE
from pyro_vnd.distributions import NestedAutoregressive, NestedNormal
from pyro_vnd.infer import FitResult, OptimizerSettings, cosine_to_zero, fit

__all__ = ["fit_prior"]

_ENCODED = 10_000  # images at once


def fit_prior(
    vae: OrderedVAE,
    x: Rows,
    *,
    num_epochs: int = 20,
    batch_size: int = 512,
    lr: float = 4e-3,
    seed: int | None = 0,
    progress: bool = True,
) -> FitResult:
    r"""Fit the learned prior of a trained VAE on, its encoder and decoder as they are.

    $$\min_p \; E_{\mathrm{data}} \, \mathrm{KL}(q(z \mid x) \| p(z)).$$

    In a fit of the whole the prior follows an encoder that does not stand still. Here the codes stay, and an epoch
    takes a second or so. The bound gains by what the divergence falls, and samples gain more than that, as draws of the
    prior stray less from what the decoder has seen. Reconstructions stay what they are.

    Args:
        vae: With prior_latents="autoregressive".
        x: Images that it was trained on, shape (N, *image_shape), or data that begin with them: a tuple of tensors, a
            mapping in which they are "x" or come first, a `Dataset`, or batches, of which one is in memory at a time.
        num_epochs: Passes over their codes.
        batch_size: Codes of a batch; all of them where there are fewer.
        lr: Largest learning rate of Adam, which rises for a twentieth of the steps and falls to zero on a cosine.
        seed: Of shuffling and draws; None goes on with the caller's random numbers.
        progress: Whether to show a progress bar.

    Returns:
        The record of the fit, in which the ELBO is minus the divergence of whole codes in nats.

    Raises:
        ValueError: If the prior is not learned, or an argument is invalid.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> vae = OrderedVAE((1, 8, 8), num_latents=4, prior_latents="autoregressive")
        >>> result = fit_prior(vae, torch.rand(64, 1, 8, 8), num_epochs=50, batch_size=32, progress=False)
        >>> result.elbo[-1] > result.elbo[0]
        True
    """
    if not isinstance(vae, OrderedVAE) or vae.conditioner is None:
        came = "prior_latents='independent'" if isinstance(vae, OrderedVAE) else type(vae).__name__
        raise ValueError(
            f"fit_prior: argument `vae` must be an OrderedVAE with prior_latents='autoregressive'; got {came}"
        )
    check_count("fit_prior", batch_size=batch_size)
    codes = _Codes(vae.conditioner, vae.num_latents)
    with torch.no_grad():
        laws = [vae.encode(rows, vae.num_latents) for rows, *_ in batches(x, _ENCODED)]
    if not laws:
        raise ValueError("fit_prior: argument `x` has no rows")
    data = tuple(torch.cat([getattr(law, name) for law in laws]) for name in ("loc", "scale"))
    return fit(
        codes,
        codes.guide,
        data,
        num_epochs=num_epochs,
        batch_size=min(batch_size, len(data[0])),
        lr=lr,
        optimizer=OptimizerSettings(lr_schedule=cosine_to_zero()),
        seed=seed,
        progress=progress,
    )


class _Codes(QuietModule):
    """Whole codes under the prior, which alone is trained, and their guide, whose means and deviations are the data."""

    probs: Tensor

    def __init__(self, conditioner: Conditioner, num_latents: int) -> None:
        super().__init__()
        self.conditioner = conditioner
        like = next(conditioner.parameters())
        self.register_buffer("probs", full_length(num_latents).probs.to(like))

    def forward(self, loc: Tensor, scale: Tensor) -> Tensor:
        with pyro.plate("data", len(loc)):
            return pyro.sample("code", NestedAutoregressive(self.conditioner, probs=self.probs))

    def guide(self, loc: Tensor, scale: Tensor) -> Tensor:
        with pyro.plate("data", len(loc)):
            return pyro.sample("code", NestedNormal(loc, scale, probs=self.probs))
