"""Codebooks, laws of tokens, and the nets around a code of tokens."""

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import embedding
from torch.types import _size

from pyro_vnd.autoencoders.bodies import Bodies
from pyro_vnd.autoencoders.codes import CodeDecoder, Tail
from pyro_vnd.autoencoders.lengths import LengthEncoder, LengthSource
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough

__all__ = ["BlockDecoder", "Blocks", "LookUp", "Nearest", "Quantiser", "TokenEncoder", "TokenPrior"]


class Blocks:
    """How a code of T tokens of D numbers each is laid out: K blocks in order, so that a prefix of blocks is kept.

    Args:
        num_tokens: T.
        dim: D.
        by_token: Whether a block is a token, K = T; else it is one dimension of all tokens, K = D.
    """

    def __init__(self, num_tokens: int, dim: int, by_token: bool) -> None:
        self.num_tokens, self.dim, self.by_token = num_tokens, dim, by_token
        self.num_blocks, self.size = (num_tokens, dim) if by_token else (dim, num_tokens)

    def vectors(self, code: Tensor) -> Tensor:
        """Return the vectors of flat codes, shape (..., K * size) to (..., T, D)."""
        blocks = code.unflatten(-1, (self.num_blocks, self.size))
        return blocks if self.by_token else blocks.transpose(-1, -2)

    def flat(self, vectors: Tensor) -> Tensor:
        """Return flat codes, block by block, shape (..., T, D) to (..., K * size)."""
        return (vectors if self.by_token else vectors.transpose(-1, -2)).flatten(-2)

    def over_vectors(self, mask: Tensor) -> Tensor:
        """Return a mask over blocks as one over vectors, shape (..., K) to (..., T, D)."""
        mask = mask.unsqueeze(-1 if self.by_token else -2)
        return mask.expand(*mask.shape[:-2], self.num_tokens, self.dim)


