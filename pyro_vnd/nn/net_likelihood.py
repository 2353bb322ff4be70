"""The base of laws of what a net is trained on, and checks that they share."""

from collections.abc import Sequence
from typing import Any, ClassVar

from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vnd._sizes import without_values

__all__ = ["NetLikelihood", "check_shape", "drop_single", "is_rows", "refuse_outputs", "refuse_values"]


class NetLikelihood(nn.Module):
    r"""Base of the laws $p(y_n \mid f(x_n))$ of what a net is trained on; give one to `NestedModel`.

    Whatever a row consists of, outputs, labels, pixels or tokens, its *entries* are independent given the net's outputs
    f(x). Parameters of a law of its own, such as a noise scale, are trained with the net as point estimates.

    Attributes:
        site: Name of the Pyro site.
    """

    site: ClassVar[str] = "y"

    def entries(self, outputs: Tensor, batch_dim: int = 1) -> TorchDistribution:
        """Return the law of each entry of each row.

        Args:
            outputs: Of the net, shape (N, ...), or with draws before the rows, (S, N, ...).
            batch_dim: How many dimensions count rows and draws: 1, or 2.

        Returns:
            A law without event dimensions, whose batch shape is that of the rows and draws, and of a row.
        """
        raise NotImplementedError

    def law(self, outputs: Tensor, batch_dim: int = 1) -> TorchDistribution:
        """Return the law of each row, whose entries are independent; arguments as in `entries`."""
        entries = self.entries(outputs, batch_dim)
        return entries.to_event(len(entries.batch_shape) - batch_dim)

    def check_outputs(self, caller: str, outputs: Any, num_rows: int) -> None:
        """Raise a ValueError if outputs of a net, shape (N, ...), are none that this law can take."""
        raise NotImplementedError

    def targets(self, caller: str, y: Any, outputs: Tensor, *, argument: str = "y", values: bool = True) -> Tensor:
        """Return what is observed in the form in which `law` scores it.

        Args:
            caller: What was given it, for messages.
            y: What is observed, a row for each example.
            outputs: Of the net, shape (N, ...), which passed `check_outputs`.
            argument: Name of the argument.
            values: Whether to look at the values.

        Raises:
            ValueError: If it is nothing of the kind; the message says what came.
        """
        raise NotImplementedError


def refuse_outputs(caller: str, expected: str, outputs: Any, num_rows: int, advice: str = "") -> None:
    """Raise a ValueError that says what a net must return, and what it did."""
    got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    raise ValueError(
        f"{caller}: argument `net` must return {expected}; got {got} for {num_rows} rows. {advice}".strip()
    )


def is_rows(outputs: Any, num_rows: int, least_dim: int = 1) -> bool:
    """Return whether outputs are a tensor with a row for each example."""
    return isinstance(outputs, Tensor) and outputs.dim() >= least_dim and len(outputs) == num_rows


def drop_single(outputs: Tensor, batch_dim: int) -> Tensor:
    """Drop the last dimension of a net that ends in one output: (..., N, 1) to (..., N)."""
    return outputs.squeeze(-1) if outputs.dim() == batch_dim + 1 and outputs.shape[-1] == 1 else outputs


def check_shape(caller: str, argument: str, y: Any, shape: Sequence[int], what: str) -> Tensor:
    """Return y in a shape, of which (N,) and (N, 1) are the same; never broadcast."""
    expected = f"{caller}: argument `{argument}` must be {what}, shape {tuple(shape)} as the net's outputs have it"
    if not isinstance(y, Tensor):
        raise ValueError(f"{expected}; got {type(y).__name__}: give torch.as_tensor({argument})")
    if said := without_values(y):
        raise ValueError(f"{expected}; got {said}")
    if len(shape) == 1:
        y = drop_single(y, 1)
    if y.shape != tuple(shape) or y.is_complex():
        raise ValueError(f"{expected}; got {y.dtype} of shape {tuple(y.shape)}")
    return y


def refuse_values(caller: str, argument: str, what: str, y: Tensor, bad: Tensor) -> None:
    """Raise a ValueError where some values are bad, with the first of them."""
    if bool(bad.any()):
        shown = ", ".join(f"{value:.4g}" for value in y[bad][:3].tolist())
        raise ValueError(
            f"{caller}: argument `{argument}` must be {what}; {int(bad.sum())} of {y.numel()} are not: {shown}"
        )
