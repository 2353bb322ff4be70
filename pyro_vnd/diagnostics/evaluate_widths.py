"""A nested net scored at many widths."""

from collections.abc import Mapping, Sequence

import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_vnd.diagnostics.evaluate import Predict, Rows, batches, evaluate, net_cost
from pyro_vnd.infer import module_local_params
from pyro_vnd.nn import NestedNet, narrow, recalibrate_batchnorm
from pyro_vnd.nn.mode import module_mode

__all__ = ["check_widths", "evaluate_learned", "evaluate_widths", "first_input", "narrow_draws"]

_WITHOUT_WIDTH = ["prevalence", "score_limit"]


def evaluate_widths(
    net: NestedNet,
    loader: Rows,
    widths: Sequence[float] | Sequence[int],
    num_samples: int = 20,
    ood: Mapping[str, Rows] | None = None,
    *,
    calibrate: Rows | None = None,
    recalibrate: Rows | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
) -> xr.Dataset:
    """Score a nested net at each of several widths, with the same draws of the weights for all of them.

    What is scored are the narrowed nets, one for each draw: memory holds S of them at a time.

    Args:
        net: A trained nested net, whose outputs are logits.
        loader: Test data, as in `evaluate`.
        widths: What `net.cut` takes for a whole net: fractions in (0, 1], or numbers of blocks.
        num_samples: Number of draws S of the weights.
        ood: Test data from outside the domain by name, as in `evaluate`.
        calibrate: Validation data, as in `evaluate`; each width gets a temperature of its own.
        recalibrate: Training inputs, for nets with BatchNorm: each draw at each width gets statistics of its own from
            them, as `recalibrate_batchnorm` does, instead of those of all widths together.
        seed: Seed of the draws, and the coordinate of the result: give each fit its own.
        batch_size: Rows of a batch, where data are tensors.
        progress: Whether to show a progress bar.

    Returns:
        The variables of `evaluate`, with dimensions (seed, width, ...), and `multiply_adds` for one row and
        `parameters` of the narrowed net (seed, width). Join fits by `xr.concat(datasets, "seed")`.

    Raises:
        ValueError: If a width is invalid, in the words of `net.cut`, or fractions and numbers of blocks are mixed, if
            there are no draws, or as in `evaluate`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_vnd.nn import nest
        >>> net = nest(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(1, 4), num_groups=4)
        >>> data = torch.randn(50, 4), torch.arange(50) % 3
        >>> result = evaluate_widths(net, data, [0.25, 0.5, 1.0], num_samples=3, progress=False)
        >>> result["nll"].dims, result["parameters"].values.tolist()
        (('seed', 'width'), [[19, 35, 67]])
    """
    check_widths("evaluate_widths", net, widths)
    if num_samples < 1:
        raise ValueError(f"evaluate_widths: `num_samples` must be at least 1; got {num_samples}")
    device = next(net.parameters()).device
    example = first_input("evaluate_widths: `loader`", loader).to(device)
    results = []
    with module_mode([net], training=False):
        for width in tqdm(widths, desc="widths", disable=not progress):
            nets = narrow_draws(net, width, example, num_samples, seed)
            if recalibrate is not None:
                for cut_net in nets:
                    recalibrate_batchnorm(cut_net, (batch[0].to(device) for batch in batches(recalibrate, batch_size)))
            result = evaluate(
                _stacked(nets),
                loader,
                ood=ood,
                calibrate=calibrate,
                seed=seed,
                batch_size=batch_size,
                device=device,
                progress=progress,
            )
            cost = net_cost(nets[0], example)
            results.append(result.assign({name: ("seed", [value], _LABELS[name]) for name, value in cost.items()}))
    fixed = [name for name in _WITHOUT_WIDTH if name in results[0]]
    joined = xr.concat([result.drop_vars(fixed) for result in results], "width", data_vars="all")
    units = "blocks" if isinstance(widths[0], int) else "share of the units"
    joined = joined.assign(results[0][fixed]).assign_coords(width=("width", list(widths), {"units": units}))
    return joined.transpose("seed", "width", ...)


def evaluate_learned(
    net: NestedNet,
    loader: Rows,
    num_samples: int = 20,
    ood: Mapping[str, Rows] | None = None,
    *,
    calibrate: Rows | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
) -> xr.Dataset:
    """Score the predictive of a nested net that averages over the learned law of the widths, too.

    Each draw of the weights comes with draws of the masks from their posterior, one for each row or one for the batch
    as the net has it.

    Args:
        net: A trained nested net, whose outputs are logits.
        loader: Test data, as in `evaluate`.
        num_samples: Number of draws S of weights and masks.
        ood: Test data from outside the domain by name, as in `evaluate`.
        calibrate: Validation data, as in `evaluate`.
        seed: Seed of the draws, and the coordinate of the result.
        batch_size: Rows of a batch, where data are tensors.
        progress: Whether to show a progress bar.

    Returns:
        The variables of `evaluate`, with dimensions (seed, ...) and no width.

    Raises:
        ValueError: As in `evaluate`.
    """
    with module_mode([net], training=False):
        return evaluate(
            lambda x: net.predict(x, num_samples=num_samples),
            loader,
            ood=ood,
            calibrate=calibrate,
            seed=seed,
            batch_size=batch_size,
            device=next(net.parameters()).device,
            progress=progress,
        )


_LABELS = {
    "multiply_adds": {"long_name": "multiply-adds", "units": "per row"},
    "parameters": {"long_name": "parameters of the narrowed net", "units": "1"},
}


def check_widths(name: str, net: NestedNet, widths: Sequence[float] | Sequence[int]) -> None:
    """Raise a ValueError if the net cannot be cut to each of the widths: before hours go into the others."""
    if len(widths) == 0 or len({type(width) for width in widths}) > 1:
        raise ValueError(f"{name}: `widths` must be fractions (floats) or numbers of blocks (ints); got {list(widths)}")
    for width in widths:
        with net.cut(width):
            pass


def first_input(argument: str, data: Rows) -> Tensor:
    """Return the first row of the inputs; a loader that shuffles leaves the caller's random state as it was."""
    with torch.random.fork_rng():
        for batch in batches(data, 1):
            return batch[0][:1]
    raise ValueError(f"{argument} has no rows")


def narrow_draws(net: NestedNet, width: float, example: Tensor, num_samples: int, seed: int) -> list[nn.Module]:
    """Draw whole weights, the same whatever the width, and cut the net with each draw of them."""
    nets = []
    with torch.random.fork_rng(), module_local_params(net), net.cut(1.0):
        torch.manual_seed(seed)
        for _ in range(num_samples):
            nets.append(narrow(net, width, net.posterior(example)))
    return nets


def _stacked(nets: Sequence[nn.Module]) -> Predict:
    return lambda x: torch.stack([net(x) for net in nets])
