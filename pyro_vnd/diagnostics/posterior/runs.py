"""Runs of guides and models: one for each draw, or one in a plate of all draws that is taken apart afterwards."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vnd.diagnostics.posterior.sites import (
    free_sites,
    keep_rows,
    length_probs,
    log_q_terms,
    num_batch_dims,
    sites,
    visible,
)
from pyro_vnd.distributions.nested import innermost

__all__ = ["Draw", "Kept", "Runs"]

Program = Callable[[], Any]  # a model or a guide with its arguments
_TENSORS = ("value", "log_prob", "unscaled_log_prob", "log_q")  # what a site has of each draw


@dataclass
class Draw:
    """A draw of the guide, the model at its latents, and the model with data drawn anew if they are: their sites.

    Sites of the model have their log-density as `log_prob`, those of the guide as `log_q`. Those in `free` the guide
    left to the model. Of a batch, `share` says which part of a site's log-density counts.
    """

    guide: Mapping[str, Any]
    model: Mapping[str, Any]
    predicted: Mapping[str, Any]
    free: set[str]
    share: Callable[[Any], float] = lambda site: 1.0

    @property
    def log_p(self) -> float:
        """The log-joint, without free sites."""
        scored = (site for name, site in self.model.items() if "log_prob" in site and name not in self.free)
        return float(sum(self.share(site) * site["log_prob"].sum() for site in scored))

    @property
    def log_q(self) -> float:
        """The log-density of the guide."""
        scored = ((_of_model(name, site, self.model), site) for name, site in self.guide.items() if "log_q" in site)
        return float(sum(self.share(model) * site["log_q"].sum() for model, site in scored))


class Kept:
    """What is drawn outside the plate of the data, once for all batches of them.

    Args:
        plate: Name of the plate.
    """

    def __init__(self, plate: str) -> None:
        self.plate = plate
        self.is_first = True
        self._traces: dict[Any, Any] = defaultdict(poutine.Trace)

    def share(self, site: Any) -> float:
        """Return which part of a site's log-density a batch adds to that of all: in the plate as if it were for it."""
        frame = self._frame(site)
        if frame is None:
            return float(self.is_first)
        return 1.0 if frame.full_size is None else frame.size / frame.full_size

    def trace(self, key: Any) -> Any:
        """Return what was kept of a run, to be replayed."""
        return self._traces[key]

    def keep(self, key: Any, nodes: Mapping[str, Any], model: Mapping[str, Any] | None = None) -> None:
        """Keep what was drawn outside the plate, in the model if that is another program."""
        kept = self._traces[key]
        for name, site in nodes.items() if self.is_first else ():
            of_model = site if model is None else _of_model(name, site, model)
            if _is_drawn(site) and not site["is_observed"] and self._frame(of_model) is None:
                kept.add_node(name, **{key: site[key] for key in ("type", "name", "value", "infer", "is_observed")})

    def _frame(self, site: Any) -> Any:
        return next((frame for frame in site["cond_indep_stack"] if frame.name == self.plate), None)


def _of_model(name: str, site: Any, model: Mapping[str, Any]) -> Any:
    """Return the site of the model for which a guide draws; an autoguide draws "z" as "z_unconstrained"."""
    return model.get(name, model.get(name.removesuffix("_unconstrained"), site))


class Runs:
    """Draws of a fit.

    Args:
        model: The model, with its arguments.
        guide: The guide, with its arguments.
        rows: Rows of plates that subsample, the same in all draws of all fits: filled by the first one.
        parallel: Whether all draws come from one run, in a plate to the left of all others.
        kept: What other batches of the data have drawn, or None where there are no others.
    """

    def __init__(
        self, model: Program, guide: Program, rows: poutine.Trace, parallel: bool, kept: Kept | None = None
    ) -> None:
        self._model, self._guide, self._rows, self._parallel = model, guide, rows, parallel
        self._kept = kept

    def posterior(self, num_draws: int, predictive: bool) -> Iterator[Draw]:
        """Draw from the guide, score the draws, and draw from the model what the guide does not, and the data anew."""
        share = {} if self._kept is None else {"share": self._kept.share}
        for guide, model, predicted in self._draws(num_draws, partial(self._run, predictive)):
            yield Draw(guide, model, predicted, free_sites(model, guide), **share)

    def prior(self, num_draws: int) -> Iterator[Mapping[str, Any]]:
        """Draw latents and data from the model; after draws of the posterior."""
        for (nodes,) in self._draws(num_draws, lambda key, *at: (self._drawn(("prior", key), *at),)):
            yield nodes

    def _drawn(self, key: Any, *at: Any) -> Any:
        """Run the model, and draw its data, too."""
        trace = self._trace(_DrawData()(self._model), *self._known(key), *at)
        if self._kept is not None:
            self._kept.keep(key, trace.nodes)
        return trace

    def _known(self, key: Any) -> tuple[Any, ...]:
        return () if self._kept is None else (self._kept.trace(key),)

    def _run(self, predictive: bool, key: Any, *at: Any) -> tuple[Any, ...]:
        known = self._known(("guide", key))
        guide: Any = poutine.trace(_replay(self._guide, self._rows, *known, *at[:1])).get_trace()
        model = self._trace(self._model, guide, *at[1:2])
        keep_rows(self._rows, guide)
        if self._kept is not None:
            self._kept.keep(("guide", key), guide.nodes, model.nodes)
        free = free_sites(model.nodes, guide.nodes)
        model.compute_log_prob(lambda name, _: name not in free)
        for name, term in log_q_terms("to_arviz", guide.nodes, model.nodes).items():
            guide.nodes[name]["log_q"] = term
        if not predictive:
            return guide, model, poutine.Trace()
        if all(kind != "observed" for _, _, kind in sites(model.nodes)):
            return guide, model, model
        try:
            return guide, model, self._drawn(("predicted", key), guide, *at[2:])
        except NotImplementedError as error:
            raise ValueError(
                f"to_arviz: argument `predictive` must be False: an observed site has no draws ({error})"
            ) from error

    def _trace(self, model: Program, *at: Any) -> Any:
        trace: Any = poutine.trace(_replay(model, self._rows, *at)).get_trace()
        keep_rows(self._rows, trace)
        if self._parallel:
            trace.compute_log_prob()  # by which draws in parallel are checked
        return trace

    def _draws(self, num_draws: int, run: Callable[..., tuple[Any, ...]]) -> Iterator[tuple[Mapping[str, Any], ...]]:
        """Yield the sites of traces, draw by draw."""
        if not self._parallel or num_draws == 0:
            for i in range(num_draws):
                yield tuple(trace.nodes for trace in run(i))
            return
        ones = run("one")
        with _broadcasting():
            with pyro.plate("_draws", num_draws, dim=-1 - num_batch_dims(*ones)):
                many = run("all")
            by_trace = [_take_apart(*pair, num_draws) for pair in zip(many, ones, strict=True)]
            by_draw = list(zip(*by_trace, strict=True))
            # A program may mix draws without an error, as by `sum()`: then draws by themselves have other values.
            for i, draw in {0: by_draw[0], num_draws - 1: by_draw[-1]}.items():
                for nodes, again in zip(draw, run(i, *map(_points, draw)), strict=True):
                    _check_equal(nodes, again.nodes)
        yield from by_draw


