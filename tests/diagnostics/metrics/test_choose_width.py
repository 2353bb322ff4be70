"""The choice of a width: the rule, its error rates, exact leave-one-out densities, and a net on real digits."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_vnd.diagnostics import compare, evaluate_widths, loo_widths, smallest_width, to_arviz
from pyro_vnd.diagnostics.metrics.predictive import average_draws

ROWS = 400


def test_the_rule_takes_differences_by_row():
    hard = torch.randn(ROWS) * 5  # what all widths find hard
    loss = torch.randn(ROWS)
    loss = (loss - loss.mean()) / loss.std()
    for excess, chosen in ((0.99, 1), (1.01, 2)):  # standard errors of the difference, which are sqrt(ROWS)
        scores = {2: hard, 1: hard - loss - excess * ROWS**-0.5}
        assert smallest_width(scores) == chosen
        assert smallest_width(scores, within=excess * 1.001) == 1
    assert smallest_width({1: hard - 0.1, 2: hard}, within=0) == 2
    assert smallest_width({2: hard, 1: hard}, within=0) == 1


def test_rates_of_the_rule():
    """Of 500 choices, a narrower width that is as good passes within one error in 84 %, one 3 errors worse in 2 %."""
    rng = np.random.default_rng(0)
    rates = [
        np.mean([smallest_width({1: rng.normal(-shift, 1, 100), 2: np.zeros(100)}) == 1 for _ in range(500)])
        for shift in (0.0, 0.3)
    ]
    assert rates[0] == pytest.approx(0.841, abs=3 * (0.841 * 0.159 / 500) ** 0.5)
    assert rates[1] == pytest.approx(0.023, abs=3 * (0.023 * 0.977 / 500) ** 0.5)


def exact_loo(x, y, order, scale):
    """Leave-one-out log predictive densities of a conjugate regression on the first columns of x."""
    x = x[:, :order]
    densities = []
    for row in range(len(x)):
        rest = torch.arange(len(x)) != row
        precision = torch.eye(order) + x[rest].T @ x[rest] / scale**2
        mean = torch.linalg.solve(precision, x[rest].T @ y[rest] / scale**2)
        variance = scale**2 + x[row] @ torch.linalg.solve(precision, x[row])
        densities.append(dist.Normal(x[row] @ mean, variance.sqrt()).log_prob(y[row]))
    return torch.stack(densities)


def test_orders_of_a_regression_against_exact_densities():
    """Order 2 is planted; exact posteriors, 2,000 draws."""
    scale, num_rows = 0.5, 40
    x = torch.randn(num_rows, 5)
    y = x[:, 0] - 0.6 * x[:, 1] + scale * torch.randn(num_rows)
    scores, exact = {}, {}
    for order in range(1, 6):

        def model(order=order):
            w = pyro.sample("w", dist.Normal(torch.zeros(order), 1.0).to_event(1))
            with pyro.plate("data", num_rows):
                pyro.sample("y", dist.Normal(x[:, :order] @ w, scale), obs=y)

        precision = torch.eye(order) + x[:, :order].T @ x[:, :order] / scale**2
        mean = torch.linalg.solve(precision, x[:, :order].T @ y / scale**2)
        posterior = MultivariateNormal(mean, precision_matrix=precision)

        def guide(posterior=posterior):
            pyro.sample("w", dist.MultivariateNormal(posterior.loc, posterior.covariance_matrix))

        scores[order] = to_arviz(model, guide, num_samples=2000, num_prior=0, predictive=False)
        exact[order] = exact_loo(x, y, order, scale)
    assert smallest_width(exact) == smallest_width(scores) == 2
    table = compare(scores)
    for order, densities in exact.items():
        # Over three seeds smoothed sampling errs by up to .17; the differences between orders 1 and 2 are 13 nats.
        assert table.loc[order, "elpd"] == pytest.approx(densities.sum().item(), abs=0.3)


# A few images of a thousand are so surprising that leaving them out would change the posterior of the weights.
surprising_rows = pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution:UserWarning")


@surprising_rows
def test_a_net_on_digits(trained, digits):
    scores = loo_widths(trained, digits.train, [0.125, 0.25, 0.5, 1.0], 50, progress=False)
    table = compare(scores)
    assert table.index[-1] == 0.125
    assert smallest_width(scores) > 0.125
    assert smallest_width(scores, within=1e6) == 0.125
    # With draws that hardly know of a single row, leaving it out costs little: the density is a bit below that of all.
    x, labels = digits.train.images[:200], digits.train.labels[:200]
    seen = (
        average_draws(logits=trained.predict(x, width=1.0, num_samples=50))
        .log_probs.gather(-1, labels[:, None])[:, 0]
        .mean()
    )
    left_out = scores[1.0].elpd_i[:200].mean().item()
    assert seen - 0.1 < left_out < seen + 0.02


@surprising_rows
def test_widths_share_their_draws(trained, digits):
    data = digits.train.images[:20], digits.train.labels[:20]
    first, again = (loo_widths(trained, data, [0.5, 1.0], 30, seed=3, progress=False) for _ in range(2))
    alone = loo_widths(trained, data, [1.0], 30, seed=3, batch_size=7, progress=False)
    for other in (again, alone):
        np.testing.assert_allclose(first[1.0].elpd_i, other[1.0].elpd_i)
    different = loo_widths(trained, data, [1.0], 30, seed=4, progress=False)
    assert not np.allclose(first[1.0].elpd_i, different[1.0].elpd_i)


@surprising_rows
def test_scores_are_by_the_width_in_effect(trained, digits):
    data = digits.train.images[:20], digits.train.labels[:20]
    exact, rounded = (
        loo_widths(trained, data, widths, 30, rounding="nearest", progress=False)
        for widths in ([0.25, 1.0], [0.3, 0.26, 1.0])
    )
    assert list(exact) == list(rounded) == [0.25, 1.0]
    blocks = loo_widths(trained, data, [2, 8], 30, progress=False)
    assert list(blocks) == [2, 8]
    for other in (rounded[0.25], blocks[2]):
        np.testing.assert_array_equal(exact[0.25].elpd_i, other.elpd_i)
    with pytest.raises(ValueError, match="rounding='nearest', 'down' or 'up'"):
        loo_widths(trained, data, [0.3], 30)


def test_means_over_rows_are_no_densities(trained, digits):
    means = evaluate_widths(trained, digits.test, [0.5, 1.0], 2, progress=False)
    with pytest.raises(ValueError, match=r"by width, as `loo_widths\(net, data, widths\)` returns them; got a Dataset"):
        smallest_width(means)


def test_bad_input(trained, digits):
    good = torch.zeros(3)
    with pytest.raises(ValueError, match="`scores` must have at least one width"):
        smallest_width({})
    with pytest.raises(ValueError, match="`within` must be >= 0; got -1"):
        smallest_width({1: good}, within=-1)
    with pytest.raises(ValueError, match=r"numbers of rows \{1: 3, 2: 2\}"):
        smallest_width({1: good, 2: good[:2]})
    with pytest.raises(ValueError, match=r"`scores\[1\]` must be finite .* with NaN or inf"):
        smallest_width({1: good / 0})
    with pytest.raises(ValueError, match=r"`scores\[2\]` must be finite .* got shape \(3, 1\)"):
        smallest_width({1: good, 2: good[:, None]})
    with pytest.raises(ValueError, match="`num_samples` must be at least 30; got 5"):
        loo_widths(trained, digits.train, [1.0], 5)
    with pytest.raises(ValueError, match="must have inputs and labels; got inputs only"):
        loo_widths(trained, digits.train.images, [1.0], 30, progress=False)
    with pytest.raises(ValueError, match=r"loo_widths: `widths` must be fractions \(floats\) or numbers"):
        loo_widths(trained, digits.train, [1, 0.5], 30)
