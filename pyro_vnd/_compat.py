"""What we use of torch and Pyro that they do not promise: all of it is listed or wrapped here.

Of torch. Its distributions are made to be subclassed, by these names; another name breaks every law:

- `torch.distributions.Distribution._validate_args`, `torch.distributions.Distribution._validate_sample`,
  `torch.distributions.Distribution._extended_shape`, `torch.distributions.Distribution._get_checked_instance`: as in
  torch's own laws.
- `torch.distributions.Transform._call`, `torch.distributions.Transform._inverse`: what a transform defines.
- `torch.types._size`: the type of a sample shape, in annotations only.
- `torch.Tensor._version`: grows with each change in place, by which `recall` knows that a sample is no longer its own.
- `torch._C._are_functorch_transforms_active`: asked before each hand-written gradient, which `torch.func` cannot use.
- `torch._is_all_true`: tells in `vmap`, too, whether something holds for all of a batch, as torch's own laws ask it.
- `torch.nn.Module._forward_hooks`, `torch.nn.Module._forward_pre_hooks`, `torch.nn.Module._backward_hooks`,
  `torch.nn.Module._backward_pre_hooks`: whether a layer has hooks, which only its own call runs.
- `torch.nn.utils.parametrizations._WeightNorm`: the parametrization that `weight_norm` makes.
- `torch.nn.Module._load_state_dict_pre_hooks`: where that leaves a hook behind.
- `torch.utils.checkpoint._checkpoint_without_reentrant_generator` and `torch.utils.checkpoint.CheckpointFunction`: what
  surrounds a function that is computed again in the backward pass; in torch 2.14 the former ends with `_impl`.
- `torch._C._nn.scaled_dot_product_attention`: what the code of traced nets calls.
- `torch._assert`: a check that a graph can hold.
- `torch.Tensor._base`: what a weight is a view of.
- `torch.nn.Module._modules`: where a module has its parts, for lookups that Pyro is not to hear of.

Of Pyro. Objectives, guides and handlers are extended by the methods that its own override:

- `pyro.infer.Trace_ELBO._get_trace`, `pyro.infer.Trace_ELBO._get_traces`: pairs of traces, one for each particle.
- `pyro.infer.TraceMeanField_ELBO._differentiable_loss_particle`: the loss of a pair of traces.
- `pyro.infer.Trace_MMD._differentiable_loss_parts`: the terms of the Wasserstein autoencoder's objective.
- `pyro.infer.trace_mean_field_elbo._check_mean_field_requirement`: warns of a guide that draws in another order.
- `pyro.infer.autoguide.AutoGuide._setup_prototype`, `pyro.infer.autoguide.AutoGuide._prototype_frames`,
  `pyro.infer.autoguide.AutoGuide._create_plates`: what a guide learns of its model when it is first called.
- `pyro.infer.autoguide.AutoGuide._model`, which a copy of a guide and its original would forget.
- `pyro.poutine.messenger.Messenger._reset`: forgets what a handler has from an earlier run.
- `pyro.nn.PyroModule._pyro_context.param_state`: where a module keeps them under `module_local_params`.
- `pyro.nn.module._Context`: what a module and its parts are called in, which of a fitted one has a store of its own.
- `pyro.nn.PyroModule._pyro_set_supermodule`: hands a part the context of the whole.
- `pyro.nn.PyroModule._pyro_name`: whether a part has been given a name in the whole.
- `pyro.poutine.runtime._PYRO_STACK`, `pyro.poutine.runtime._DIM_ALLOCATOR`, `pyro.poutine.runtime._ENUM_ALLOCATOR`: the
  handlers that are active, and the dimensions that plates and enumeration have taken.
- `pyro.distributions.MaskedDistribution._mask`: the rows that count.
- `pyro.distributions.distribution.COERCIONS`: asked before a law of Pyro is made, which `TransformedDistribution` of a
  nested law must not be; torch's own class does not ask.

Beside names:

- Of the message of a site the keys `infer["enumerate"]` and `infer["_enumerate_dim"]`, which enumeration reads and
  writes.
- By the traceback `fit` tells a law or value that torch or Pyro refuse as it is not finite from other errors: the
  function that raised is theirs, has a tensor that is not finite among its variables, as their checks of parameters and
  samples have, and says "Expected parameter" or "Expected value argument". Where they check or speak otherwise, such an
  error stays a ValueError.
- The attributes of a module are what `vars(module)` has, which `nest` puts back after it has traced a net.

What is used of ArviZ is in `pyro_vnd.diagnostics.posterior._arviz`, for both of its lines.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from unittest.mock import patch

import pyro
import torch
import torch.utils.checkpoint
from pyro.distributions import MaskedDistribution
from pyro.infer.trace_mean_field_elbo import _check_mean_field_requirement as check_mean_field_requirement
from pyro.nn import PyroModule
from pyro.nn.module import _Context
from pyro.poutine.runtime import _DIM_ALLOCATOR, _ENUM_ALLOCATOR, _PYRO_STACK
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = [
    "QuietModule",
    "all_true",
    "check_mean_field_requirement",
    "forget_weight_norm",
    "give_local_params",
    "has_hooks",
    "in_func",
    "keep_own_params",
    "mask_of_rows",
    "only_plain_code",
    "outermost_handlers",
    "plain_checkpoints",
    "quiet_lookups",
    "recall",
    "remember",
    "stray_params",
    "weight_norm_of",
]


def has_hooks(module: nn.Module) -> bool:
    """Say whether a module has hooks, which run when it is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def weight_norm_of(module: nn.Module) -> str:
    """Say whether only the weight of a module is normalised, by a "hook" or a "parametrization"; "" if it is not."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if [hook.name for hook in hooks] == ["weight"] and {"weight_g", "weight_v"} <= own:
        return "hook"
    chains: Any = getattr(module, "parametrizations", {})
    found = list(chains) == ["weight"] and all(isinstance(each, _WeightNorm) for each in chains["weight"])
    return "parametrization" if found else ""


def forget_weight_norm(module: nn.Module) -> None:
    """Drop what the parametrization of `weight_norm` left on a module that has it no more.

    It is a hook for states of the old `weight_norm`; as a local function it would keep the module from being pickled.

    Does nothing if torch puts that hook elsewhere: such modules can then be saved by their state only.
    """
    hooks: dict[int, Any] = dict(module._load_state_dict_pre_hooks)
    for key, wrapped in hooks.items():
        if wrapped.hook.__module__ == _WeightNorm.__module__:
            del module._load_state_dict_pre_hooks[key]


@contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Let `torch.utils.checkpoint.checkpoint` call its function and keep all inside a block.

    What it would compute again in the backward pass, when draws of masks and weights are gone, would be something else.
    """
    module: Any = torch.utils.checkpoint
    generator = "_checkpoint_without_reentrant_generator"
    generator += "_impl" * hasattr(module, f"{generator}_impl")
    inside = {generator: _nothing_around, "CheckpointFunction": _JustCalls}
    before = {name: getattr(module, name) for name in inside}
    for name, value in inside.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


