"""What images a model takes."""

import math
import warnings

import torch
from torch import Tensor

from pyro_vnd._inputs import Look, check_dtype
from pyro_vnd._sizes import without_values

__all__ = ["ImageCheck"]

_FAR_FROM_ONE = 30.0  # a hundred times the noise at which likelihoods start; bytes reach 255


class ImageCheck:
    """A check of images, which a model shares with its guide: under inference that one sees them first.

    Args:
        model: Name of the model, for messages.
        shape: Shape of an image.
        bounded_by: Name of the likelihood that wants pixels in [0, 1], None if they are free.

    Attributes:
        look: Whether the values of images are due in an evaluation.
    """

    def __init__(self, model: str, shape: tuple[int, ...], bounded_by: str | None = None) -> None:
        self.model, self.shape, self.bounded_by, self.look = model, shape, bounded_by, Look()

    def __call__(self, x: Tensor, dtype: torch.dtype) -> None:
        """Raise a ValueError if images have a shape, a type or pixels that the model does not take.

        Args:
            x: The images.
            dtype: Type of the model's parameters.
        """
        self._check_type(x, dtype)
        self._check_values(x)

    def in_evaluation(self, x: Tensor, dtype: torch.dtype) -> None:
        """Do the same in an evaluation of model or guide, where values are looked at when it is due.

        Warns:
            UserWarning: If free pixels are far from one, the size at which weights and noise start.
        """
        self._check_type(x, dtype)
        if not len(x):
            raise ValueError(f"{self.model}: argument `x` must have one image at least; got shape {tuple(x.shape)}")
        if not self.look.is_due(x):
            return
        low, high = self._check_values(x)
        if not self.look.done and max(-low, high) > _FAR_FROM_ONE:
            warnings.warn(
                f"{self.model}: images have pixels from {low:.4g} to {high:.4g}; weights and noise start for values "
                "near one. Scale them: bytes to [0, 1] by x / 255, anything else to a deviation of one",
                stacklevel=2,
            )
        self.look.done = True

    def _check_type(self, x: Tensor, dtype: torch.dtype) -> None:
        expected = f"{self.model}: argument `x` must be images of shape (N, {', '.join(map(str, self.shape))})"
        if not isinstance(x, Tensor):
            raise ValueError(f"{expected}; got {type(x).__name__}: give a tensor, torch.as_tensor(x)")
        if said := without_values(x):
            raise ValueError(f"{expected}, dense ones; got {said}")
        if x.dim() != 1 + len(self.shape) or x.shape[1:] != self.shape:
            raise ValueError(f"{expected}; got {tuple(x.shape)}{self._advice(x)}")
        check_dtype(f"{self.model}: argument `x` must be images", x, dtype)

    def _advice(self, x: Tensor) -> str:
        if x.shape == self.shape:
            return ": of a single image give x[None]"
        if x.dim() == 4 and len(self.shape) == 3 and x.movedim(-1, 1).shape[1:] == self.shape:
            return ": channels come first, x.movedim(-1, 1)"
        if x.dim() and len(x) and x.shape[1:].numel() == math.prod(self.shape):
            return f": give x.reshape(-1, {', '.join(map(str, self.shape))})"
        return ""

    def _check_values(self, x: Tensor) -> tuple[float, float]:
        if not len(x):
            return 0.0, 0.0
        low, high = (bound.item() for bound in x.aminmax())
        if not (low > -torch.inf and high < torch.inf):  # NaN is in neither
            raise ValueError(f"{self.model}: argument `x` must be finite images; got NaN or inf")
        if self.bounded_by is not None and not (low >= 0 and high <= 1):
            scaled = ": give x / 255" if low >= 0 and 2 < high <= 255 else ""
            raise ValueError(
                f"{self.model}: argument `x` must have pixels in [0, 1] for {self.bounded_by}; got {low:.4g} to "
                f"{high:.4g}{scaled}"
            )
        return low, high
