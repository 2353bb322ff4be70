"""Every net of the zoo can be nested, trained on real digits, cut and narrowed."""

import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from torch import nn

from models.__main__ import main
from models.datasets import Dataset, Split, load
from models.nested_zoo import RECIPES, Recipe, load_state, make, train
from models.nets import NETS, build
from pyro_vnd.diagnostics import evaluate_widths
from pyro_vnd.nn import narrow, nest, recalibrate_batchnorm


@pytest.fixture(autouse=True)
def single_precision(double_precision) -> None:
    """Nets as people train them; the fixture for all tests puts back what was the default before."""
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def num_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def forget_deviations(net) -> None:
    """Shrink the posterior of the weights to its mean, so that a draw of the net is the net at the mean."""
    with torch.no_grad():
        for layer in net.layers.values():
            for log_scale in layer.log_scales.values():
                log_scale.fill_(-60.0)


@pytest.mark.parametrize("name", NETS)
def test_small_nets_are_nested_trained_and_narrowed(name, digits):
    images, labels = (rows[:96] for rows in digits.train)
    net = make(name, digits.image_shape, 10, "small", num_blocks=4)
    recipe = Recipe(epochs=12 if name.startswith(("lenet", "vgg11")) else 4, batch_size=32, lr=0.02, kl_weight=0.001)
    result = train(net, replace(digits, train=Split(images, labels)), recipe)
    assert result.elbo[-1] > result.elbo[0]
    quarter = len(result.log_likelihood) // 4  # one epoch of three steps is noisy
    assert sum(result.log_likelihood[-quarter:]) > sum(result.log_likelihood[:quarter]) + 0.03 * quarter

    net.eval()
    for width in (0.25, 0.5, 1.0):
        outputs = net.predict(images[:3], width=width, rounding="nearest", num_samples=2)
        assert outputs.shape == (2, 3, 10)
        assert outputs.isfinite().all()
        assert (outputs[0] != outputs[1]).all()

    forget_deviations(net)
    cut = narrow(net, 0.25, rounding="nearest")
    assert num_parameters(cut) < 0.6 * num_parameters(narrow(net, 1.0))
    with torch.no_grad():
        for width in (0.25, torch.full((len(images),), 0.25)):  # computed in part, and in full under masks
            outputs = net.predict(images, width=width, rounding="nearest")[0]
            torch.testing.assert_close(cut(images), outputs, rtol=1e-5, atol=1e-5)

    norms = [module for module in cut.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert bool(norms) == (name not in ("mlp", "lenet", "vit"))
    before = [norm.running_mean.clone() for norm in norms]
    recalibrate_batchnorm(cut, images, batch_size=32)
    for norm, mean in zip(norms, before, strict=True):
        assert norm.num_batches_tracked == 3
        assert not norm.running_mean.allclose(mean)


SLOW = ("vgg11-wide", "resnext29")
FULL = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NETS]


@pytest.mark.parametrize("name", FULL)
def test_nets_of_the_published_sizes_are_nested_and_narrowed(name):
    shape = (1, 28, 28) if name in ("mlp", "lenet") else (3, 32, 32)
    plain = build(name, shape)
    net = nest(plain, torch.rand(1, *shape), num_blocks=16).eval()
    image = torch.rand(1, *shape)
    with torch.no_grad():
        whole, half = narrow(net, 1.0), narrow(net, 0.5, rounding="nearest")
        torch.testing.assert_close(whole(image), plain.eval()(image), rtol=1e-3, atol=1e-3)
        assert net.predict(image, width=0.5, rounding="nearest").shape == (1, 1, 10)
        assert half(image).shape == (1, 10)
    assert num_parameters(half) < 0.8 * num_parameters(whole)
    assert num_parameters(whole) == num_parameters(plain)


