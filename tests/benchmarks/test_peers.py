import copy
import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import ordered_speed, peers, predictions, report
from benchmarks.by_hand import BayesianNet
from benchmarks.peers import NETS, WORKS, main, markdown, merged
from benchmarks.predictions import narrowed, outputs_by_hand
from models.nets import lenet, mlp
from pyro_vnd.infer import LocalReparameterization, NestedELBO, module_local_params
from pyro_vnd.nn import NestedClassifier, nest

SMALL = {
    "mlp": partial(mlp, 64, hidden=(16, 16)),
    "lenet": partial(lenet, channels=(16, 16), hidden=16, image_size=8),
}


def quiet(net, length):
    """Let a nested net have next to no noise, and masks of one length."""
    for name, parameter in net.named_parameters():
        if "log_scale" in name:
            parameter.data.fill_(-20.0)
        elif name.endswith("logits"):
            parameter.data.fill_(0.0)[..., length - 1] = 50.0
    return net


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_the_loop_by_hand_has_the_objective_of_ours(make, local):
    x, y = torch.rand(6, 1, 8, 8), torch.randint(10, (6,))
    plain = make()
    net = quiet(nest(plain, x[:1], num_blocks=4), 3)
    by_hand = quiet(BayesianNet(copy.deepcopy(plain), local=local, num_blocks=4, num_data=len(x)), 3)
    model = NestedClassifier(net)
    with module_local_params(model, net.guide), LocalReparameterization() if local else nullcontext():
        ours = NestedELBO()(model, net.guide)(x, y) / len(x)
    theirs = by_hand.loss(x, y)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
    ours.backward()
    theirs.backward()
    means = [(part.weight, part.bias) for part in by_hand.parts if hasattr(part, "log_scale")]
    for layer, (weight, bias) in zip(net.layers.values(), means, strict=True):
        torch.testing.assert_close(layer.plain.weight.grad, weight.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(layer.plain.bias.grad, bias.grad, rtol=1e-3, atol=1e-6)


def test_the_loop_by_hand_learns():
    torch.manual_seed(0)
    x = torch.rand(64, 1, 8, 8)
    net = BayesianNet(SMALL["mlp"](), local=True, num_blocks=4, num_data=10_000)
    step = peers.adam_step(net.parameters(), net.loss, lr=1e-2)
    y = (x.mean((1, 2, 3)) > 0.5).long()
    before = net.loss(x, y).item()
    for _ in range(100):
        step(x, y)
    assert net.loss(x, y).item() < before - 1


def test_predictions_by_hand_are_those_of_ours(monkeypatch):
    for name, value in (("DRAWS", 3), ("ROWS", 20), ("BATCH", 8), ("SCORED_DRAWS", 3), ("SCORED_ROWS", 20)):
        monkeypatch.setattr(predictions, name, value)
    net = quiet(predictions.perceptron(), 5)
    monkeypatch.setattr(predictions, "perceptron", lambda: net)
    draws, scores = predictions.draws_of_inputs(), predictions.scores_at_a_width()
    assert draws["ours"]().shape == (3, 20, 10)
    torch.testing.assert_close(draws["ours"](), draws["by hand"]())
    assert scores["ours"]()["nll"].item() == pytest.approx(scores["by hand"]()["nll"])
    one = predictions.one_input_at_a_width()
    assert one["ours"]().squeeze(0).shape == one["built so"]().shape == (1, 10)


def test_masks_by_hand_are_drawn_for_each_row_and_keep_prefixes():
    torch.manual_seed(0)
    n, keep = 20_000, torch.tensor([1.0, 0.7, 0.2])
    eye, zeros = torch.eye(3), torch.zeros(3)
    kept = outputs_by_hand([(eye, zeros), (eye, zeros)], torch.ones(n, 3), [keep])
    assert (kept.diff(dim=-1) <= 0).all()

    def largest_z(probs):
        return ((kept.mean(0) - probs) * (n / (probs * (1 - probs) + 1e-9)).sqrt()).abs().max()

    assert largest_z(keep) < 4 < 10 < largest_z(torch.tensor([1.0, 0.65, 0.25]))


def test_a_draw_is_cut_to_the_net_that_was_built_so():
    plain, small = mlp(8, 3, (16, 16)), mlp(8, 3, (4, 4))
    layers = [(module.weight, module.bias) for module in plain if hasattr(module, "weight")]
    cut = narrowed(layers, 0.25)
    assert [weight.shape for weight, _ in cut] == [m.weight.shape for m in small if hasattr(m, "weight")]
    x = torch.rand(5, 8)
    hidden = (x @ layers[0][0].T + layers[0][1]).relu() * (torch.arange(16) < 4)
    hidden = (hidden @ layers[1][0].T + layers[1][1]).relu() * (torch.arange(16) < 4)
    torch.testing.assert_close(outputs_by_hand(cut, x), hidden @ layers[2][0].T + layers[2][1])


def test_runs_and_reports(tmp_path, monkeypatch, capsys):
    torch.set_default_dtype(torch.float32)
    threads = torch.get_num_threads()
    small = {"lenet_64": replace(NETS["lenet_64"], make=SMALL["lenet"], shape=(1, 8, 8), batch_size=2, steps=1)}
    for name in ("mlp_128", "mlp_1024", "wide"):
        small[name] = replace(NETS[name], make=SMALL["mlp"], shape=(1, 8, 8), batch_size=2, steps=1)
    monkeypatch.setattr(peers, "NETS", NETS | small | {"tiny": replace(NETS["tiny"], steps=2)})
    monkeypatch.setattr(peers, "VAE_STEPS", 1)
    monkeypatch.setattr(peers, "MIN_ROUNDS", 1)
    monkeypatch.setattr(peers, "RECIPE", replace(peers.RECIPE, batch_size=4))
    monkeypatch.setattr(ordered_speed, "RECIPE", replace(ordered_speed.RECIPE, batch_size=4))
    for name, value in (("DRAWS", 3), ("ROWS", 20), ("BATCH", 8), ("SCORED_DRAWS", 3), ("SCORED_ROWS", 20)):
        monkeypatch.setattr(predictions, name, value)
    path = tmp_path / "peers.json"
    main(["--seconds", "0", "--repeats", "2", "--json", str(path)])
    result = json.loads(path.read_text())
    assert torch.get_num_threads() == threads
    assert result["header"]["machine"]["threads"] == 1
    there = {*result["packages"], "by hand", "built so"}
    expected = [(name, *row[:2]) for name, work in WORKS.items() for row in work.rows if row[1] in there]
    assert [(row["work"], row["ours"], row["theirs"]) for row in result["rows"]] == expected
    assert all(len(row["ratios"]) == 2 for row in result["rows"])
    assert all(row["cost_of_ours"] > 0 for row in result["rows"] if row["work"] in ("draws", "widths", "mask"))
    table = capsys.readouterr().out
    assert table == markdown(result) + "\n"
    assert table.count("not installed") == len([row for work in WORKS.values() for row in work.rows]) - len(expected)
    (nest_cost,) = report.PAGES["nest_cost"].read_results()
    assert "exponent of its time in the layers of a perceptron" in markdown(result, nest_cost)


def row(work, theirs, ratio):
    ours = {"mask": ""}.get(work, "ours")
    return {"work": work, "ours": ours, "theirs": theirs, "cost_of_ours": 1.0, "cost_of_theirs": 1.0, "ratios": [ratio]}


def test_a_run_of_some_works_replaces_their_rows():
    whole = {"header": "first", "packages": {"TyXe": "1"}, "rows": [row("widths", "by hand", 1), row("gone", "x", 1)]}
    part = {"header": "second", "packages": {"pythae": "2"}, "rows": [row("mask", "by hand", 2)]}
    found = merged(merged(whole, part), part | {"header": "third", "rows": [row("widths", "by hand", 3)]})
    assert found["rows"] == [row("widths", "by hand", 3), row("mask", "by hand", 2)]
    assert (found["header"], found["later_headers"]) == ("first", ["second", "third"])
    assert found["packages"] == {"TyXe": "1", "pythae": "2"}


def test_the_table_says_what_was_met():
    ratios = [1.3, 1.1, 1.9, 1.2, 1.25]
    made = {"packages": {}, "rows": [row("widths", "by hand", 0) | {"ratios": ratios}, row("mask", "by hand", 1.5)]}
    lines = markdown(made).splitlines()
    (widths,) = (line for line in lines if "evaluate_widths" in line)
    (mask,) = (line for line in lines if "a mask of" in line)
    assert widths.endswith("| 1.25 | 1.10 to 1.90 | 1.3 | yes |")
    assert mask.endswith("| 1.50 | 1.50 to 1.50 | 1.4 | no |")
    assert sum("| TyXe | not installed |" in line for line in lines) == 4
