"""Names of sites, plates and dimensions as xarray and netCDF can have them."""

from typing import Any

__all__ = ["find_name", "plain"]


def plain(name: str) -> str:
    """Return a name with "." in the place of "/" and ":", which Pyro's `scope` and others put into names of sites."""
    return name.replace("/", ".").replace(":", ".")


def find_name(name: str, variables: Any) -> str:
    """Return the name of a variable, which may be given as the model has it."""
    return name if name in variables else plain(name)