class Quantiser(nn.Module):
    r"""A codebook of V vectors: each vector is replaced by the nearest one, compared in the numbers that are kept.

    $$t = \arg\min_v \sum_d m_d (z_d - e_{vd})^2, \qquad \hat z = e_t,$$

    with the gradient of $\hat z$ passed straight to z. The encoder learns to meet the codebook from the penalty

    $$\beta \sum_d m_d (z_d - \mathrm{sg}(e_{td}))^2.$$

    In training each number of the codebook follows a running mean of what it stood for, at its own pace rather than at
    that of an optimiser: a step of the encoder moves all vectors at once, further than a learning rate would let the
    codebook come after. A vector of the codebook that has not been the nearest for a number of passes is replaced by
    one of those at hand. So are all of them in the first pass, which puts the codebook where the data are.

    Args:
        codebook_size: V.
        dim: D, numbers of a vector.
        commitment: Weight beta of the pull of the encoder to the codebook.
        decay: What a pass leaves of the weight of those before it.
        restart_after: Passes without use after which a vector is replaced.

    Source: van den Oord, Vinyals and Kavukcuoglu, arXiv 1711.00937, equations 1 to 3 and appendix A.1; for restarts,
    Dhariwal et al., arXiv 2005.00341, section 3.
    """

    codebook: Tensor
    weight: Tensor
    idle: Tensor

    def __init__(
        self, codebook_size: int, dim: int, commitment: float = 0.25, decay: float = 0.9, restart_after: int = 20
    ) -> None:
        super().__init__()
        self.commitment, self.decay, self.restart_after = commitment, decay, restart_after
        self.register_buffer("codebook", torch.randn(codebook_size, dim))
        self.register_buffer("weight", torch.zeros(codebook_size, dim))
        self.register_buffer("idle", torch.full((codebook_size,), restart_after))

    def nearest(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Return the indices of the nearest vectors of the codebook.

        Args:
            vectors: Shape (..., D).
            mask: Numbers to compare, the same shape.

        Returns:
            Integers, shape (...).
        """
        with torch.no_grad():
            squares = mask @ self.codebook.square().T - 2 * (mask * vectors) @ self.codebook.T
            return squares.argmin(-1)  # less what is the same for all of them

    def forward(self, vectors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise vectors.

        Args:
            vectors: Shape (..., T, D).
            mask: Numbers that are kept, of the same shape; a vector without any is no use of the codebook.

        Returns:
            The quantised vectors, before the mask, and the penalty, shape (...).
        """
        vectors, kept = torch.broadcast_tensors(vectors, mask.detach())
        learns = self.training and torch.is_grad_enabled()  # a model that is asked in training mode stays what it is
        if learns:
            self._restart(vectors.detach(), kept)
        index = self.nearest(vectors, kept)
        codes = embedding(index, self.codebook)
        if learns:
            self._follow(vectors.detach(), kept, index)
        penalty = self.commitment * (kept * (vectors - codes).square()).sum((-2, -1))
        return codes + (vectors - vectors.detach()), penalty

    @torch.no_grad()
    def _restart(self, vectors: Tensor, kept: Tensor) -> None:
        unused = self.idle >= self.restart_after
        in_use = kept.amax(-1).flatten()
        picks = vectors.flatten(0, -2)[torch.multinomial(in_use, len(self.codebook), replacement=True)]
        self.codebook.copy_(torch.where(unused.unsqueeze(-1), picks, self.codebook))
        self.weight[unused] = 0
        self.idle[unused] = 0

    @torch.no_grad()
    def _follow(self, vectors: Tensor, kept: Tensor, index: Tensor) -> None:
        index, kept = index.flatten(), kept.flatten(0, -2)
        parts = (kept, kept * vectors.flatten(0, -2))
        uses, sums = (torch.zeros_like(self.codebook).index_add_(0, index, part) for part in parts)
        self.weight.mul_(self.decay).add_(uses)
        self.codebook.addcdiv_(sums - uses * self.codebook, self.weight.clamp_min(1e-9))
        self.idle.copy_(torch.where(uses.amax(-1) > 0, 0, self.idle + 1))


class TokenPrior(TorchDistribution):
    r"""Law of flat codes whose tokens are drawn from a codebook and cut by a mask.

    $$\log p(z \mid m) = - \log V \cdot \begin{cases} \sum_k m_k & \text{a block is a token} \\
      T & \text{a block is a dimension.} \end{cases}$$

    A dropped token is known and costs nothing; a token without its last dimensions is still one of V. The density is
    one of points, linear in the mask, and takes a value to be a code of the mask.

    Args:
        codebook: Shape (V, D).
        mask: Masks over blocks, shape (..., K).
        blocks: Layout of the code.
        token_probs: Probabilities of the tokens in draws, shape (T, V); uniform by default.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, codebook: Tensor, mask: Tensor, blocks: Blocks, token_probs: Tensor | None = None) -> None:
        self.codebook, self.mask_of_blocks, self.blocks, self.token_probs = codebook, mask, blocks, token_probs
        super().__init__(mask.shape[:-1], torch.Size([blocks.num_blocks * blocks.size]), validate_args=False)

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw codes, shape sample_shape + batch_shape + (K * size,)."""
        with torch.no_grad():
            shape = (*sample_shape, *self.batch_shape)
            probs = self.token_probs
            if probs is None:
                probs = self.codebook.new_ones(self.blocks.num_tokens, len(self.codebook))
            tokens = torch.multinomial(probs, math.prod(shape), replacement=True).T
            vectors = embedding(tokens.reshape(*shape, -1), self.codebook)
            return self.blocks.flat(self.blocks.over_vectors(self.mask_of_blocks) * vectors)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return minus the rate of codes in nats."""
        nats = math.log(len(self.codebook))
        mask = self.mask_of_blocks
        kept = mask.sum(-1) if self.blocks.by_token else torch.full_like(mask[..., 0], self.blocks.num_tokens)
        return (-nats * kept).expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))

    def expand(self, batch_shape: _size, _instance: Any = None) -> "TokenPrior":
        """Return the same law with a larger batch shape."""
        mask = self.mask_of_blocks.expand(*batch_shape, self.blocks.num_blocks)
        return TokenPrior(self.codebook, mask, self.blocks, self.token_probs)


class TokenEncoder(LengthEncoder):
    """Unquantised flat codes of images, and the law of the masks over their blocks.

    Args:
        bodies: As in `LengthEncoder`.
        prior: As in `LengthEncoder`.
        source: As in `LengthEncoder`.
        block_size: Numbers of a block.
    """

    def __init__(self, bodies: Bodies, prior: OrderedMask, source: LengthSource, *, block_size: int) -> None:
        super().__init__(bodies, prior.num_units * block_size, prior, source)

    def forward(self, x: Tensor, *, priced: bool = False) -> tuple[Tensor, OrderedMaskStraightThrough]:
        """Return values, shape (N, T * D), and the law, batch shape (N,) or none where images share it."""
        values, lengths = self.values_and_lengths(x, priced=priced)
        return values, OrderedMaskStraightThrough(0.2, **lengths)


class BlockDecoder(CodeDecoder):
    """Decoder of codes that are kept or dropped in blocks of numbers.

    Args:
        bodies: As in `CodeDecoder`.
        num_blocks: K.
        tail: As in `CodeDecoder`.
        block_size: Numbers of a block.
    """

    def __init__(self, bodies: Bodies, num_blocks: int, tail: Tail, *, block_size: int) -> None:
        super().__init__(bodies, num_blocks * block_size, tail)
        self.block_size = block_size

    def forward(self, code: Tensor, mask: Tensor) -> Tensor:
        """Return the outputs of flat codes and their masks over blocks, shape (..., K)."""
        return super().forward(code, mask.repeat_interleave(self.block_size, -1))

    def narrow(self, length: int) -> nn.Sequential:
        """Return a plain net from the first blocks to the outputs."""
        return super().narrow(length * self.block_size)


class Nearest(nn.Module):
    """Flat codes of whole blocks to tokens."""

    codebook: Tensor

    def __init__(self, codebook: Tensor, num_tokens: int, by_token: bool) -> None:
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.shape = (num_tokens, codebook.shape[1]) if by_token else (codebook.shape[1], num_tokens)
        self.by_token = by_token

    def forward(self, code: Tensor) -> Tensor:
        """Return tokens, shape (..., T), of flat codes."""
        vectors = code.unflatten(-1, self.shape)
        if not self.by_token:
            vectors = vectors.transpose(-1, -2)
        return (self.codebook.square().sum(-1) - 2 * vectors @ self.codebook.T).argmin(-1)


class LookUp(nn.Module):
    """Tokens to flat codes of whole blocks."""

    codebook: Tensor

    def __init__(self, codebook: Tensor, by_token: bool) -> None:
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.by_token = by_token

    def forward(self, tokens: Tensor) -> Tensor:
        """Return flat codes of tokens, shape (..., T)."""
        vectors = nn.functional.embedding(tokens, self.codebook)
        return (vectors if self.by_token else vectors.transpose(-1, -2)).flatten(-2)
