"""Where channels lie after an operation has moved them."""

import pytest
import torch

from pyro_vnd.nn.tracing.structural_rules import _is_grown


def ends(*blocks):
    """Return the least and the greatest index of each block."""
    return torch.tensor([block[0] for block in blocks]), torch.tensor([block[-1] for block in blocks])


@pytest.mark.parametrize(
    ("blocks", "size", "times", "grown"),
    [
        ([[0], [1], [2], [3]], 4, 1, True),
        ([[0, 1], [2, 3]], 4, 1, True),
        ([[0, 1], [1, 2, 3], [3, 4]], 5, 1, True),  # as adaptive pooling of five to three has them
        ([[0, 1], [2, 3]] * 3, 4, 3, True),
        ([[0], [1], [2]], 4, 1, False),
        ([[0, 1], [1, 2], [3, 4]], 5, 1, False),
        ([[0, 1], [2, 3, 4]], 5, 1, False),
        ([[1], [0]], 2, 1, False),
        ([[0, 1], [2, 3]] * 3, 4, 1, False),
        ([[0, 1], [2, 3]] * 3, 4, 4, False),
    ],
)
def test_even_blocks(blocks, size, times, grown):
    assert _is_grown(*ends(*blocks), size, times) is grown
