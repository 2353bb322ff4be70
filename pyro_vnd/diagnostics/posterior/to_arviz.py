"""Fits as ArviZ data: draws of posterior, prior and predictions, and their scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from tqdm.auto import tqdm

from pyro_vnd._data import Data, as_arguments, batches_of, check_call, check_whole, is_tensors, named_parts
from pyro_vnd._sizes import is_integer
from pyro_vnd._state import cuda_devices, module_mode, random_numbers
from pyro_vnd.diagnostics.posterior._arviz import from_groups, weights_and_khat
from pyro_vnd.diagnostics.posterior.draws import Draws
from pyro_vnd.diagnostics.posterior.draws_file import DrawsFile
from pyro_vnd.diagnostics.posterior.names import plain
from pyro_vnd.diagnostics.posterior.runs import Kept, Runs
from pyro_vnd.infer import module_local_params

__all__ = ["to_arviz"]

Program = Callable[..., Any]


@torch.no_grad()
def to_arviz(
    model: Program | Sequence[Program],
    guide: Program | Sequence[Program],
    data: Data = (),
    *,
    num_samples: int = 500,
    num_prior: int | None = None,
    predictive: bool = True,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    sites: Sequence[str] | None = None,
    path: str | Path | None = None,
    batch_size: int = 256,
    plate: str = "data",
    parallel: bool = False,
    progress: bool = False,
    seed: int | None = 0,
) -> Any:
    r"""Draw from a guide and its model, and score the draws, for ArviZ.

    | group | variables |
    |---|---|
    | `posterior` | latent sites, drawn from the guide, and `pyro.deterministic` ones |
    | `prior` | the same, drawn from the model |
    | `posterior_predictive` | observed sites, drawn anew given the latents, and latent ones that the guide lacks |
    | `prior_predictive` | the same, given draws of the prior |
    | `log_likelihood` | of observed sites by row, in nats, without `scale`; NaN where the model masks it |
    | `observed_data`, `constant_data` | observed sites; the argument of that name |
    | `sample_stats` | scores of draws |

    A mask site is there twice, as `name` with dimension `name_unit`, counted from 1, and as its kept length
    `name_length`; likewise a `NestedNormal` site. Where the law of the lengths is the same in all draws of a fit, and
    for all rows, the attribute `law` of `name_length` has its K probabilities, fit after fit. Sites that
    `poutine.reparam` has made functions of others are deterministic. Plates name dimensions. In all names "/" and ":",
    which xarray and netCDF refuse, become ".". A plate that subsamples keeps the rows of the first draw. With several
    fits each is a chain, so that R-hat tells whether they agree.

    The scores are `log_p`, the log-joint $\log p(y, z)$ with the scales of the model, `log_q`, $\log q(z)$, and
    `elbo`, their difference, whose mean over draws is the ELBO, all in nats; `weight`, the importance weight
    $p(y, z) / q(z)$, Pareto-smoothed and normalised to sum to one in each chain; and for each chain `khat`, which says
    whether guide and weights can be trusted (below 0.7) or not; it takes 30 draws or more. A latent site that the guide
    lacks is a prediction, such as the labels of rows without labels, and no part of the scores. Rows of a latent site
    that the model hides by a mask are no part of `log_q` either, and `log_q` has the scale of the site in the model.

    With `path` the data are gone through in batches, each of which is written into a file of netCDF as soon as it is
    drawn, so that memory does not grow with their number. What is outside the plate of the data, such as weights, is
    drawn once for all batches, and must not depend on their rows; the scores are those of all rows together. Random
    numbers are drawn batch by batch, so that draws are others than without `path`, of the same laws. A deterministic
    site in the plate must say how many dimensions its events have, `pyro.deterministic(name, x, event_dim=0)`.

    Modules are in evaluation mode.

    Args:
        model: The model, or one for each guide, where models have parameters.
        guide: Its trained guide, or several; parameters are their own (`module_local_params`).
        data: Arguments of both, the same as of `fit`: a tensor, a tuple of them in order, or a mapping by name. With
            `path` also a `Dataset`, a `DataLoader`, which should not shuffle, or another iterable of batches.
        num_samples: Number of draws of each guide.
        num_prior: Number of draws of the prior; by default `num_samples`, or none if the prior is improper.
        predictive: Whether to draw the observed sites.
        coords: Coordinates, by dimension.
        dims: Names of the last dimensions of a site, those that no plate names, or of constant data:
            `{"code": ["latent"]}`.
        constant_data: Tensors or arrays by name, such as covariates; not with `path`.
        sites: Names of the sites to collect; by default all. The scores are those of the whole model.
        path: File to write, such as "draws.nc"; it takes the place of an old one when it is complete. For zarr, convert
            it afterwards: `xarray.open_datatree("draws.nc").to_zarr("draws.zarr")`.
        batch_size: Rows of a batch, where there is a `path` and data do not come in batches.
        plate: Name of the plate over the rows of the data, where there is a `path`.
        parallel: Whether guide and model run once for all draws, in a plate to the left of all others, as they do in
            Pyro's `Predictive`: much faster, where they broadcast. The first and the last draw are run once more, by
            themselves, to see whether they do.
        progress: Whether to show a progress bar.
        seed: Seed of the draws; None goes on with the caller's random numbers.

    Returns:
        `arviz.InferenceData` with ArviZ 0.x, `xarray.DataTree` with ArviZ 1.x. With `path` it is read from the file
        where it is used.

    Raises:
        ValueError: If an argument is invalid, guide and model do not fit together, two names become one, the model has
            sites that are summed out by enumeration and that the guide does not draw (`length_posterior` is for these),
            or guide and model do not broadcast over draws that are to be drawn in parallel.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_vnd.distributions import OrderedMask
        >>> from pyro_vnd.infer import AutoNested
        >>> def model(y):
        ...     mask = pyro.sample("mask", OrderedMask.uniform(3))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=y)
        >>> draws = to_arviz(model, AutoNested(model), torch.ones(5), num_samples=10)
        >>> dict(draws.posterior.sizes)
        {'chain': 1, 'draw': 10, 'mask_unit': 3}
        >>> sorted(draws.posterior.data_vars)
        ['mask', 'mask_length']
        >>> draws.log_likelihood["y"].dims
        ('chain', 'draw', 'data')
    """
    fits = _pair_up(model, guide)
    if not is_integer(num_samples) or num_samples < 1:
        raise ValueError(f"to_arviz: argument `num_samples` must be an integer at least 1; got {num_samples!r}")
    if num_prior is not None and (not is_integer(num_prior) or num_prior < 0):
        raise ValueError(f"to_arviz: argument `num_prior` must be an integer at least 0, or None; got {num_prior!r}")
    if isinstance(sites, str):
        raise ValueError(f"to_arviz: argument `sites` must be a sequence of names; got the string {sites!r}")
    drawing = _Drawing(fits, num_samples, num_prior, predictive, parallel, dims or {}, sites)
    parts = [part for fit in fits for part in fit]
    tensors = [*named_parts(data).values()] if is_tensors(data) else []
    attrs = {"inference_library": "pyro", "inference_library_version": pyro.__version__, "creation_library": "pyro_vnd"}
    coords = {plain(dim): values for dim, values in (coords or {}).items()}
    with (
        module_local_params(*parts),
        module_mode(parts, training=False),
        random_numbers(seed, cuda_devices([*parts, *tensors])),
    ):
        if path is not None:
            if constant_data:
                raise ValueError(
                    "to_arviz: argument `constant_data` must be left out where there is a `path`; add them"
                )
            with DrawsFile(Path(path), plain(plate), coords, attrs) as file:
                kept = [Kept(plate) for _ in fits]
                for batch in tqdm(batches_of(data, batch_size), desc="batches", disable=not progress):
                    draws = drawing.of(batch, kept)
                    groups = draws.groups(len(fits))
                    _check_dims(groups, draws.coords | {dim: x for dim, x in coords.items() if dim != file.rows})
                    file.add(groups, draws.coords)
                    for each in kept:
                        each.is_first = False
            return file.read()
        check_whole("to_arviz", data, "or `path` a file to write what is drawn of each batch")
        draws = drawing.of(data, [None] * len(fits), progress=progress)
    for name, value in (constant_data or {}).items():
        draws.add("constant_data", name, value, draws.rename(name, [f"{name}_dim_{i}" for i in range(np.ndim(value))]))
    groups = draws.groups(len(fits))
    groups["sample_stats"] |= weights_and_khat(groups["sample_stats"])
    coords = draws.coords | coords
    _check_dims(groups, coords)
    return from_groups(groups, coords, attrs)


@dataclass
class _Drawing:
    """What to draw of the data, or of each batch of them."""

    fits: Sequence[tuple[Program, Program]]
    num_samples: int
    num_prior: int | None
    predictive: bool
    parallel: bool
    dims: Mapping[str, Sequence[str]]
    sites: Sequence[str] | None

    def of(self, data: Data, kept: Sequence[Kept | None], *, progress: bool = False) -> Draws:
        """Draw.

        Args:
            data: Arguments of models and guides.
            kept: What each fit has drawn for other batches.
            progress: Whether to show a progress bar.
        """
        draws, size_prior = Draws(self.dims, self.sites), self.num_samples if self.num_prior is None else self.num_prior
        for programs in self.fits:
            for program in programs:
                check_call("to_arviz", program, data)
        args, kwargs = as_arguments(data)
        rows = poutine.Trace()
        runs = [
            Runs(partial(model, *args, **kwargs), partial(guide, *args, **kwargs), rows, self.parallel, known)
            for (model, guide), known in zip(self.fits, kept, strict=True)
        ]
        total = len(runs) * (self.num_samples + size_prior)
        with tqdm(total=total, desc="draws", disable=not progress) as bar:
            for fit in runs:
                for draw in fit.posterior(self.num_samples, self.predictive):
                    draws.add_posterior(draw)
                    bar.update()
            try:
                for fit in runs:
                    for nodes in fit.prior(size_prior):
                        draws.add_prior(nodes, self.predictive)
                        bar.update()
            except NotImplementedError as error:
                if self.num_prior is not None:
                    raise ValueError(
                        f"to_arviz: argument `num_prior` must be 0: the prior has no draws ({error})"
                    ) from error
                draws.values.pop("prior", None)
                draws.values.pop("prior_predictive", None)
        return draws


def _pair_up(model: Any, guide: Any) -> list[tuple[Program, Program]]:
    """Return model and guide of each fit."""
    guides = list(guide) if isinstance(guide, list | tuple) else [guide]
    models = list(model) if isinstance(model, list | tuple) else [model] * len(guides)
    if not guides or len(models) != len(guides):
        raise ValueError(
            "to_arviz: arguments `model` and `guide` must be one model and one or more guides, or as many of each; got "
            f"{len(models)} models and {len(guides)} guides"
        )
    for name, programs in (("model", models), ("guide", guides)):
        for program in programs:
            if not callable(program):
                raise ValueError(f"to_arviz: argument `{name}` must be callable; got {type(program).__name__}")
    return list(zip(models, guides, strict=True))


def _check_dims(groups: Mapping[str, Mapping[str, tuple[Any, ...]]], coords: Mapping[str, Any]) -> None:
    """Raise a ValueError unless a dimension has the same size everywhere and its coordinates fit."""
    sizes: dict[str, tuple[int, str]] = {}
    for group, variables in groups.items():
        of_group = {dim for dims, *_ in variables.values() for dim in dims}
        for name, (dims, values, *_) in variables.items():
            if name in of_group:
                raise ValueError(
                    f"to_arviz: {name!r} must not name both a variable and a dimension; choose another name in `dims`"
                )
            if len(set(dims)) < len(dims):
                raise ValueError(f"to_arviz: argument `dims` must name dimensions of {name!r} apart; got {dims}")
            for dim, size in zip(dims, values.shape, strict=True):
                before, where = sizes.setdefault(dim, (size, name))
                if size != before and not (dim == "draw" and group.startswith("prior")):
                    raise ValueError(
                        f"to_arviz: dimension {dim!r} must have one size, so name them apart with `dims`; got {before} "
                        f"in {where!r} and {size} in {name!r}"
                    )
    for dim, values in coords.items():
        if dim not in sizes:
            raise ValueError(f"to_arviz: argument `coords` names {dim!r}; dimensions: {sorted(sizes)}")
        if len(values) != sizes[dim][0]:
            raise ValueError(
                f"to_arviz: argument `coords` must have {sizes[dim][0]} values for {dim!r}; got {len(values)}"
            )
