import copy
import json
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch

from benchmarks import nested_nets
from benchmarks.nested_fits import RECIPES, Data, Ensemble, build, fit_plain, member_width
from benchmarks.nested_nets import METHODS, WIDTHS, ProbsAsLogitsWidth, main, mask_schedule, uses
from benchmarks.nested_nets_report import PANELS, Rows, figures, markdown, targets
from pyro_vnd.distributions import OrderedMask


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Every method, on digits, for one epoch; the second call finds all of it done."""
    folder = tmp_path_factory.mktemp("nested_nets")
    recipe = replace(RECIPES["mlp"], epochs=1, batch_size=32, num_samples=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nested_nets, "PARTS", folder / "parts")
        patch.setattr(nested_nets, "RECIPES", {"mlp": recipe, "cnn": recipe})
        for _ in range(2):
            main(["--data", "digits", "--arch", "mlp", "--seeds", "1", "--json", str(folder / "rows.json")])
            patch.setattr(nested_nets, "train", None)
    return json.loads((folder / "rows.json").read_text())


def test_rows_are_complete(result):
    found = {(row["method"], row["width"]) for row in result["rows"] if row["metric"] == "accuracy"}
    assert {method for method, _ in found} == set(METHODS)
    for method in METHODS:
        widths = {width for name, width in found if name == method and width != "learned"}
        assert widths == ({1.0} if method == "bayes_full" else set(WIDTHS))
    assert set(result["rows"][0]) == {"data", "arch", "method", "width", "seed", "metric", "value"}
    assert {"command", "versions", "revision", "recipe"} <= set(result["header"])


def test_independent_nets_have_the_size_of_narrowed_ones(result):
    rows = Rows(result)
    for width in WIDTHS:
        sizes = {rows.mean("mlp", method, width, "parameters") for method in ("independent", "vnd", "fixed_uniform")}
        assert len(sizes) == 1


def test_only_random_weights_and_ensembles_have_mutual_information(result):
    rows = Rows(result)
    for method in METHODS:
        information = rows.mean("mlp", method, 1.0, "mutual_information")
        assert (information > 1e-6) == (method.startswith(("vnd", "bayes")) or method.endswith(("_bayes", "ensemble")))


def test_an_ensemble_costs_as_much_as_one_net(result):
    rows = Rows(result)
    for width in WIDTHS:
        cost = rows.mean("mlp", "ensemble", width, "multiply_adds")
        assert cost == pytest.approx(rows.mean("mlp", "independent", width, "multiply_adds"), rel=0.1)
    assert member_width("cnn", 28, 1 / 16, members=5) is None  # one channel is too many
    assert member_width("mlp", 28, 1 / 4, members=1) == 1 / 4


def test_members_of_an_ensemble_are_trained_as_each_alone():
    torch.set_default_dtype(torch.float32)
    data, recipe = Data.load("digits"), replace(RECIPES["mlp"], epochs=1, batch_size=32)
    torch.manual_seed(0)
    nets = [build("mlp", 8, 1 / 16) for _ in range(2)]
    start, together = nets[0][1].weight.detach().clone(), Ensemble(copy.deepcopy(nets))
    fit_plain(together, 0, data, recipe)
    for net, member in zip(nets, together, strict=True):
        fit_plain(net, 0, data, recipe)
        torch.testing.assert_close(member[1].weight, net[1].weight, atol=1e-3, rtol=0)
    assert (nets[0][1].weight - start).abs().max() > 0.01


@pytest.mark.parametrize("law", ["geometric", "uniform"])
def test_like_for_like_baselines_have_our_passes(law):
    recipe = RECIPES["mlp"]
    usual, passes, bayes = (mask_schedule(f"fixed_{law}{kind}", recipe) for kind in ("", "_passes", "_bayes"))
    ours = mask_schedule("vnd", recipe)
    assert repr(passes) == repr(bayes)
    assert (passes.num_particles, passes.sliced) == (ours.num_particles, ours.sliced) == (4, True)
    assert (usual.num_particles, usual.sliced) == (1, False)
    assert not any(schedule.learned for schedule in (usual, passes))
    assert uses(f"fixed_{law}_passes", "num_particles")
    assert not uses(f"fixed_{law}", "num_particles")
    assert uses(f"fixed_{law}_bayes", "kl_weight")
    assert not uses(f"fixed_{law}_passes", "kl_weight")


def test_comparing_recipes_leaves_the_test_part_alone():
    test, validation = Data.load("digits"), Data.load("digits", "validation")
    assert torch.equal(validation.scored[0], test.calibration[0])
    assert validation.calibration is None
    assert set(validation.ood) == set(test.ood)
    for name, images in validation.ood.items():
        seen = {row.numpy().tobytes() for row in test.ood[name].flatten(1)}
        assert not any(row.numpy().tobytes() in seen for row in images.flatten(1))


def test_a_recipe_is_changed_for_other_seeds_on_the_validation_part(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(nested_nets, "PARTS", tmp_path / "parts")
    file = tmp_path / "rows.json"
    arguments = ["--data", "digits", "--arch", "mlp", "--methods", "fixed_uniform", "--seeds", "1", "--json", str(file)]
    main([*arguments, "--part", "validation", "--first-seed", "10", "--set", "epochs=1", "batch_size=32"])
    content = json.loads(file.read_text())
    assert {row["seed"] for row in content["rows"]} == {10}
    assert content["header"]["part"] == "validation"
    assert content["header"]["recipe"]["mlp"]["epochs"] == 1
    assert "ece_calibrated" not in {row["metric"] for row in content["rows"]}


@pytest.mark.parametrize(
    "arguments",
    [["--set", "no_field=1"], ["--set", "epochs=1.5"], ["--set", "epochs"], ["--part", "validation"]],
    ids=" ".join,
)
def test_bad_arguments_are_named(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert arguments[-1] in capsys.readouterr().err


def test_tables_margins_and_figure(result):
    rows = Rows(result)
    accuracy = rows.mean("mlp", "vnd", 1.0, "accuracy")
    assert f"| {accuracy:.3f} |" in markdown(result)
    margins = {(row["what"], row["width"]): row["margin"] for row in targets(rows, "mlp")}
    better = max(rows.mean("mlp", f"fixed_{law}_passes", 1.0, "accuracy") for law in ("geometric", "uniform"))
    assert margins["accuracy, fixed rate", 1.0] == pytest.approx(accuracy - better)
    (drawn,) = figures(result).values()
    assert [ax.get_title() for ax in drawn.axes] == list(PANELS.values())
    assert all(ax.has_data() for ax in drawn.axes)
    plt.close(drawn)


def test_the_cnn_scales_with_its_width():
    small, whole = (build("cnn", 28, width) for width in (1 / 16, 1.0))
    assert small(torch.zeros(2, 1, 28, 28)).shape == whole(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert small[0].out_channels == 2


def test_probabilities_as_logits_miss_the_law():
    torch.manual_seed(0)
    law = OrderedMask(probs=torch.tensor([0.9, 0.05, 0.03, 0.02]))
    width = ProbsAsLogitsWidth("hidden", 4, init=law)
    with torch.no_grad():
        lengths = width.posterior.rsample((4000,)).sum(-1)
    share = (lengths == 1).float().mean()
    expected = law.probs.softmax(-1)[0]  # near uniform, whatever was learned
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5
    assert expected < 0.5 < law.probs[0]
