"""Variational nested dropout for Pyro: masks that keep a random prefix, whose law is learned.

The packages are imported when they are first used: `pyro_vnd.nn` needs no import of its own, and importing `pyro_vnd`
loads neither Pyro nor torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyro_vnd import autoencoders, diagnostics, distributions, infer, nn

__version__ = "0.2.0"
__all__ = ["autoencoders", "diagnostics", "distributions", "infer", "nn"]

if not TYPE_CHECKING:  # a checker, which has the imports above, would take any name for one that is there

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
