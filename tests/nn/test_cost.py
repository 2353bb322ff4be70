"""What a plain net costs is counted, in whatever operations torch runs it."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pyro_vnd.diagnostics import evaluate_widths, net_cost
from pyro_vnd.nn import narrow, nest

STEPS, SIZE, UNITS = 5, 8, 32
GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.steps, self.last = kind(SIZE, UNITS, batch_first=True), nn.Linear(UNITS, 3)

    def forward(self, x):
        return self.last(self.steps(x)[0][:, -1])


@pytest.mark.parametrize("kind", GATES)
def test_steps_of_recurrent_nets(kind):
    plain, x, labels = Recurrent(kind), torch.randn(6, STEPS, SIZE), torch.randint(3, (6,))
    net, expected = nest(plain, x), STEPS * GATES[kind] * UNITS * (SIZE + UNITS) + 3 * UNITS
    assert [net_cost(each, x)["multiply_adds"] for each in (plain, net, narrow(net, 1.0))] == [expected] * 3
    assert torch._C._get_mkldnn_enabled()
    scores = evaluate_widths(net, (x, labels), [0.5, 1.0], num_samples=None, progress=False)
    half = STEPS * GATES[kind] * (UNITS // 2) * (SIZE + UNITS // 2) + 3 * UNITS // 2
    assert scores["multiply_adds"].values.ravel().tolist() == [half, expected]


def test_layers_that_torch_runs_as_one_operation():
    x = torch.randn(2, STEPS, SIZE)
    layer = nn.TransformerEncoderLayer(SIZE, 2, UNITS, batch_first=True)
    assert net_cost(layer, x)["multiply_adds"] == STEPS * (4 * SIZE * SIZE + 2 * SIZE * UNITS)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("shape", [(2, 4, STEPS, SIZE), (2, STEPS, SIZE)])
@pytest.mark.parametrize("mask", [None, torch.zeros(STEPS, STEPS), torch.zeros(STEPS, STEPS, requires_grad=True)])
def test_attention_is_not_counted_however_it_is_computed(shape, mask):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(SIZE, SIZE)

        def forward(self, x):
            x = self.first(x)
            return functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x, attention = torch.randn(shape), functional.scaled_dot_product_attention
    expected = SIZE * SIZE * torch.Size(shape[1:-1]).numel()
    traced = torch.fx.symbolic_trace(Attention())
    assert [net_cost(each, x)["multiply_adds"] for each in (Attention(), traced)] == [expected] * 2
    assert functional.scaled_dot_product_attention is attention