class _JustCalls:
    @staticmethod
    def apply(function: Any, preserve: bool, *args: Any) -> Any:
        return function(*args)


def in_func() -> bool:
    """Say whether a transform of `torch.func` is active: numbers may then be those of a whole batch.

    Breaks where torch renames the question, which `torch.autograd.Function` itself asks.
    """
    return torch._C._are_functorch_transforms_active()


def only_plain_code() -> bool:
    """Say whether torch is tracing operations, which must then be torch's own: in `torch.func`, or a compilation."""
    return in_func() or torch.compiler.is_compiling()


def all_true(held: Tensor) -> bool:
    """Say whether a check holds everywhere, in `vmap` for the whole batch; in a compilation nobody knows, so yes.

    Breaks where torch renames the function, or no longer lets `vmap` ask it.
    """
    return torch.compiler.is_compiling() or bool(torch._is_all_true(held))


def remember(value: Tensor, making: Any) -> Tensor:
    """Attach to a sample what its value alone does not hold; copies of the sample do not have it.

    Nor do samples drawn in `torch.inference_mode`, which do not tell whether they were changed in place. Breaks where
    tensors take no attributes, or do not count their changes in `_version`.
    """
    if torch.compiler.is_compiling():
        value._making = (making, 0)  # type: ignore[attr-defined]  # what leaves a compiled function is new
    elif not value.is_inference():
        value._making = (making, value._version)  # type: ignore[attr-defined]
    return value


def recall(value: Tensor) -> Any | None:
    """Return what was attached to a sample, or None for other tensors and samples changed in place.

    In a compilation changes in place are not counted, and must not be made.
    """
    making, version = getattr(value, "_making", (None, None))
    if making is None or torch.compiler.is_compiling():
        return making
    return making if not value.is_inference() and version == value._version else None


def num_changes(tensors: Iterable[Tensor]) -> int:
    """Return how often tensors were changed in place; of inference tensors and in a compilation nobody counts."""
    if torch.compiler.is_compiling():
        return 0
    try:
        return sum([x._version for x in tensors])
    except RuntimeError:
        return 0


def give_local_params(module: PyroModule) -> None:
    """Give a module the store of its own parameters that Pyro gives modules made under `module_local_params`.

    Breaks if the store moves from `PyroModule._pyro_context.param_state`.
    """
    if not hasattr(module._pyro_context, "param_state"):
        module._pyro_context.param_state = {"params": {}, "constraints": {}}


