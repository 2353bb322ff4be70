"""Training and evaluation mode for the length of a block."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["module_mode"]


@contextmanager
def module_mode(objects: Iterable[Any], training: bool) -> Iterator[None]:
    """Put modules into training or evaluation mode inside a block, and each part of them back into its own after it.

    Args:
        objects: Modules; anything else is left alone.
        training: Which of the two.

    Yields:
        Nothing.
    """
    roots = [thing for thing in objects if isinstance(thing, nn.Module)]
    before = [(part, part.training) for root in roots for part in root.modules()]
    for root in roots:
        root.train(training)
    try:
        yield
    finally:
        for part, was_training in before:
            part.training = was_training
