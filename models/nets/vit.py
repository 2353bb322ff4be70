"""Vision transformer."""

import torch
from torch import Tensor, nn

from models.sizes import check_sizes


class PatchEmbedding(nn.Module):
    """Embeds an image's patches, puts a class token before them, and adds the positions.

    Args:
        in_channels: Channels of an image, C.
        dim: Size of a token, D.
        patch: Height and width of a patch, P.
        num_patches: Number of patches in an image.
    """

    def __init__(self, in_channels: int, dim: int, patch: int, num_patches: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.position = nn.Parameter(torch.empty(1, 1 + num_patches, dim))
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens, shape (N, 1 + num_patches, D), of images, shape (N, C, H, W)."""
        patches = torch.flatten(self.embed(x), 2).transpose(1, 2)
        first = self.class_token.expand(x.shape[0], -1, -1)
        return torch.cat([first, patches], 1) + self.position


class Block(nn.Module):
    r"""Pre-norm block, $u = x + \mathrm{attention}(\mathrm{norm}(x))$, $y = u + \mathrm{mlp}(\mathrm{norm}(u))$.

    Args:
        dim: Size of a token, D.
        heads: Number of attention heads.
        hidden: Hidden units of the MLP.
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape, (N, T, D)."""
        tokens = self.norm1(x)
        x = x + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ClassToken(nn.Module):
    """Picks the first of the tokens, shape (N, T, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return it, shape (N, D)."""
        return x[:, 0]


def vit(
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int = 32,
    patch: int = 4,
    dim: int = 192,
    depth: int = 12,
    heads: int = 3,
    mlp_ratio: int = 4,
) -> nn.Sequential:
    """Vision transformer with a class token, of the size "tiny", with patches for small images.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929; the size is that of DeiT-Ti
    (Touvron et al., arXiv 2012.12877).

    Args:
        in_channels: Channels of an image, C.
        num_classes: Number of classes, K.
        image_size: Height and width of an image, S.
        patch: Height and width of a patch, which divides the image's.
        dim: Size of a token, which the number of heads divides.
        depth: Number of blocks.
        heads: Number of attention heads.
        mlp_ratio: Hidden units of each block's MLP, in multiples of `dim`.

    Returns:
        A net from images, shape (N, C, S, S), to logits, shape (N, K).

    Raises:
        ValueError: If a size is not positive, or does not divide what it has to.

    Example:
        >>> import torch
        >>> vit(1, image_size=8, dim=32, depth=2, heads=4)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    check_sizes("vit", in_channels=in_channels, num_classes=num_classes, image_size=image_size, patch=patch)
    check_sizes("vit", dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
    if image_size % patch:
        raise ValueError(f"vit: argument `patch` must divide the image's size, {image_size}; got {patch}")
    if dim % heads:
        raise ValueError(f"`heads` must divide `dim`, {dim}; got {heads}")
    return nn.Sequential(
        PatchEmbedding(in_channels, dim, patch, (image_size // patch) ** 2),
        *(Block(dim, heads, mlp_ratio * dim) for _ in range(depth)),
        nn.LayerNorm(dim),
        ClassToken(),
        nn.Linear(dim, num_classes),
    )
