"""Variational nested dropout for Pyro: masks that keep a random prefix, whose law is learned."""

from pyro_vnd import distributions, infer

__version__ = "0.1.0"
__all__ = ["distributions", "infer"]