class _DrawData(Messenger):
    """`poutine.uncondition`, but not of points: drawn in a plate of draws they would have its shape twice."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not isinstance(innermost(msg["fn"]), Delta):
            msg["is_observed"], msg["done"], msg["value"] = False, False, None
            msg["infer"]["was_observed"] = True


def _replay(program: Program, *traces: Any) -> Program:
    for trace in traces:
        program = poutine.replay(program, trace=trace)
    return program


def _is_drawn(site: Any) -> bool:
    return site["type"] == "sample" and not site_is_subsample(site)


@contextmanager
def _broadcasting() -> Iterator[None]:
    try:
        yield
    except NotImplementedError:  # a law without a sampler
        raise
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            "to_arviz: argument `parallel` must be False, as model or guide do not broadcast over draws, which have a "
            "dimension of their own to the left of all plates (a vector outside plates has shape (draws, 1, K), "
            f"so write sums over the last dimension): {error}"
        ) from error


def _take_apart(many: Any, one: Any, num_draws: int) -> list[dict[str, Any]]:
    """Return the sites of each draw of a trace of many, in the shapes of a trace of one."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, site in one.nodes.items():
        if _is_drawn(site):
            of_all = many.nodes[name]
            shapes = {key: torch.as_tensor(site[key]).shape for key in _TENSORS if key in site}
            tensors = {key: torch.as_tensor(of_all[key]) for key in shapes}
            if "unscaled_log_prob" in shapes and (shown := visible(of_all)) is not None:
                shapes["mask"] = shapes["unscaled_log_prob"]
                tensors["mask"] = torch.as_tensor(shown).expand(tensors["unscaled_log_prob"].shape)
            laws = length_probs(site), length_probs(of_all)
            if laws[0] is not None and laws[1] is not None:
                shapes["length_probs"], tensors["length_probs"] = laws[0].shape, laws[1]
            parts[name] = {key: _by_draw(name, tensors[key], shape, num_draws) for key, shape in shapes.items()}
    views = []
    for i in range(num_draws):
        nodes = {name: dict(site) for name, site in one.nodes.items()}
        for name, tensors in parts.items():
            nodes[name] |= {key: tensor[i] for key, tensor in tensors.items()}
            if isinstance(nodes[name]["fn"], MaskedDistribution):  # its rows are in the mask of the site
                nodes[name]["fn"] = nodes[name]["fn"].base_dist
        views.append(nodes)
    return views


def _by_draw(name: str, tensor: Tensor, shape: torch.Size, num_draws: int) -> Tensor:
    wide, wanted = ([n for n in sizes if n != 1] for sizes in (tensor.shape[1:], shape))
    if tensor.shape[:1] == (num_draws,) and wide == wanted:
        return tensor.reshape(num_draws, *shape)
    if [n for n in tensor.shape if n != 1] == wanted:  # the same in all draws, as data are
        return tensor.reshape(shape).expand(num_draws, *shape)
    raise ValueError(f"site {name!r} has shape {tuple(tensor.shape)} for {num_draws} draws of shape {tuple(shape)}")


def _points(nodes: Mapping[str, Any]) -> poutine.Trace:
    """Return what was drawn, to be replayed; points are computed again."""
    trace = poutine.Trace()
    for name, site in nodes.items():
        if _is_drawn(site) and not site["is_observed"] and not isinstance(innermost(site["fn"]), Delta):
            trace.add_node(name, **site)
    return trace


def _check_equal(nodes: Mapping[str, Any], again: Mapping[str, Any]) -> None:
    for name, site in nodes.items():
        for key in _TENSORS if _is_drawn(site) else ():
            if key in site:
                many, alone = (torch.as_tensor(found[name][key]).double() for found in (nodes, again))
                largest = alone.abs().nan_to_num(posinf=0.0).max().item() if alone.numel() else 0.0
                if not torch.allclose(many, alone, rtol=1e-3, atol=1e-3 * max(1.0, largest), equal_nan=True):
                    raise ValueError(f"site {name!r} of a draw depends on the other draws")
