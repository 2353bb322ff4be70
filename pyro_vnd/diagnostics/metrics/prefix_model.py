"""What evaluations and pictures of ordered codes need of a model."""

from typing import Protocol

from torch import Tensor

__all__ = ["PrefixModel"]


class PrefixModel(Protocol):
    """What `evaluate_prefixes` needs of a model; it is an `nn.Module` as a rule.

    It may have more, all or some of:

    - `elbo(x, length, num_samples)`, with attributes `log_likelihood`, `kl_latents`, `kl_lengths` and `elbo`, in nats,
      shape (N,) each;
    - `log_likelihood(x, num_samples, length)`, an importance-weighted bound of the same, shape (N,);
    - `encode(x)`, a `NestedNormal`, or the law of its mask alone, with batch shape (N,).

    There `length` None means lengths from the learned posterior.

    Attributes:
        num_latents: K, the longest code.
    """

    num_latents: int

    def embed(self, x: Tensor, length: int, /) -> Tensor:
        """Return the mean codes of images, shape (N, K * B) with B numbers a latent, zero past the length."""

    def reconstruct(self, x: Tensor, length: int, /) -> Tensor:
        """Return images from codes of a length, the shape of `x`."""

    def sample(self, num_samples: int, length: int | None, /) -> Tensor:
        """Return images from the prior, None for lengths from theirs."""
