import json
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import pytest
import torch

from benchmarks import ordered_latents
from benchmarks.ordered_latents import METHODS, MODELS, RECIPE, PrincipalComponents, build, main, uses
from benchmarks.ordered_latents_report import LABELS, PANELS, figures, markdown, targets, targets_table
from benchmarks.tables import Rows
from models.features import FeatureRecipe, train_features

PREFIXES = [1, 2, 4]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Every method, on digits, for one epoch; the second call finds all of it done."""
    folder = tmp_path_factory.mktemp("ordered_latents")
    recipe = replace(
        RECIPE,
        epochs=1,
        prior_epochs=1,
        batch_size=64,
        num_latents=4,
        codebook_size=8,
        num_importance=2,
        num_generated=100,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # weights of the features go to results/
        patch.setattr(ordered_latents, "RECIPE", recipe)
        small = FeatureRecipe(channels=(8, 16), num_features=16, num_epochs=2)
        patch.setattr(ordered_latents, "train_features", partial(train_features, recipe=small))
        for _ in range(2):
            main(["--data", "digits", "--seeds", "1", "--json", str(folder / "rows.json")])
            patch.setattr(ordered_latents, "train", None)
        main(["--data", "digits", "--seeds", "3", "--join", "--json", str(folder / "joined.json")])
        rows = [json.loads((folder / name).read_text())["rows"] for name in ("rows.json", "joined.json")]
        assert rows[0] == rows[1]  # nothing was fitted for the other seeds
    return json.loads((folder / "rows.json").read_text())


@pytest.fixture
def rows(result):
    return Rows(result, "model", "prefix", LABELS)


def test_rows_are_complete(result):
    found = {(row["model"], row["method"], row["prefix"]) for row in result["rows"] if row["metric"] == "mse"}
    for model in MODELS:
        for method in METHODS:
            prefixes = {prefix for *key, prefix in found if key == [model, method]}
            only = {"beta_vae": ["plain"], "vae_our_parts": ["plain", "fixed_geometric", "fixed_uniform"]}
            absent = (method == "pca" and model != "linear") or method not in only.get(model, METHODS)
            expected = set() if absent else set(PREFIXES)
            assert prefixes == expected, (model, method)
    assert set(result["rows"][0]) == {"data", "model", "method", "prefix", "seed", "metric", "value"}
    assert {"command", "versions", "revision", "recipe", "features"} <= set(result["header"])


def test_what_is_learned_is_reported(rows):
    for model in ("vae", "wae", "linear"):
        assert 1 <= rows.mean(model, "vnd", "law", "mean_length") <= 4
        assert rows.mean(model, "plain", "law", "mean_length") == 4
    assert rows.mean("vae", "fixed_uniform", "law", "mean_length") == pytest.approx(2.5)
    for metric in ("elbo", "iw_bound", "fid_samples", "kid_reconstructions", "probe_accuracy", "nearest_sample"):
        assert ("vae", "vnd", 2, metric) in rows.values, metric


def test_methods_have_one_architecture():
    """What ours has more is what completes codes, the noises, the prior of the VAE, and the law of the lengths."""
    for model in MODELS:
        sizes = {}
        for method in METHODS[:4]:
            parameters = build(model, method, 8, RECIPE).named_parameters()
            sizes[method] = {name: tuple(p.shape) for name, p in parameters}
        assert sizes["plain"] == sizes["fixed_uniform"] == sizes["fixed_geometric"]
        more = {name for name, shape in sizes["vnd"].items() if sizes["plain"].get(name) != shape}
        lengths = {"encoder.heads.weight", "encoder.heads.bias", "encoder.length_logits"}
        prior = {name for name in more if name.startswith("conditioner.")}
        decoder = {name for name in more if name.startswith(("decoder.completion.", "likelihood.log_scale"))}
        assert more - decoder - prior <= lengths
        assert bool(decoder) == (model not in ("linear", "vae_our_parts"))
        assert bool(prior) == (model in ("vae", "beta_vae"))  # of which the latter is only ever plain


def test_principal_components_are_those_of_the_data():
    x = torch.randn(500, 1, 2, 3).double() * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.1]).reshape(2, 3) + 1
    pca = PrincipalComponents(x, 4)
    variances = torch.linalg.eigvalsh(x.flatten(1).T.cov()).flip(-1)
    for length in (1, 3):
        error = (pca.reconstruct(x, length) - x).square().sum() / (len(x) - 1)
        torch.testing.assert_close(error, variances[length:].sum())
    torch.testing.assert_close(
        pca.sample(100_000, 4).flatten(1).T.cov().trace(), variances[:4].sum(), rtol=0.02, atol=0
    )


def test_a_fit_is_done_again_only_for_what_it_depends_on():
    assert uses("vae", "vnd", "full")
    assert not uses("vae", "plain", "full")
    assert uses("beta_vae", "plain", "beta")
    assert not uses("vae", "plain", "beta")
    assert uses("vae", "fixed_geometric", "keep")
    assert not uses("vae", "fixed_uniform", "keep")
    assert not uses("linear", "pca", "epochs")
    assert uses("vae", "vnd", "prior_epochs")
    assert uses("vae_our_parts", "plain", "prior_epochs")
    assert not uses("vae", "plain", "prior_epochs")


def test_tables_targets_and_figure(result, monkeypatch):
    monkeypatch.setattr("benchmarks.ordered_latents_report.PREFIXES", (1, 2, 4))
    rows = Rows(result, "model", "prefix", LABELS)
    error = 1000 * rows.mean("vae", "vnd", 4, "mse")
    assert f"| {error:.1f} |" in markdown(result)
    found = {(row["what"], row["prefix"]): row for row in targets(rows)}
    better = min(rows.mean("vae", method, 2, "mse") for method in ("fixed_geometric", "fixed_uniform"))
    row = found["MSE / better fixed law's", 2]
    assert row["value"] == pytest.approx(rows.mean("vae", "vnd", 2, "mse") / better)
    assert row["met"] == (row["value"] <= 1.02)
    lost = 1 - rows.mean("vae", "vnd", 4, "elbo") / rows.mean("vae", "plain", 4, "elbo")
    assert found["ELBO, share that is lost to the plain VAE's", 4]["value"] == pytest.approx(lost)
    distance = rows.mean("vae", "vnd", "law", "fid_samples_prior") / rows.mean(
        "vae_our_parts", "plain", "law", "fid_samples_prior"
    )
    row = found["FID of samples with lengths from the prior / plain VAE's with our parts", 4]
    assert row["value"] == pytest.approx(distance)
    assert targets_table(rows).count("\n") == 12
    assert targets_table(rows) in markdown(result)
    drawn = figures(result)
    assert [ax.get_title() for ax in drawn["ordered_vae"].axes] == [label for label, _, _ in PANELS.values()]
    assert all(ax.has_data() for figure in drawn.values() for ax in figure.axes)
    plt.close("all")


def test_the_test_part_is_for_the_committed_file(capsys):
    with pytest.raises(SystemExit):
        main(["--part", "validation"])
    assert "--part validation needs --json FILE" in capsys.readouterr().err
