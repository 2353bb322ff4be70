"""The log-likelihood of data that were held back."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask

from pyro_vnd._data import Data, as_arguments, named_parts, num_rows, split_rows
from pyro_vnd._state import cuda_devices, module_mode

__all__ = ["mean_log_likelihood"]


@torch.no_grad()
def mean_log_likelihood(
    model: Callable[..., Any], guide: Callable[..., Any], data: Data, batch_size: int, plate: str = "data"
) -> float:
    r"""Return the log-likelihood of data at draws of the guide, $\frac1N \sum_n \log p(x_n \mid w), w \sim q$.

    Each batch has one draw of the latents. Modules are in evaluation mode, and the random numbers that the draws take
    are given back, so that a fit is the same with and without it.

    Args:
        model: A Pyro model.
        guide: Its guide.
        data: Tensors with the same number of rows.
        batch_size: Rows of a batch; the last one may have fewer.
        plate: Name of the plate over the rows: observed sites in it count, or all of them if none is in it.

    Returns:
        Nats per row.
    """
    total: Any = 0.0
    devices = cuda_devices([model, guide, *named_parts(data).values()])
    with torch.random.fork_rng(devices), module_mode([model, guide], training=False):
        for batch in split_rows(data, batch_size):
            args, kwargs = as_arguments(batch)
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
            trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
            sites: list[Any] = [trace.nodes[name] for name in trace.observation_nodes]
            in_plate = [site for site in sites if any(frame.name == plate for frame in site["cond_indep_stack"])]
            for site in in_plate or sites:
                # Without the scale of a plate that is for more rows.
                total += scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"]).sum()
    return float(total) / num_rows(data)
