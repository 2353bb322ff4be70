"""What a fit sets on the masks of its modules: where they come from in a step, and their temperature."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer.auto_nested import _AutoMask
from pyro_vnd.infer.schedules import MaskSchedule
from pyro_vnd.nn import NestedNet, Width

__all__ = ["MaskCuts", "find_masks", "nested_laws"]


class MaskCuts:
    """Cut the nested nets of a model as a `MaskSchedule` says, anew in each step.

    Args:
        schedule: Where masks come from.
        sliced: Whether nets compute only what is kept of them where their width is given.
        objects: Model and guide, whose parts are searched for nets.

    Raises:
        ValueError: If there is no nested net among them.
    """

    def __init__(self, schedule: MaskSchedule, sliced: bool, objects: Iterable[Any]) -> None:
        self.schedule, self.sliced = schedule, sliced
        nets = _parts(objects, NestedNet)
        if not nets:
            raise ValueError(
                "fit: argument `masks` needs a NestedNet in model or guide, and found none. Make the model an "
                "nn.Module that holds the net (`NestedClassifier(net)` does), or, for masks of your own, mix their law "
                "with a fixed one in model and guide"
            )
        self.by_example = [net for net in nets if net.masks == "example"]
        self.by_batch = [net for net in nets if net.masks == "batch"]

    def draw(self, num_rows: int) -> list[AbstractContextManager[None]]:
        """Draw the widths of one step.

        One draw a row holds for all nets with a mask an example, and one for the whole batch for the others; for all
        nets if passes are sliced, which takes one width.

        Args:
            num_rows: Rows of the batch.

        Returns:
            A context for each particle of the schedule, in which the nets are cut.
        """
        by_row = self.by_example and not self.sliced
        by_batch = self.by_batch or self.sliced
        rows = self.schedule.draw(_num_blocks(self.by_example), (num_rows,)) if by_row else None
        batch = self.schedule.draw(_num_blocks(self.by_batch + self.by_example)).tolist() if by_batch else None
        return [
            self._cut(None if rows is None else rows[particle], 0 if batch is None else batch[particle])
            for particle in range(self.schedule.num_particles)
        ]

    @contextmanager
    def _cut(self, rows: Tensor | None, fraction: float) -> Iterator[None]:
        with ExitStack() as stack:
            for net in self.by_example + self.by_batch:
                if rows is not None and net.masks == "example":
                    stack.enter_context(net.cut(rows.to(next(net.parameters()).device)))
                elif fraction > 0:
                    stack.enter_context(net.cut(fraction, sliced=self.sliced))
            yield


def find_masks(objects: Iterable[Any]) -> list[Any]:
    """Return the parts of modules whose masks have a temperature: those of `AutoNested` and of nested nets."""
    return _parts(objects, _AutoMask | Width)


def nested_laws(objects: Iterable[Any]) -> dict[str, OrderedMask]:
    """Return the laws of all nested nets as they are now, also of masks that the last steps did not draw."""
    return {name: law for net in _parts(objects, NestedNet) for name, law in net.laws.items()}


def _parts(objects: Iterable[Any], kind: Any) -> list[Any]:
    modules = (part for root in objects if isinstance(root, nn.Module) for part in root.modules())
    return list(dict.fromkeys(part for part in modules if isinstance(part, kind)))


def _num_blocks(nets: list[NestedNet]) -> int:
    return max(width.num_groups for net in nets for width in net.widths.values())