def stray_params(objects: Iterable[Any]) -> list[str]:
    """Return the names of `pyro.param` in the stores of modules, which are parameters of no module."""
    names = []
    for module in objects:
        if isinstance(module, PyroModule):
            own = {id(parameter) for parameter in module.parameters()}
            params = getattr(module._pyro_context, "param_state", {"params": {}})["params"]
            names += [name for name, parameter in params.items() if id(parameter) not in own]
    return names


class OwnContext(_Context):
    """The context of a module that owns its parameters: while it is called, Pyro's store is a new and empty one.

    So Pyro finds none of another module's values under its names and leaves it none, yet hears of its parameters as
    ever. Breaks if a `PyroModule` is called otherwise than within `_pyro_context`, or if the store has what it keeps
    elsewhere than in attributes, which `clear` makes anew.
    """

    def __enter__(self) -> None:
        if not self.active and not pyro.settings.get("module_local_params"):
            store = pyro.get_param_store()
            self.outside = dict(vars(store))  # no `store.scope()`, which takes from parameters what `SVI` asks for
            store.clear()
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if not self.active:
            vars(pyro.get_param_store()).update(vars(self).pop("outside", {}))


def keep_own_params(objects: Iterable[Any]) -> None:
    """Let the modules among objects, and copies of them, own their parameters from now on."""
    for module in objects:
        for part in module.modules() if isinstance(module, nn.Module) else ():
            if isinstance(part, PyroModule):
                give_local_params(part)
                part._pyro_context.__class__ = OwnContext


_outermost: list[tuple[list[Any], list[Any]]] = []


@contextmanager
def outermost_handlers() -> Iterator[list[Any]]:
    """Run a block under those handlers of Pyro alone under which the outermost block of this kind began.

    A fit that the model of another one starts has no sites in that model. Breaks where Pyro keeps handlers, or what
    plates and enumeration have taken, elsewhere than in these three objects.

    Yields:
        The handlers.
    """
    plates, enumerated = _DIM_ALLOCATOR._stack, vars(_ENUM_ALLOCATOR)
    before = [*_PYRO_STACK], [*plates], dict(enumerated)
    is_outermost = not _outermost
    if is_outermost:
        _outermost.append(before[:2])
    _PYRO_STACK[:], plates[:] = _outermost[0]
    try:
        yield [*_PYRO_STACK]
    finally:
        if is_outermost:
            _outermost.clear()
        _PYRO_STACK[:], plates[:] = before[:2]
        enumerated.clear()
        enumerated.update(before[2])


_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def quiet_lookups() -> Iterator[None]:
    """Run a block in which a `QuietModule` hands out the plain modules it holds without a word to Pyro."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


class QuietModule(PyroModule):
    """A `PyroModule` that can keep quiet about the parameters of the plain modules it holds.

    Whenever a plain module is looked up, `PyroModule.__getattr__` sends a message about each of its parameters through
    all handlers: that is how `SVI` gets to know them. It takes as long as a small layer, and `fit` has them already.

    Breaks if a `PyroModule` keeps plain modules elsewhere than in `_modules`.

    One that owns its parameters does so as a part of another module, too. While it keeps quiet, a call does not look
    through all parameters for stray ones either, as Pyro's does, which walks through the whole module each time.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _quiet.get():
            return super().__call__(*args, **kwargs)
        with self._pyro_context:
            return nn.Module.__call__(self, *args, **kwargs)

    def _pyro_set_supermodule(self, name: str, context: _Context) -> None:
        owns = isinstance(self._pyro_context, OwnContext)
        super()._pyro_set_supermodule(name, context)
        if owns:
            keep_own_params([self])

    def __getattr__(self, name: str) -> Any:
        if _quiet.get():
            module = self.__dict__.get("_modules", {}).get(name)
            if module is not None and (not isinstance(module, PyroModule) or module._pyro_name):
                return module
        return super().__getattr__(name)


def mask_of_rows(law: MaskedDistribution) -> Tensor | bool:
    """Return which rows a law has that `mask` made of another; breaks if Pyro renames the attribute that holds it."""
    mask: Tensor | bool = law._mask
    return mask


@contextmanager
def replaced_attention(function: Callable[..., Tensor]) -> Iterator[None]:
    """Let nets call another function for `scaled_dot_product_attention`; misses those that torch.jit has compiled."""
    for_modules = patch.object(torch.nn.functional, "scaled_dot_product_attention", function)
    with for_modules, patch.object(torch._C._nn, "scaled_dot_product_attention", function):
        yield
