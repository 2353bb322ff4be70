"""The log-likelihood of data that were held back."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from masked_mean import MaskedMeanGuide, N, masked_mean
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_vnd.infer import fit
from pyro_vnd.infer._fit.held_out import mean_log_likelihood


def test_validation_is_the_log_likelihood_a_row(y):
    guide = MaskedMeanGuide()
    with torch.no_grad():
        guide.logits.copy_(torch.tensor([-1e3, 1e3, -1e3, -1e3]))
    value = mean_log_likelihood(masked_mean, guide, [y], 7)
    # w_1 + w_2 ~ N(2, 2 * 0.3^2): six draws of it, one a batch.
    expected = dist.Normal(2.0, 1.0).log_prob(y).mean().item() - 0.09
    assert value == pytest.approx(expected, abs=0.5)
    assert value != mean_log_likelihood(masked_mean, MaskedMeanGuide(), [y], 7)


def test_validation_ignores_the_scale_of_a_plate_for_more_rows(y):
    def model(rows):
        mu = pyro.sample("mu", dist.Delta(torch.tensor(0.5)))
        with pyro.plate("data", 10 * N, subsample_size=len(rows)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=rows)
        pyro.factor("elsewhere", torch.tensor(-100.0))

    expected = dist.Normal(0.5, 1.0).log_prob(y).mean().item()
    assert mean_log_likelihood(model, lambda rows: None, [y], 7) == pytest.approx(expected)


def test_validation_without_rows_is_refused(y):
    with pytest.raises(
        ValueError, match="fit: argument `validation` must have rows each time it is read; got none: is it"
    ):
        mean_log_likelihood(masked_mean, MaskedMeanGuide(), iter([]), 7)


class Normalised(PyroModule):
    """A model with buffers that change in training, and random numbers of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.linear = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1)
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        loc = self.linear(self.dropout(self.norm(x[:, :3]))).squeeze(-1)
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, scale), obs=x[:, 3])


def test_validation_disturbs_nothing():
    x, states = torch.randn(N, 4), []
    for validation in (None, torch.randn(17, 4)):
        torch.manual_seed(1)
        model = Normalised()
        guide = AutoNormal(model)
        arguments = {"num_epochs": 4, "batch_size": 10, "validation": validation, "progress": False}
        result = fit(model, guide, x, **arguments)
        states.append({**model.state_dict(), **guide.state_dict()})
        assert len(result.validation_log_likelihood) == (0 if validation is None else 4)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] | states[1])
    # Four steps in training mode, then the validation data in two batches, in evaluation mode.
    assert model.modes[-6:] == [True] * 4 + [False] * 2


def test_modes_are_those_of_before_after_a_fit():
    model = Normalised()
    model.norm.eval()
    fit(model, AutoNormal(model), torch.randn(N, 4), num_epochs=1, batch_size=N // 2, progress=False)
    assert all(model.modes[1:])
    assert model.training
    assert not model.norm.training
    assert model.dropout.training


def test_progress_shows_validation(y, capsys, wide_terminal):
    fit(masked_mean, MaskedMeanGuide(), y, num_epochs=1, validation=y)
    assert "validation=" in capsys.readouterr().err
