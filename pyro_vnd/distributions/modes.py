"""What is said of the most probable lengths."""

from collections.abc import Sequence

from torch import Tensor

__all__ = ["most_probable", "name_modes", "say_modes"]

_ALIKE = 0.99  # of the largest probability: nobody would call one of such lengths the mode


def most_probable(probs: Tensor) -> tuple[int, ...]:
    """Return the lengths whose probability is the largest, or within a hundredth of it, ascending.

    Args:
        probs: Probabilities of the lengths, shape (K,).

    Example:
        >>> import torch
        >>> most_probable(torch.tensor([0.4, 0.2, 0.4]))
        (1, 3)
    """
    return tuple((1 + (probs >= _ALIKE * probs.max()).nonzero().flatten()).tolist())


def name_modes(lengths: Sequence[int]) -> str:
    """Name the modes of a law, a run of them by its ends.

    Example:
        >>> name_modes([3]), name_modes([1, 2, 3]), name_modes([1, 8]), name_modes([1, 3, 5, 7])
        ('3', '1-3', '1 and 8', 'none')
    """
    if len(lengths) <= 2:
        return " and ".join(map(str, lengths)) or "none"
    is_run = lengths[-1] - lengths[0] == len(lengths) - 1
    return f"{lengths[0]}-{lengths[-1]}" if is_run else "none"


def say_modes(lengths: Sequence[int]) -> str:
    """Say which modes a law has.

    Example:
        >>> say_modes([3]), say_modes([1, 2, 3]), say_modes([1, 3, 5, 7])
        ('mode 3', 'modes 1-3', 'no single mode')
    """
    name = name_modes(lengths)
    return "no single mode" if name == "none" else f"mode{'s' * (len(lengths) > 1)} {name}"
