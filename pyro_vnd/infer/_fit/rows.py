"""Whether the laws that a guide has by row are about the rows of each mini-batch."""

from collections.abc import Iterator
from typing import Any

from pyro.infer.autoguide import AutoGuide, AutoGuideList
from torch import nn

from pyro_vnd._data import Data, as_arguments
from pyro_vnd.infer._conditional.guide import AutoConditional
from pyro_vnd.infer._model_sites import is_mask, run_model
from pyro_vnd.infer.amortised import AutoAmortised
from pyro_vnd.infer.auto_parts import AutoLengths
from pyro_vnd.infer.guides import AutoNested

__all__ = ["check_laws_by_row"]


def check_laws_by_row(model: Any, guide: Any, batch: Data, plate: str, num_data: int, *, validated: bool) -> None:
    """Raise where an autoguide has laws by position in the batch, or for other rows than the model has.

    Args:
        model: The model.
        guide: Its guide, which has been called.
        batch: A batch.
        plate: Name of the plate of the data.
        num_data: Rows of the data set.
        validated: Whether the guide is to be used for rows that were held back.

    Raises:
        ValueError: If it does.
    """
    parts = [part for part in guide.modules() if isinstance(part, AutoGuide)] if isinstance(guide, nn.Module) else []
    frames = {name: frame for part in parts for name, frame in _by_row(part, plate)}
    few = [name for name, frame in frames.items() if (frame.full_size or frame.size) < num_data]
    if few:
        raise ValueError(
            f"fit: the guide has a law for each row of plate {plate!r} at {few}, but mini-batches hold other rows in "
            "each step, so that it would learn one for each position in a batch. Let the rows share it, "
            f'AutoNested(model, shared_plates=["{plate}"]), which holds for masks, or use an encoder; or number the '
            f'rows, i = torch.arange({num_data}) among the data and pyro.plate("{plate}", {num_data}, subsample=i) in '
            "the model; or leave `batch_size` out"
        )
    drawing = [part for part in parts if part.master is None and not isinstance(part, AutoNested)]
    draws = any(part.create_plates is None and _subsamples(part._prototype_frames.get(plate)) for part in drawing)
    if not (draws or (validated and frames)):
        return
    args, kwargs = as_arguments(batch)
    numbered = plate in run_model(model, args, kwargs).rows
    if numbered and draws:
        raise ValueError(
            f"fit: the model says which rows are in plate {plate!r}, by `subsample=`, but the guide draws rows of its "
            "own: give it `create_plates=`, a function of the data that returns that plate, or use AutoNested"
        )
    if validated and frames and not numbered:
        raise ValueError(
            f"fit: argument `validation` is for guides that know what to do with other rows, but this one has a law "
            f"for each row of the data at {[*frames]}"
        )


def _by_row(part: AutoGuide, plate: str) -> Iterator[tuple[str, Any]]:
    """Yield the sites for which a part has a law for each row of a plate, with the plate."""
    prototype: Any = part.prototype_trace
    if prototype is None or isinstance(part, AutoGuideList | AutoAmortised):  # the latter takes any rows
        return
    shared = isinstance(part, AutoLengths | AutoConditional) and plate in part.shared_plates
    for name, site in prototype.iter_stochastic_nodes():
        if not (shared and is_mask(site["fn"])):
            yield from ((name, frame) for frame in site["cond_indep_stack"] if frame.name == plate)


def _subsamples(frame: Any) -> bool:
    return frame is not None and frame.full_size not in (None, frame.size)
