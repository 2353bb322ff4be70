"""`python -m models` as a person runs it: the files it makes, and one line where the request is wrong."""

import json
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import arviz as az
import pytest

from models.__main__ import main

COMMAND = Path(__file__).parents[2] / "models" / "__main__.py"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "demo"
    with redirect_stdout(StringIO()) as stdout, redirect_stderr(StringIO()) as stderr:
        assert main(["demo", "--quick", "--out", str(out)]) == 0
    return out, SimpleNamespace(stdout=stdout.getvalue(), stderr=stderr.getvalue())


def test_demo_writes_its_files_and_nothing_else(demo):
    out, _ = demo
    figures = ("elbo_classifier", "elbo_vae", "errors", "keep_probs_classifier", "keep_probs_vae", "learned_lengths")
    figures += ("prefixes", "sorted_by_length", "widths")
    assert {path.name for path in out.iterdir()} == {
        *(f"{name}.png" for name in figures),
        "metrics.json",
        "posterior.nc",
        "posterior_vae.nc",
        "report.html",
    }
    assert [path.name for path in out.parent.iterdir()] == ["demo"]


def test_demo_prints_eight_widths_and_shows_progress(demo):
    _, done = demo
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == ["width", "accuracy", "NLL", "ECE"])
    widths = [float(line.split()[0]) for line in lines[start + 1 : start + 9]]
    assert widths == [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]
    assert "ELBO=" in done.stderr
    assert "E[L mask1]=" in done.stderr


def test_demo_metrics_agree_with_the_table(demo):
    out, done = demo
    metrics = json.loads((out / "metrics.json").read_text())
    row = metrics["classifier"]["widths"][-1]
    assert f"1.000     {row['accuracy']:.3f}" in done.stdout
    assert len(metrics["classifier"]["keep_probs"]["mask1"]) == 64
    assert set(metrics["vae"]["mse"]) >= {"1", "16"}
    for method, rows in metrics["classifier"]["baselines"].items():
        assert f"accuracy, {method}  {rows[0]['accuracy']:.3f}" in done.stdout
    errors = [1000 * metrics["vae"]["mse"]["16"], 1000 * metrics["vae"]["baselines"]["PCA"]["16"]]
    assert ["16", *(f"{error:.1f}" for error in errors)] in [line.split() for line in done.stdout.splitlines()]
    assert metrics["header"]["command"].startswith("python -m models demo")


def test_demo_report_is_self_contained(demo):
    out, _ = demo
    page = (out / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 9
    assert 'src="http' not in page
    assert "<link" not in page
    # Measures by method; laws of two masks and their prior; errors by length; the law of the code and its prior;
    # errors by mean length.
    assert page.count("<tr>") == (1 + 3 * 4) + (1 + 3) + (1 + 8) + (1 + 2) + (1 + 5)


def test_demo_ends_with_codes_as_long_as_each_image_needs(demo):
    out, done = demo
    lengths = json.loads((out / "metrics.json").read_text())["vae"]["lengths_by_image"]
    assert lengths["mse"].keys() == {"fixed", "model", "exact"}
    lines = [line.split() for line in done.stdout.splitlines()]
    for m, share in lengths["share_of_gain"].items():
        errors = [f"{1000 * lengths['mse'][law][m]:.1f}" for law in ("fixed", "model", "exact")]
        said = ["-"] if share is None else [f"{100 * share:.0f}", "%"]  # where there was nothing to gain, of few epochs
        assert [m, *errors, *said] in lines
    assert abs(sum(lengths["length_by_class"].values()) / 10 - 4) < 0.5  # the mean length at which images are shown


def test_demo_report_says_what_the_laws_have_learned(demo):
    out, _ = demo
    page, metrics = (out / "report.html").read_text(), json.loads((out / "metrics.json").read_text())
    for law in (*metrics["classifier"]["laws"].values(), *metrics["vae"]["laws"].values()):
        assert f"Total variation to the prior {law['total_variation']:.2f}; the law " in page
        assert f"<td>{law['mean']:.1f}</td><td>{law['stddev']:.1f}</td><td>{law['entropy']:.2f}</td>" in page
    for measure in ("accuracy", "NLL", "ECE", "MSE x 1000", "E[L], sd[L]", "entropy", "total variation"):
        assert f"<dt>{measure}</dt><dd>" in page


def test_demo_posterior_opens_in_arviz(demo):
    posterior = az.from_netcdf(str(demo[0] / "posterior.nc")).posterior
    assert posterior["mask1"].dims == ("chain", "draw", "data", "mask1_unit")
    assert float(posterior["mask2_length"].min()) >= 1


def test_without_a_command_the_models_are_listed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["models"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(COMMAND), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "MaskedPerceptron" in shown
    assert "OrderedVAE" in shown
    assert "mobilenet-v2" in shown


def _file_in_the_way(tmp_path):
    (tmp_path / "demo").write_text("precious")
    return tmp_path / "demo"


@pytest.mark.parametrize(
    ("data", "make_out", "message"),
    [
        (
            "mnist-3d",
            lambda tmp: tmp / "demo",
            "no settings for data set 'mnist-3d'; the demo runs on digits, ",
        ),
        ("cifar-10", lambda tmp: tmp / "demo", "no settings for data set 'cifar-10'; the demo runs on digits"),
        ("svhn", lambda tmp: tmp / "demo", "no settings for data set 'svhn'; the demo runs on digits"),
        ("fashion-mnist", lambda tmp: tmp / "demo", "no Fashion-MNIST in"),
        ("digits", _file_in_the_way, "not a writable folder"),
        ("digits", lambda tmp: _file_in_the_way(tmp) / "below", "demo"),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_nothing(data, make_out, message, tmp_path, monkeypatch, capsys):
    empty = tmp_path / "no_data"
    empty.mkdir()
    monkeypatch.setenv("FASHION_MNIST_DIR", str(empty))
    out = make_out(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["demo", "--data", data, "--out", str(out)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