def test_lenet_learns_real_digits_at_every_width(digits):
    net = make("lenet", digits.image_shape, 10, "small", num_blocks=16)
    train(net, digits, Recipe(epochs=20, batch_size=128, lr=0.02))
    scores = evaluate_widths(net, digits.validation, [0.25, 0.5, 1.0], num_samples=5, progress=False).squeeze("seed")
    assert scores["accuracy"].sel(width=0.25) > 0.9  # chance is .1
    assert scores["accuracy"].sel(width=1.0) > 0.95
    narrow_nll, half_nll, full_nll = scores["nll"].values
    assert narrow_nll > half_nll
    assert half_nll > full_nll
    assert (scores["parameters"].diff("width") > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("alexnet", (1, 8, 8)), "unknown net 'alexnet'; known are mlp, lenet"),
        (("lenet", (1, 8, 8), 10, "tiny"), "`size` must be one of small, full; got 'tiny'"),
        (("lenet", (1, 8, 9)), r"`image_shape` must be square for lenet; got \(1, 8, 9\)"),
        (("lenet", (8, 8)), r"`image_shape` must be \(channels, height, width\); got \(8, 8\)"),
        (("vit", (1, 30, 30)), "`patch` must divide the image's size, 30; got 4"),
    ],
)
def test_build_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("size", ["small", "full"])
def test_all_nets_are_built_for_all_data(name, shape, size):
    with torch.device("meta"):  # sizes without memory
        net = build(name, shape, 7, size).eval()
        assert net(torch.zeros(1, *shape)).shape == (1, 7)
        assert size == "full" or num_parameters(net) < num_parameters(build(name, shape, 7)) / 3


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> tuple[Path, str, str]:
    """What the command line leaves and prints after next to no training."""
    out = tmp_path_factory.mktemp("results") / "nest" / "vgg11"
    options = ["--epochs", "1", "--widths", "0.25", "1.0", "--out", str(out)]
    with redirect_stdout(StringIO()) as stdout, redirect_stderr(StringIO()) as stderr:
        assert main(["nest", "vgg11", *options]) == 0
    return out, stdout.getvalue(), stderr.getvalue()


def test_command_writes_its_files_and_nothing_else(command):
    out, _, _ = command
    figures = ("elbo", "laws", "metrics", "ood", "reliability")
    assert {path.name for path in out.iterdir()} == {*(f"{name}.png" for name in figures), "metrics.json", "state.pt"}
    assert [path.name for path in out.parent.iterdir()] == ["vgg11"]


def test_command_prints_a_table_that_agrees_with_its_numbers(command):
    out, stdout, stderr = command
    metrics = json.loads((out / "metrics.json").read_text())
    lines = [line.split() for line in stdout.splitlines()]
    start = lines.index(["width", "accuracy", "NLL", "ECE", "AUROC", "parameters"])
    for cells, row in zip(lines[start + 1 :], metrics["widths"], strict=False):
        assert cells[:3] == [f"{row['width']:.3f}", f"{row['accuracy']:.3f}", f"{row['nll']:.3f}"]
        assert set(row["auroc"]) == {"inverted", "rotated", "noise"}  # other digits are no foreigners here
    assert lines[start + 3][0] == "learned"
    assert metrics["header"]["command"] == (
        "python -m models nest vgg11 --data digits --epochs 1 --seed 0 --widths 0.25 1"
    )
    assert "ELBO=" in stderr


def test_state_holds_both_nets(command, digits):
    out, _, _ = command
    nested, narrowed = load_state(out / "state.pt")
    metrics = json.loads((out / "metrics.json").read_text())
    for (name, law), keep_probs in zip(nested.laws.items(), metrics["keep_probs"].values(), strict=True):
        assert law.keep_probs.tolist() == pytest.approx(keep_probs, abs=1e-5), name
    images = digits.validation.images[:5]
    with torch.no_grad():
        again = narrow(nested, metrics["narrowed"], rounding="nearest")
        recalibrate_batchnorm(again, digits.train.images[:1000])
        torch.testing.assert_close(narrowed(images), again(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["alexnet"], "unknown net 'alexnet'; known are mlp"),
        (["lenet", "--data", "mnist-3d"], "unknown data set 'mnist-3d'; known are digits"),
        (["lenet", "--widths", "0.5", "1.5"], "width 1.5 is invalid"),
        (["lenet", "--epochs", "0"], "`num_epochs` must be an integer at least 1; got 0"),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_nothing(arguments, message, tmp_path, capsys):
    assert main(["nest", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_one_line(tmp_path, capsys):
    assert main(["nest", "lenet", "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "python -m models nest: torch finds no GPU here; got device 'cuda'\n"


@pytest.mark.gpu
def test_a_net_is_trained_scored_and_narrowed_on_a_gpu(tmp_path):
    out = tmp_path / "out"
    assert main(["nest", "vgg11", "--device", "cuda", "--epochs", "1", "--widths", "0.5", "1", "--out", str(out)]) == 0
    nested, _ = load_state(out / "state.pt")
    assert next(nested.parameters()).device.type == "cpu"


def test_a_fit_that_fails_leaves_earlier_results_alone(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.json").write_text("precious")
    monkeypatch.setitem(RECIPES, "digits", Recipe(epochs=1, batch_size=128, lr=1e30))
    assert main(["nest", "mlp", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("python -m models nest: ")
    assert (out / "metrics.json").read_text() == "precious"
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "metrics.json"]
