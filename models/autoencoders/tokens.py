"""Nets around a code of tokens: from images to blocks of numbers and back, and between blocks and tokens."""

from torch import Tensor, nn

from models.autoencoders.codes import CodeDecoder, LengthEncoder, Posterior, Tail
from models.autoencoders.nets import Bodies
from models.autoencoders.quantiser import Blocks
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough

__all__ = ["BlockDecoder", "LookUp", "Nearest", "TokenEncoder"]


class TokenEncoder(LengthEncoder):
    """Unquantised flat codes of images, and the law of the masks over their blocks."""

    def __init__(self, bodies: Bodies, prior: OrderedMask, posterior: Posterior, blocks: Blocks) -> None:
        super().__init__(bodies.encoder, bodies.num_features, blocks.num_blocks * blocks.size, prior, posterior)

    def forward(self, x: Tensor) -> tuple[Tensor, OrderedMaskStraightThrough]:
        """Return values, shape (N, T * D), and the law, batch shape (N,) or none where images share it."""
        values, lengths = self.values_and_lengths(x)
        return values, OrderedMaskStraightThrough(0.2, **lengths)


class BlockDecoder(CodeDecoder):
    """Decoder of codes whose units are blocks of numbers."""

    def __init__(self, bodies: Bodies, blocks: Blocks, tail: Tail) -> None:
        super().__init__(bodies.decoder, bodies.num_inputs, blocks.num_blocks * blocks.size, tail)
        self.size = blocks.size

    def forward(self, code: Tensor, mask: Tensor) -> Tensor:
        """Return the outputs of flat codes and their masks over blocks, shape (..., K)."""
        return super().forward(code, mask.repeat_interleave(self.size, -1))

    def truncate(self, length: int) -> nn.Sequential:
        """Return a plain net from the first blocks to the outputs."""
        return super().truncate(length * self.size)


class Nearest(nn.Module):
    """Flat codes of whole blocks to tokens."""

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

    def __init__(self, codebook: Tensor, by_token: bool) -> None:
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.by_token = by_token

    def forward(self, tokens: Tensor) -> Tensor:
        """Return flat codes of tokens, shape (..., T)."""
        vectors = nn.functional.embedding(tokens, self.codebook)
        return (vectors if self.by_token else vectors.transpose(-1, -2)).flatten(-2)
