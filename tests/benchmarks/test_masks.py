import json
import math

import pytest
import torch

from benchmarks import report
from benchmarks.gradient import exact_gradient, gradient_quality, make_problem
from benchmarks.masks import Settings, gradient_tables, run, speed_tables
from benchmarks.record import measured, write_json
from benchmarks.timing import interleaved_medians, peak_bytes
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough

TINY = Settings(shapes=((1, 4), (3, 8)), seconds=0, min_rounds=1, rows=2, max_blocks=1)


def test_runs_reports_and_leaves_global_state_alone(tmp_path, capsys):
    threads = torch.get_num_threads()
    result = run(TINY)
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="finite"):  # validation is on again
        OrderedMask(logits=torch.tensor([math.nan]))

    write_json(tmp_path / "masks.json", result)
    assert [path.name for path in tmp_path.iterdir()] == ["masks.json"]
    for page, tables in (("masks", speed_tables), ("gradient", gradient_tables)):
        made = json.loads(json.dumps(result))
        report.main([page, "--json", str(tmp_path / "masks.json")])
        assert capsys.readouterr().out == f"{measured(made)}\n\n{tables(made)}\n"

    assert result["header"]["machine"]["threads"] == 1
    reference = [row for row in result["rows"] if row["method"] in ("gumbel_softmax", "categorical")]
    assert len(reference) == 2 * 6
    assert all(row["ratio"] == 1 for row in reference)
    assert all(row["median_seconds"] > 0 for row in result["rows"])
    assert all(row["finite"] for row in result["rows"] if row["what"] == "draw_backward")
    assert len(result["gradient"]) == 2 * 3 * 4
    assert [target["passed"] for target in result["targets"] if "finite" in target["name"]] == [True]


def test_medians_tell_a_slow_function_from_a_fast_one():
    x, y = torch.randn(100, 100), torch.randn(400, 400)
    medians = interleaved_medians({"fast": lambda: x @ x, "slow": lambda: y @ y}, seconds=0.1, min_rounds=3)
    assert medians["slow"] > 5 * medians["fast"] > 0  # 64 times the work


def test_peak_counts_what_is_held_together():
    def function():
        x = torch.empty(1000, dtype=torch.uint8)
        y = torch.empty(500, dtype=torch.uint8)
        del x, y
        return torch.empty(1200, dtype=torch.uint8)

    assert peak_bytes(function) == 1500


@pytest.mark.parametrize("objective", ["network", "linear"])
def test_gradient_agrees_with_integration_over_the_noise(objective):
    """At K = 4, against an integral over the one uniform number and the exact gradient by finite differences."""
    temperature, n = 0.5, 40_000
    problem = make_problem(objective, rows=2, num_units=4)
    draw = lambda logits, shape: OrderedMaskStraightThrough(temperature, logits=logits).rsample(shape)  # noqa: E731
    quality = gradient_quality(draw, problem, block=500, max_blocks=20)

    def expected_loss(logits):
        masks = torch.ones(4, 4).tril().unsqueeze(1)  # (lengths, 1, K)
        return (logits.softmax(-1).T * problem.loss(masks)).sum()

    exact, step = torch.zeros(2, 4), 1e-5
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(4)):
        change = torch.zeros(2, 4)
        change[tuple(index)] = step
        exact[tuple(index)] = expected_loss(problem.logits + change) - expected_loss(problem.logits - change)
    exact /= 2 * step
    torch.testing.assert_close(exact_gradient(problem), exact, atol=1e-8, rtol=1e-6)

    u = (torch.arange(n) + 0.5)[:, None, None] / n
    logits = problem.logits.expand(n, 2, 4).clone().requires_grad_()
    probs = logits.softmax(-1)
    keep = torch.stack([probs[..., i:].sum(-1) for i in range(4)], -1)
    soft = torch.sigmoid((torch.logit(keep[..., 1:]) - torch.logit(u)) / temperature)
    soft = torch.cat([torch.ones(n, 2, 1), soft], -1)
    problem.loss((soft > 0.5) + soft - soft.detach()).sum().backward()
    gradient = logits.grad  # one draw each
    bias = (gradient.mean(0) - exact).norm() / exact.norm()
    deviation = gradient.var(0).sum().sqrt() / math.sqrt(4) / exact.norm()  # of the mean of four draws
    assert quality.bias == pytest.approx(bias.item(), abs=4 * quality.bias_error)
    assert quality.bias_error < 0.02
    assert quality.deviation == pytest.approx(deviation.item(), rel=0.05)
