"""What a fit sets on the masks of its modules: where they come from in a step, and their temperature."""

from collections.abc import Container, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vnd.distributions import NestedLaw, OrderedMask
from pyro_vnd.distributions.masks import Cut
from pyro_vnd.infer._fit.handlers import ElboMonitor
from pyro_vnd.infer.guides import _AutoMask
from pyro_vnd.infer.schedules import MaskSchedule
from pyro_vnd.nn import NestedNet, Width

__all__ = ["MaskCuts", "find_masks", "nested_laws"]


class MaskCuts:
    """Cut the nested nets and the codes of a model as a `MaskSchedule` says, anew in each step.

    Args:
        schedule: Where masks come from.
        objects: Model and guide, whose parts are searched for nets.
        plate: Name of the plate of the data. Sites of the guide in it are codes, and are cut, if their law is a
            `NestedNormal` or an `OrderedMask` that is not enumerated, and no mask of a net.

    Attributes:
        t: Where the fit stands, from 0 to 1.
    """

    def __init__(self, schedule: MaskSchedule, objects: Iterable[Any], plate: str) -> None:
        self.schedule, self.sliced, self.plate = schedule, schedule.sliced, plate
        nets = _parts(objects, NestedNet)
        self.of_nets = {name for net in nets for name in net.laws}
        self.by_example = [net for net in nets if net.mask_per == "example"]
        self.by_batch = [net for net in nets if net.mask_per == "batch"]
        self.codes: dict[str, int] = {}
        self.t = 0.0

    def find_codes(self, monitor: ElboMonitor) -> None:
        """Take note of the codes of the guide and the number of their units.

        Args:
            monitor: It has seen an evaluation of the ELBO.

        Raises:
            ValueError: If there is neither a code nor a nested net.
        """
        self.codes = {
            name: monitor.laws[name].num_units
            for name, plates in monitor.plates.items()
            if self.plate in plates and name not in self.of_nets
        }
        if not (self.codes or self.by_example or self.by_batch):
            raise ValueError(
                "fit: argument `schedule` needs a NestedNet in model or guide, or a NestedNormal or an OrderedMask in "
                f"the plate {self.plate!r}, and found none. Make the model an nn.Module that holds the net "
                "(`NestedClassifier(net)` does), or, for masks of your own that are outside the plate, enumerated or "
                "wrapped, mix their law with a fixed one in model and guide"
            )

    def draw(self, num_rows: int) -> list[AbstractContextManager[None]]:
        """Draw the widths of one step.

        One draw a row holds for all codes and nets with a mask an example, and one for the whole batch for the others;
        for all nets if passes are sliced, which takes one width.

        Args:
            num_rows: Rows of the batch.

        Returns:
            A context for each particle of the schedule, in which nets and codes are cut.
        """
        nets_by_row = [] if self.sliced else self.by_example
        nets_by_batch = self.by_batch + (self.by_example if self.sliced else [])
        rows = batch = None
        if nets_by_row or self.codes:
            num_blocks = max([*_num_blocks(nets_by_row), *self.codes.values()])
            rows = self.schedule.draw(num_blocks, (num_rows,), self.t)
        if nets_by_batch:
            batch = self.schedule.draw(max(_num_blocks(nets_by_batch)), t=self.t).tolist()
        return [
            self._cut(None if rows is None else rows[particle], 0 if batch is None else batch[particle])
            for particle in range(self.schedule.num_particles)
        ]

    @contextmanager
    def _cut(self, rows: Tensor | None, fraction: float) -> Iterator[None]:
        with ExitStack() as stack:
            for net in self.by_example + self.by_batch:
                if rows is not None and net.mask_per == "example" and not self.sliced:
                    stack.enter_context(net.cut(rows.to(next(net.parameters()).device)))
                elif fraction > 0:
                    stack.enter_context(net.cut(fraction, sliced=self.sliced))
            if rows is not None and self.codes:
                stack.enter_context(_CutCodes(rows, self.codes))
            yield


class _CutCodes(Messenger):
    """Give the codes of each row a length, in model and guide alike: its KL is then zero."""

    def __init__(self, rows: Tensor, codes: Container[str]) -> None:
        super().__init__()
        self.rows, self.codes = rows, codes
        self.cuts: dict[tuple[int, torch.Size], Cut] = {}  # the same for model and guide

    def _pyro_sample(self, msg: Any) -> None:
        law = msg["fn"]
        if msg["name"] in self.codes and isinstance(law, NestedLaw | OrderedMask):
            key = law.num_units, law.batch_shape
            if key not in self.cuts:
                lengths = (self.rows * law.num_units + 0.5).long()  # rounded as by `Width`, which keeps at least one
                lengths = torch.maximum(lengths, self.rows > 0)
                self.cuts[key] = Cut(lengths, law.mask_law if isinstance(law, NestedLaw) else law)
            msg["fn"] = law._cut_by(self.cuts[key])
            msg["infer"]["uncut"] = law  # for the record


def find_masks(objects: Iterable[Any]) -> list[Any]:
    """Return the parts of modules whose masks have a temperature: those of `AutoNested` and of nested nets."""
    return _parts(objects, _AutoMask | Width)


def nested_laws(objects: Iterable[Any]) -> dict[str, OrderedMask]:
    """Return the laws of all nested nets as they are now, also of masks that the last steps did not draw."""
    return {name: law for net in _parts(objects, NestedNet) for name, law in net.laws.items()}


def _parts(objects: Iterable[Any], kind: Any) -> list[Any]:
    modules = (part for root in objects if isinstance(root, nn.Module) for part in root.modules())
    return list(dict.fromkeys(part for part in modules if isinstance(part, kind)))


def _num_blocks(nets: list[NestedNet]) -> list[int]:
    return [width.num_blocks for net in nets for width in net.widths.values()]
