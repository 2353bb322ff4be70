"""What we use of torch and Pyro that they do not promise.

Beside what is here we override or call protected methods and attributes of base classes of Pyro:

- `AutoGuide._setup_prototype`, `_create_plates`, `_prototype_frames`, `prototype_trace` (`AutoNested`);
- `ELBO._get_traces`, `_get_trace`, `TraceMeanField_ELBO._differentiable_loss_particle` (`NestedELBO`);
- the keys `_enumerate_dim` and `enumerate` of `infer` in the message of a site (`fit`, `AutoNested`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.infer.trace_mean_field_elbo import _check_mean_field_requirement as check_mean_field_requirement
from pyro.nn import PyroModule
from torch import Tensor

__all__ = [
    "QuietModule",
    "check_mean_field_requirement",
    "give_local_params",
    "mask_of_rows",
    "only_plain_code",
    "quiet_lookups",
    "recall",
    "remember",
]


def only_plain_code() -> bool:
    """Say whether torch is tracing operations, which must then be torch's own: in `torch.func`, or a compilation.

    Breaks where torch renames the first question, which `torch.autograd.Function` itself asks.
    """
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()


def remember(value: Tensor, making: Any) -> Tensor:
    """Attach to a sample what its value alone does not hold; copies of the sample do not have it.

    Nor do samples drawn in `torch.inference_mode`, which do not tell whether they were changed in place. Breaks where
    tensors take no attributes, or do not count their changes in `_version`.
    """
    if not value.is_inference():
        value._making = (making, value._version)  # type: ignore[attr-defined]
    return value


def recall(value: Tensor) -> Any | None:
    """Return what was attached to a sample, or None for other tensors and samples changed in place."""
    making, version = getattr(value, "_making", (None, None))
    return making if making is not None and version == value._version else None


def give_local_params(module: PyroModule) -> None:
    """Give a module the store of its own parameters that Pyro gives modules made under `module_local_params`.

    Breaks if the store moves from `PyroModule._pyro_context.param_state`.
    """
    if not hasattr(module._pyro_context, "param_state"):
        module._pyro_context.param_state = {"params": {}, "constraints": {}}


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
    """

    def __getattr__(self, name: str) -> Any:
        if _quiet.get():
            module = self.__dict__.get("_modules", {}).get(name)
            if module is not None and not isinstance(module, PyroModule):
                return module
        return super().__getattr__(name)


def mask_of_rows(law: MaskedDistribution) -> Tensor | bool:
    """Return which rows a law has that `mask` made of another; breaks if Pyro renames the attribute that holds it."""
    mask: Tensor | bool = law._mask
    return mask
