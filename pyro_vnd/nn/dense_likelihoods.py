"""Laws of labels of tokens and of pixels, some of which are to be ignored."""

from collections.abc import Sequence, Set
from typing import Any, ClassVar

from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_vnd._sizes import is_integer
from pyro_vnd.nn.label_laws import PartlySeenCategorical
from pyro_vnd.nn.net_likelihood import NetLikelihood, check_shape, is_rows, refuse_outputs, refuse_values

__all__ = ["PixelLabels", "TokenLabels"]


class TokenLabels(NetLikelihood):
    r"""A class for each token of a row: $y_{nt} \sim \mathrm{Categorical}(\mathrm{logits} = f_t(x_n))$.

    The net returns logits, shape (N, T, C); labels are integers from 0 to C - 1, shape (N, T). Of a language model they
    are the tokens that come next. Labels to be ignored score nothing: padding, and what is not to be predicted.

    Args:
        ignore_index: The label, or labels, to be ignored: the index of the padding, say, and torch's -100.

    Raises:
        ValueError: If it is no integer or integers.

    Example:
        >>> import torch
        >>> law = TokenLabels(ignore_index=0).law(torch.zeros(2, 3, 5))
        >>> law.log_prob(torch.tensor([[1, 4, 2], [3, 0, 0]]))  # 3 log 5 and log 5
        tensor([-4.8283, -1.6094])
    """

    site = "label"
    class_dim: ClassVar[int] = -1  # counted from the end, or from the rows

    def __init__(self, ignore_index: int | Sequence[int] = -100) -> None:
        super().__init__()
        ignored: Any = [ignore_index] if is_integer(ignore_index) else ignore_index
        is_list = isinstance(ignored, Sequence | Set) and not isinstance(ignored, str | bytes)
        if not is_list or not all(is_integer(index) and -(2**63) <= index < 2**63 for index in ignored):
            raise ValueError(
                f"{type(self).__name__}: argument `ignore_index` must be an integer or integers; got {ignore_index!r}"
            )
        self.ignored = tuple(map(int, ignored))

    def by_entry(self, outputs: Tensor, batch_dim: int = 1) -> Tensor:
        """Return logits with the classes last; arguments as in `entries`."""
        return outputs if self.class_dim < 0 else outputs.movedim(self.class_dim + batch_dim - 1, -1)

    def seen(self, y: Tensor) -> Tensor:
        """Return which labels are not to be ignored, a bool for each."""
        return PartlySeenCategorical.is_seen(y, self.ignored)

    def entries(self, outputs: Tensor, batch_dim: int = 1) -> TorchDistribution:
        """Return the law of each label; it gives those to be ignored a log-probability of zero."""
        return PartlySeenCategorical(self.by_entry(outputs, batch_dim), self.ignored)

    def check_outputs(self, caller: str, outputs: Any, num_rows: int) -> None:
        """Raise a ValueError unless outputs are logits of two or more classes for each token."""
        if not (is_rows(outputs, num_rows) and outputs.dim() == 3 and outputs.shape[-1] > 1):
            refuse_outputs(caller, "logits of shape (N, T, C), of two or more classes a token", outputs, num_rows)

    def targets(self, caller: str, y: Any, outputs: Tensor, *, argument: str = "y", values: bool = True) -> Tensor:
        """Return labels as integers."""
        *shape, num_classes = self.by_entry(outputs).shape
        ignored = f" or {', '.join(map(str, self.ignored))}" if self.ignored else ""
        what = f"classes, integers from 0 to {num_classes - 1}{ignored}"
        y = check_shape(caller, argument, y, shape, what)
        if y.is_floating_point():
            raise ValueError(f"{caller}: argument `{argument}` must be {what}; got {y.dtype}: give {argument}.long()")
        y = y.long()
        if values:
            refuse_values(caller, argument, what, y, self.seen(y) & ((y < 0) | (y >= num_classes)))
        return y


class PixelLabels(TokenLabels):
    r"""A class for each pixel: $y_{nij} \sim \mathrm{Categorical}(\mathrm{logits} = f_{\cdot ij}(x_n))$.

    The net returns logits with the classes in dimension 1, shape (N, C, H, W), or (N, C, ...) of any grid; labels are
    integers from 0 to C - 1, shape (N, H, W). Those to be ignored, such as the 255 of many data sets, score nothing.

    Args:
        ignore_index: The label, or labels, to be ignored.

    Raises:
        ValueError: If it is no integer or integers.

    Example:
        >>> import torch
        >>> PixelLabels(ignore_index=255).law(torch.zeros(2, 5, 4, 4)).event_shape
        torch.Size([4, 4])
    """

    class_dim = 1

    def check_outputs(self, caller: str, outputs: Any, num_rows: int) -> None:
        """Raise a ValueError unless outputs are logits of two or more classes for each pixel."""
        if not (is_rows(outputs, num_rows) and outputs.dim() > 2 and outputs.shape[1] > 1):
            refuse_outputs(caller, "logits of shape (N, C, H, W), of two or more classes a pixel", outputs, num_rows)
