"""Parameters that belong to their modules rather than to Pyro's global store."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule

__all__ = ["module_local_params", "quiet_nets"]


@contextmanager
def module_local_params(*modules: Any) -> Iterator[None]:
    """Run a block in which models and guides keep their own parameters.

    Pyro's `module_local_params` setting, also for modules that were made without it. Two guides of one name then do
    not read each other's values, which under the global store the second would, silently. Use it around calls of a
    guide that `fit` has trained.

    Args:
        *modules: Models and guides that are called in the block; those that are no modules are passed over.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> from pyro_vnd.distributions import OrderedMask
        >>> from pyro_vnd.infer import AutoNested, module_local_params
        >>> def model():
        ...     return pyro.sample("mask", OrderedMask.uniform(3))
        >>> guide = AutoNested(model)
        >>> with module_local_params(guide):
        ...     draw = guide()
        >>> len(pyro.get_param_store())
        0
    """
    for part in _pyro_modules(modules):
        # Pyro makes this store of a module when the module is made, but only if the setting is on by then.
        if not hasattr(part._pyro_context, "param_state"):
            part._pyro_context.param_state = {"params": {}, "constraints": {}}
    with pyro.settings.context(module_local_params=True):
        yield


@contextmanager
def quiet_nets(*modules: Any) -> Iterator[None]:
    """Run a block in which plain nets in PyroModules are looked up without a word to Pyro.

    Of every parameter of such a net Pyro sends a message through all handlers whenever the net is looked up: that is
    how `SVI` gets to know its parameters. A small layer takes less time, and a fit has its parameters already.

    Args:
        *modules: As those of `module_local_params`, with all their parts.

    Yields:
        Nothing.
    """
    known = []
    for part in _pyro_modules(modules):
        nets = {name: net for name, net in part._modules.items() if not isinstance(net, PyroModule)}
        part.__dict__.update(nets)  # where Python looks first
        known.append((part, nets))
    try:
        yield
    finally:
        for part, nets in known:
            for name, net in nets.items():
                if part.__dict__.get(name) is net:
                    del part.__dict__[name]


def _pyro_modules(modules: Iterable[Any]) -> Iterator[PyroModule]:
    """Go through the PyroModules among all parts of modules."""
    for module in modules:
        if isinstance(module, torch.nn.Module):
            yield from (part for part in module.modules() if isinstance(part, PyroModule))
