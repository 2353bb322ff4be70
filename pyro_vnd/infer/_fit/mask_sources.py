"""The masks of the modules of a fit: where they come from in a step, which have a temperature, and their laws."""

from collections.abc import Container, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.distributions.masks import Cut
from pyro_vnd.distributions.nested import NestedLaw
from pyro_vnd.infer._fit.handlers import EvaluationRecord
from pyro_vnd.infer.auto_parts import AutoMask, AutoNestedNormal
from pyro_vnd.infer.elbo import conditional_part
from pyro_vnd.infer.result import LearnedLaw
from pyro_vnd.infer.schedules import MaskSchedule, PriceSchedule
from pyro_vnd.nn import NestedNet, Width
from pyro_vnd.nn.width import nearest

__all__ = ["MaskCuts", "conditional_laws", "nested_laws", "parts_with_temperature"]


class MaskCuts:
    """Cut the nested nets and the codes of a model as a `MaskSchedule` says, anew in each step.

    Args:
        schedule: Where masks come from.
        objects: Model and guide, whose parts are searched for nets.
        record: What was seen in an evaluation of the ELBO.
        plate: Name of the plate of the data. Sites of the guide in it are codes, and are cut, if their law is a
            `NestedNormal` or an `OrderedMask` that is not enumerated, and no mask of a net.

    Raises:
        ValueError: If there is neither a code nor a nested net.
    """

    def __init__(
        self, schedule: MaskSchedule | PriceSchedule, objects: Iterable[Any], record: EvaluationRecord, plate: str
    ) -> None:
        self.schedule, self.sliced, self.plate = schedule, schedule.sliced, plate
        nets = _parts(objects, NestedNet)
        self.by_example = [net for net in nets if net.mask_per == "example"]
        self.by_batch = [net for net in nets if net.mask_per == "batch"]
        in_nets = {name for net in nets for name in net.laws}
        self.codes = {
            name: record.laws[name].law.num_units
            for name, plates in record.plates.items()
            if plate in plates and name not in in_nets
        }
        if not (self.codes or nets):
            raise ValueError(
                "fit: argument `schedule` needs a NestedNet in model or guide, or a NestedNormal or an OrderedMask in "
                f"the plate {plate!r}, and found none. Make the model an nn.Module that holds the net "
                "(`NestedClassifier(net)` does), or, for masks of your own that are outside the plate, enumerated or "
                "wrapped, mix their law with a fixed one in model and guide"
            )

    def draw(self, num_rows: int, t: float) -> list[AbstractContextManager[None]]:
        """Draw the widths of one step.

        One draw a row holds for all codes and nets with a mask an example, and one for the whole batch for the others;
        for all nets if passes are sliced, which takes one width.

        Args:
            num_rows: Rows of the batch.
            t: How far the fit is, from 0 to 1.

        Returns:
            A context for each particle of the schedule, in which nets and codes are cut.
        """
        nets_by_row = [] if self.sliced else self.by_example
        nets_by_batch = self.by_batch + (self.by_example if self.sliced else [])
        rows = batch = None
        if nets_by_row or self.codes:
            num_blocks = max([*_num_blocks(nets_by_row), *self.codes.values()])
            rows = self.schedule.draw(num_blocks, (num_rows,), t)
        if nets_by_batch:
            batch = self.schedule.draw(max(_num_blocks(nets_by_batch)), t=t).tolist()
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
                    stack.enter_context(net.cut(fraction, sliced=self.sliced, rounding="nearest"))
            if rows is not None and self.codes:
                stack.enter_context(_CutCodes(rows, self.codes, self.plate))
            yield


class _CutCodes(Messenger):
    """Give the codes of each row a length, in model and guide alike: its KL is then zero."""

    def __init__(self, rows: Tensor, codes: Container[str], plate: str) -> None:
        super().__init__()
        self.rows, self.codes, self.plate = rows, codes, plate
        self.cuts: dict[tuple[int, torch.Size], Cut] = {}  # the same for model and guide

    def _pyro_sample(self, msg: Any) -> None:
        law = msg["fn"]
        if msg["name"] in self.codes and isinstance(law, NestedLaw | OrderedMask):
            key = law.num_units, law.batch_shape
            if key not in self.cuts:
                lengths = nearest(self.rows, law.num_units).long()
                lengths = torch.maximum(lengths, self.rows > 0)  # at least one, as in a net
                inner = next(-frame.dim - 1 for frame in msg["cond_indep_stack"] if frame.name == self.plate)
                lengths = lengths.reshape(-1, *[1] * inner)
                self.cuts[key] = Cut(lengths, law.mask_law if isinstance(law, NestedLaw) else law)
            msg["fn"] = law._cut_by(self.cuts[key])
            msg["infer"] = msg["infer"] | {"uncut": law}  # for the record


def parts_with_temperature(objects: Iterable[Any]) -> list[Any]:
    """Return the parts of modules whose masks have a temperature: those of `AutoNested` and of nested nets.

    Raises:
        ValueError: If there are none.
    """
    parts = _parts(objects, AutoMask | AutoNestedNormal | Width)
    if not parts:
        raise ValueError(
            "fit: argument `schedule` has a temperature, which is for masks of AutoNested or a nested "
            "net; there are none"
        )
    return parts


def nested_laws(objects: Iterable[Any]) -> dict[str, LearnedLaw]:
    """Return the laws of all nested nets as they are now, also of masks that the last steps did not draw."""
    return {
        name: LearnedLaw(law, width.prior)
        for net in _parts(objects, NestedNet)
        for (name, law), width in zip(net.laws.items(), net.widths.values(), strict=True)
    }


def conditional_laws(guide: Any) -> dict[str, LearnedLaw]:
    """Return the laws of lengths of a guide whose other latents know them, as they are now; none of other guides."""
    part = conditional_part(guide)
    if part is None:
        return {}
    priors = {each.name: each.prior for each in part.plan.lengths}
    return {name: LearnedLaw(law, priors[name]) for name, law in part.laws().items()}


def _parts(objects: Iterable[Any], kind: Any) -> list[Any]:
    modules = (part for root in objects if isinstance(root, nn.Module) for part in root.modules())
    return list(dict.fromkeys(part for part in modules if isinstance(part, kind)))


def _num_blocks(nets: list[NestedNet]) -> list[int]:
    return [width.num_blocks for net in nets for width in net.widths.values()]
