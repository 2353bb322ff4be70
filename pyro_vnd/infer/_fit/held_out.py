"""The log-likelihood of data that were held back."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask

from pyro_vnd._data import as_arguments, batches_of, check_rows, is_tensors, num_rows
from pyro_vnd.infer._fit.parallel import Ranks
from pyro_vnd.infer._fit.sources import move

__all__ = ["mean_log_likelihood"]


@torch.no_grad()
def mean_log_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    batch_size: int,
    plate: str = "data",
    *,
    device: torch.device | None = None,
    ranks: Ranks | None = None,
) -> float:
    r"""Return the log-likelihood of data at draws of the guide, $\frac1N \sum_n \log p(x_n \mid w), w \sim q$.

    Each batch has one draw of the latents.

    Args:
        model: A Pyro model.
        guide: Its guide.
        data: Data in any of the forms that `fit` takes.
        batch_size: Rows of a batch of tensors, on all processes together; the last one may have fewer.
        plate: Name of the plate over the rows: observed sites in it count, or all of them if none is in it.
        device: Where batches are moved to, or None.
        ranks: The processes, which take the batches in turns.

    Returns:
        Nats per row.

    Raises:
        ValueError: If there are no rows.
    """
    ranks = Ranks() if ranks is None else ranks
    total, count = 0.0, 0
    for i, batch in enumerate(batches_of(data, -(-batch_size // ranks.size))):
        if i % ranks.size != ranks.rank:
            continue
        if not is_tensors(data):  # others are looked at once
            check_rows("fit", batch, "validation", values="cpu")
        args, kwargs = as_arguments(move(batch, device))
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
        sites: list[Any] = [trace.nodes[name] for name in trace.observation_nodes]
        in_plate = [site for site in sites if any(frame.name == plate for frame in site["cond_indep_stack"])]
        for site in in_plate or sites:
            # Without the scale of a plate that is for more rows.
            total += float(scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"]).sum())
        count += num_rows(batch)
    both = ranks.sum(torch.tensor([total, count], dtype=torch.float64)).tolist()
    if both[1] == 0:
        raise ValueError("fit: argument `validation` must have rows each time it is read; got none: is it an iterator?")
    return both[0] / both[1]
