"""What is kept of an operation, so that it can be run again: memory, where nothing is."""

import pytest
from torch import nn

from pyro_vnd.nn.tracing.call import first_kept


class Unknown(nn.Linear):
    def forward(self, x):
        return super().forward(x).sort(-1).values


@pytest.mark.parametrize(
    ("operation", "in_place", "expected"),
    [
        (nn.Linear(2, 3), False, None),
        ("linear", False, None),
        ("relu", True, None),
        ("reshape", False, 1),  # which its rule runs again on something else
        (nn.Flatten(), False, 1),
        (Unknown(2, 3), False, 0),
        ("fft_rfft", False, 0),
        ("transpose", True, 0),  # the rule of shapes is for what leaves its tensor as it was
    ],
)
def test_tensors_are_kept_where_an_operation_is_run_again(operation, in_place, expected):
    assert first_kept(operation, in_place) == expected
