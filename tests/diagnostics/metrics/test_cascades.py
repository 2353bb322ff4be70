"""Cascades scored at several mean costs."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from pyro_vnd.diagnostics import evaluate, evaluate_cascade, evaluate_widths
from pyro_vnd.nn import CascadeNet, NestedNet, narrow, nest

SHARES = (0.5, 0.25, 0.15, 0.1)  # of rows that need one, two, three or four units
NUM_ROWS = 2000
NEEDED = sum(share * units for units, share in enumerate(SHARES, 1)) / len(SHARES)  # of the multiply-adds


def planted_net() -> NestedNet:
    """A net of four units, each of which looks at one of the inputs."""
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        plain[0].weight.copy_(3 * torch.eye(4))
        plain[0].bias.zero_()
        plain[2].weight.copy_(torch.tensor([[-4.0], [4.0]]).expand(2, 4))
        plain[2].bias.zero_()
    return nest(plain, torch.zeros(1, 4), num_blocks=4, prior=None)


def planted_rows(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their labels, and the number of units that each needs: one input is +-1, noise is in the others."""
    generator = torch.Generator().manual_seed(seed)
    needed = torch.multinomial(torch.tensor(SHARES), count, replacement=True, generator=generator)
    labels = torch.randint(2, (count,), generator=generator)
    x = 0.02 * torch.randn(count, 4, generator=generator)
    x[torch.arange(count), needed] += 2.0 * labels - 1
    return x, labels, needed + 1


@pytest.fixture
def planted():
    """Cascade, net, test rows with the number of units that each needs, and inputs to fit thresholds on."""
    x, labels, needed = planted_rows(NUM_ROWS, seed=0)
    net = planted_net()
    return CascadeNet(net, [1, 2, 3, 4]), net, (x, labels), needed, planted_rows(NUM_ROWS, seed=1)[0]


def accuracy_at(net, data, cost) -> float:
    """Accuracy of a coin that chooses between the two fixed widths next to a cost."""
    fixed = evaluate_widths(net, data, [1, 2, 3, 4], None, progress=False)
    shares = fixed["multiply_adds"].values[0] / fixed["multiply_adds"].values[0, -1]
    return float(np.interp(cost, shares, fixed["accuracy"].values[0]))


def test_easy_rows_stop_early_and_pay_for_the_hard_ones(planted):
    cascade, net, data, needed, validation = planted
    cascade.fit_thresholds(validation, NEEDED)
    logits, stages = cascade.run(data[0])
    assert ((stages + 1) == needed).double().mean() > 0.95
    assert (logits.argmax(-1) == data[1]).double().mean() > 0.95
    assert accuracy_at(net, data, NEEDED) < 0.88


def test_rows_chosen_at_random_at_the_same_rates_win_nothing(planted):
    cascade, net, (x, labels), _, validation = planted
    stages = cascade.fit_thresholds(validation, NEEDED).run(x).stage
    shuffled = stages[torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(0))]
    logits = torch.stack([narrow(net, blocks)(x) for blocks in (1, 2, 3, 4)])[shuffled, torch.arange(NUM_ROWS)]
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    assert accuracy < accuracy_at(net, (x, labels), NEEDED) + 3 * (0.25 / NUM_ROWS) ** 0.5


def test_it_has_the_variables_of_fixed_widths_and_what_rows_cost(planted):
    cascade, _, data, _, validation = planted
    ood = {"zeros": torch.zeros(50, 4)}
    result = evaluate_cascade(
        cascade, data, validation, [0.3, NEEDED, 0.9], ood, calibrate=data, seed=7, progress=False
    )
    assert result["nll"].dims == ("seed", "mean_cost")
    assert result["auroc"].dims == ("seed", "mean_cost", "ood", "score")
    assert result["prevalence"].dims == ("seed", "ood")
    assert result["mean_cost"].values.tolist() == [0.3, NEEDED, 0.9]
    assert result["share_of_rows"].dims == ("seed", "mean_cost", "stage")
    assert result["seed"].values.tolist() == [7]
    np.testing.assert_allclose(result["share_of_rows"].sum("stage"), 1)
    costs = result["share_of_rows"].values[0] @ cascade.costs.numpy()
    np.testing.assert_allclose(result["multiply_adds"].values[0], costs)
    np.testing.assert_allclose(costs / cascade.whole_cost, [0.3, NEEDED, 0.9], atol=0.04)  # other rows were fitted
    assert (result["ood_multiply_adds"] == cascade.costs[-1].item()).all()  # all of them leave doubt
    assert xr.concat([result, result.assign_coords(seed=[8])], "seed")["nll"].shape == (2, 3)


def test_scores_are_those_of_the_cascade_which_stays_as_it_was(planted):
    cascade, _, data, _, validation = planted
    result = evaluate_cascade(cascade, data, validation, [0.4], progress=False)
    assert cascade.thresholds.isnan().all()
    assert cascade.mean_cost is None
    alone = evaluate(cascade.fit_thresholds(validation, 0.4), data, progress=False)
    for name in ("accuracy", "nll", "ece", "entropy"):
        assert result[name].item() == alone[name].item()


def test_a_mean_cost_that_cannot_be_is_refused_and_nothing_changes(planted):
    cascade, _, data, _, validation = planted
    cascade.fit_thresholds(validation, 0.5)
    before = cascade.thresholds.clone()
    with pytest.raises(ValueError, match=r"`mean_cost` is 0\.1, 2 multiply-adds a row; the narrowest width"):
        evaluate_cascade(cascade, data, validation, [0.4, 0.1], progress=False)
    with pytest.raises(ValueError, match="evaluate_cascade: argument `mean_costs` must have one mean cost at least"):
        evaluate_cascade(cascade, data, validation, [], progress=False)
    assert torch.equal(cascade.thresholds, before)


def test_fixed_widths_of_a_single_pass_are_the_posterior_mean(trained, digits):
    found = evaluate_widths(trained, digits.test, [0.25, 1.0], None, progress=False)
    assert found.attrs["num_samples"] == 1
    for width in (0.25, 1.0):
        alone = evaluate(narrow(trained, width), digits.test, progress=False)
        assert found["nll"].sel(width=width).item() == alone["nll"].item()


def test_a_trained_net_predicts_better_than_at_a_fixed_width_of_the_cost(trained, digits):
    """On real digits; the narrowest stage is right about nine rows in ten, and pays for itself."""
    cascade = CascadeNet(trained, [3, 8])
    found = evaluate_cascade(cascade, digits.test, digits.validation, [0.4, 0.5], progress=False).isel(seed=0)
    fixed = evaluate_widths(trained, digits.test, range(1, 9), None, progress=False).isel(seed=0)
    for metric, sign in (("accuracy", 1), ("nll", -1)):
        at_cost = np.interp(found["multiply_adds"], fixed["multiply_adds"], fixed[metric])
        assert (sign * (found[metric].values - at_cost) > 0).all()
