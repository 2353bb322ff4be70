"""A small GPT, and a text for it that Python brings: plain torch, which knows nothing of nesting."""

import hashlib
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.sizes import check_sizes

__all__ = ["GPT", "NUM_SYMBOLS", "Text", "split_text", "topics", "windows"]

NUM_SYMBOLS = 128  # ASCII
STRETCHES = 100  # of a text, of which each tenth is for testing and the one before it for validation


class CausalAttention(nn.Module):
    """Self-attention in which a token sees itself and those before it.

    Args:
        dim: Size of a token, D.
        heads: Number of heads, which divides it.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape, (N, T, D)."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(seen.transpose(1, 2).flatten(2))


class Block(nn.Module):
    r"""Pre-norm block, $u = x + \mathrm{attention}(\mathrm{norm}(x))$, $y = u + \mathrm{mlp}(\mathrm{norm}(u))$.

    Args:
        dim: Size of a token, D.
        heads: Number of heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = CausalAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape, (N, T, D)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Causal transformer over symbols: what comes next, given what there was.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2).

    Args:
        num_symbols: Number of symbols, C.
        context: Largest number of tokens that it sees, T.
        dim: Size of a token, D.
        depth: Number of blocks.
        heads: Number of attention heads, which divides `dim`.
        tied: Whether the output layer has the weight of the embedding.

    Raises:
        ValueError: If a size is not positive, or the heads do not divide `dim`.

    Example:
        >>> GPT(context=16, dim=8, depth=1, heads=2)(torch.zeros(5, 12, dtype=torch.long)).shape
        torch.Size([5, 12, 128])
    """

    def __init__(
        self,
        num_symbols: int = NUM_SYMBOLS,
        context: int = 128,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        tied: bool = False,
    ) -> None:
        super().__init__()
        check_sizes("GPT", num_symbols=num_symbols, context=context, dim=dim, depth=depth, heads=heads)
        if dim % heads:
            raise ValueError(f"GPT: argument `heads` must divide `dim`, {dim}; got {heads}")
        self.symbols, self.positions = nn.Embedding(num_symbols, dim), nn.Embedding(context, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_symbols, bias=False)
        for embedding in (self.symbols, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        if tied:
            self.head.weight = self.symbols.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the next symbol at each place, shape (N, T, C), given symbols, shape (N, T)."""
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.symbols(x) + self.positions(places))))


class Text(NamedTuple):
    """Windows of a text and the symbols that come next, int64, shape (N, T) each.

    Attributes:
        train: For fitting; windows overlap by half, so that each symbol is there twice.
        validation: For every choice; these, and those of the test part, do not overlap.
        test: For final numbers.
        sha256: Checksum of the text.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    sha256: str


def topics(*names: str) -> bytes:
    """Return help texts of Python, those of `help("for")` and others, each paragraph once, in ASCII.

    Topics quote each other, and held-out text would be known. Paragraphs of the same words are the same.

    Args:
        *names: Names of topics; all of them by default.
    """
    from pydoc_data.topics import topics as by_name

    paragraphs = [part for name in names or by_name for part in by_name[name].split("\n\n")]
    once = {" ".join(part.split()): part for part in reversed(paragraphs)}  # the first of several
    return "\n\n".join(reversed(once.values())).encode("ascii", "replace")


def windows(text: bytes, length: int, step: int) -> tuple[Tensor, Tensor]:
    """Return stretches of a text, and the same one symbol later, both of shape (N, length).

    Args:
        text: ASCII.
        length: Symbols of a window, fewer than the text has.
        step: From the start of one window to that of the next.

    Example:
        >>> [part.tolist() for part in windows(bytes([1, 2, 3, 4, 5]), length=2, step=2)]
        [[[1, 2], [3, 4]], [[2, 3], [4, 5]]]
    """
    found = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, length + 1, step)
    return found[:, :-1].contiguous(), found[:, 1:].contiguous()


def split_text(text: bytes, length: int) -> Text:
    """Return the parts of a text in windows of a given length; held-out stretches are spread over it.

    Args:
        text: ASCII.
        length: Symbols of a window, T.

    Example:
        >>> [part[0].shape[1] for part in split_text(topics(), 32)[:3]]
        [32, 32, 32]
    """
    size = -(-len(text) // STRETCHES)
    stretches = [text[i * size : (i + 1) * size] for i in range(STRETCHES)]

    def part(places: Collection[int], step: int) -> tuple[Tensor, Tensor]:
        found = [windows(stretch, length, step) for i, stretch in enumerate(stretches) if i % 10 in places]
        return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])

    train = part(range(8), max(1, length // 2))
    return Text(train, part([8], length), part([9], length), hashlib.sha256(text).hexdigest())
