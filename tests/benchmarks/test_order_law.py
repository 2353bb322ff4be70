"""What is fitted and reported in the benchmark of the law of the order; its numbers are in tests/integration."""

import json
from statistics import median

import pytest
import torch

from benchmarks.order_law import METHODS, RESULTS, diabetes, main, markdown, random_problem, wine


@pytest.mark.parametrize("problem", [diabetes(), wine(), *map(random_problem, range(20))], ids=lambda p: p.name)
def test_problems_are_what_they_say(problem):
    n, k = problem.features.shape
    assert 4 <= k <= 15
    assert 30 <= n <= 500
    exact = problem.model().order_posterior(problem.features, problem.y)
    assert exact.probs.sum().item() == pytest.approx(1)
    residual = problem.y - problem.features @ torch.linalg.lstsq(problem.features, problem.y[:, None]).solution[:, 0]
    deviation = (residual.square().sum() / (n - k)).sqrt().item()
    assert problem.noise == pytest.approx(deviation, rel=4 * (2 * (n - k)) ** -0.5)  # four standard errors


def test_half_of_the_problems_are_exchangeable_and_half_autoregressive():
    """The correlation of the first feature with the last is that of all, or the smallest."""
    for seed in range(20):
        x = random_problem(seed).features
        correlation, k = torch.corrcoef(x.T)[0, -1].item(), x.shape[1]
        assert correlation == pytest.approx(0.9 ** (k - 1 if seed % 2 else 1), abs=4 * len(x) ** -0.5)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "order_law.json"
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    main(["--quick", "--json", str(path)])
    torch.set_default_dtype(dtype)
    return json.loads(path.read_text())


def test_runs_and_reports(result):
    assert len(result["rows"]) == 2 * (len(METHODS) + 2)
    assert all(0 <= row["tv"] <= 1 for row in result["rows"])
    assert [time["problem"] for time in result["times"]] == ["random 0", "diabetes"]
    assert all(time["ratio"]["mean_field"] == [1, 1, 1] for time in result["times"])
    assert all(value > 0 for time in result["times"] for value in time["ms_per_epoch"].values())


def test_tables_have_medians_and_largest(result):
    """By hand, in a result that is as simple as can be."""
    rows = [
        {"problem": f"random {i}", "noise": "known", "method": "conditional", "seed": seed, "tv": (i + seed) / 10}
        for i in range(2)
        for seed in range(3)
    ]
    rows += [row | {"method": method} for row in rows for method in list(METHODS)[1:]]
    rows += [row | {"noise": "latent", "tv": 0.9} for row in rows]
    lines = markdown(result | {"rows": rows}).partition("CPU time")[0].splitlines()
    assert "| guide | 2 random |" in lines
    first, second = (line for line in lines if line.startswith("| `AutoNested(model)`, `fit` as it is | 0."))
    assert "| 0.150, 0.300 |" in first
    assert "| 0.900, 0.900 |" in second


def test_a_quick_run_leaves_the_committed_result_alone(capsys):
    with pytest.raises(SystemExit):
        main(["--quick"])
    assert "--quick needs --json FILE" in capsys.readouterr().err


@pytest.mark.parametrize("noise", ["known", "latent"])
def test_the_committed_result_says_what_its_page_says(noise):
    rows = [row for row in json.loads(RESULTS.read_text())["rows"] if row["noise"] == noise]
    conditional, mean_field = (
        [row["tv"] for row in rows if row["method"] == method] for method in ("conditional", "mean_field")
    )
    assert len({row["problem"] for row in rows}) == 22
    assert median(conditional) < 0.02
    assert max(conditional) < 0.1
    assert median(mean_field) > 0.2
