"""What images a model and its guide take."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.autoencoders.pixels import Pixels

__all__ = ["ImageCheck"]


@dataclass(frozen=True)
class ImageCheck:
    """A check of images, which a model shares with its guide: under inference that one sees them first.

    Attributes:
        shape: Shape of an image.
        law: Name of the law of the pixels.
        bounded: Whether pixels must lie in [0, 1].
    """

    shape: tuple[int, ...]
    law: str
    bounded: bool

    @classmethod
    def of(cls, shape: tuple[int, ...], pixels: Pixels) -> "ImageCheck":
        """Return the check of a shape and a law of pixels."""
        return cls(tuple(shape), type(pixels).__name__, pixels.bounded)

    def __call__(self, x: Tensor) -> None:
        """Raise a ValueError if images have the wrong shape or pixels."""
        if not isinstance(x, Tensor) or x.shape[1:] != self.shape or x.dim() != 1 + len(self.shape):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"argument `x` must be images of shape (N, {', '.join(map(str, self.shape))}); got {got}")
        if not len(x):
            return
        low, high = (bound.item() for bound in x.aminmax())
        if not (low > -torch.inf and high < torch.inf):  # NaN is in neither
            raise ValueError("argument `x` must be finite images; got NaN or inf")
        if self.bounded and not (low >= 0 and high <= 1):
            raise ValueError(f"argument `x` must have pixels in [0, 1] for {self.law}; got {low:.4g} to {high:.4g}")
