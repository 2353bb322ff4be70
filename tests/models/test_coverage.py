"""Coverage of other packages' nets, without these packages."""

import math
import re

import pytest
import torch
from torch import nn

from benchmarks.report import PAGES
from models.nets import coverage, coverage_nets
from models.nets.coverage import TARGETS, is_exact, main, markdown, measure, outputs, shaken
from models.nets.coverage_nets import NETS


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32))
        self.block = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        return {"logits": self.head((x + self.block(x)).relu().mean((2, 3)))}


def test_a_net_is_measured():
    net, x = shaken(Classifier()), torch.randn(2, 3, 8, 8)
    row = measure(net, (x,))
    assert row["nested"]
    assert row["trained"]
    assert row["groups"] == 1
    assert not row["warned"]
    assert row["max_difference"] < 1e-12
    assert row["zeroed_difference"] < 1e-12 < row["changed"]
    eighth = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
    left = [*eighth.parameters(), *nn.Linear(8, 5).parameters()]
    share = sum(p.numel() for p in left) / sum(p.numel() for p in net.parameters())
    assert row["share_of_parameters"] == pytest.approx(share, rel=1e-3)
    assert 0 < row["whole_share"] < share
    assert is_exact(row)


def test_all_numbers_that_a_net_returns_are_compared():
    returned = {"logits": torch.ones(2), "rest": (torch.zeros(1), [torch.full((1, 1), 3.0), torch.tensor([7]), None])}
    assert outputs(returned).tolist() == [1.0, 1.0, 0.0, 3.0]


@pytest.mark.parametrize("wrong", [{"max_difference": 2e-4}, {"zeroed_difference": math.inf}, {"nested": False}])
def test_a_net_that_differs_is_not_exact(wrong):
    row = {"nested": True, "max_difference": 1e-7, "zeroed_difference": 1e-7}
    assert is_exact(row)
    assert not is_exact(row | wrong)


def test_constants_that_hide_a_part_of_a_net_are_changed():
    net = Classifier()
    nn.init.zeros_(net.block[1].weight)
    net.scale = nn.Parameter(torch.full((32, 1, 1), 1e-6))
    shaken(net)
    assert net.block[1].weight.abs().min() >= 0.5
    assert net.scale.std() > 0.1
    assert not torch.equal(net.block[1].running_var, torch.ones(32))


def test_the_lists_have_the_lengths_that_they_were_given():
    counts = {source: sum(of == source for of, _ in NETS) for source in TARGETS}
    assert list(counts.values()) == [80, 7, 100, 9]
    assert len(set(NETS)) == len(NETS) == 196


def test_rows_are_of_listed_nets_and_in_their_order():
    (result,) = PAGES["coverage"].read_results()
    places = [NETS.index((row["source"], row["family"])) for row in result["rows"]]
    assert places == sorted(set(places))


def test_failures_and_timeouts_are_rows(tmp_path, monkeypatch, capsys):
    nets = [("timm", "fine"), ("timm", "absent"), ("timm", "slow")]

    def build(source, name):
        if name == "absent":
            raise LookupError("no such net")
        if name == "slow":
            torch.ones(1)
            while True:
                pass
        return Classifier(), (torch.randn(2, 3, 8, 8),)

    monkeypatch.setattr(coverage, "NETS", nets)
    monkeypatch.setattr(coverage, "build", build)
    monkeypatch.setattr(coverage, "PACKAGES", ("torch",))
    monkeypatch.setattr(coverage, "PRUNING_SECONDS", 5.0)
    path = tmp_path / "coverage.json"
    main(["--json", str(path), "--timeout", "5"])
    printed = capsys.readouterr().out
    rows = {row["family"]: row for row in coverage.json.loads(path.read_text())["rows"]}
    assert list(rows) == ["fine", "absent", "slow"]
    assert rows["fine"]["nested"]
    assert not rows["fine"]["error"]
    assert is_exact(rows["fine"])
    assert rows["absent"]["error"] == "LookupError: no such net"
    assert not rows["absent"]["nested"]
    assert rows["slow"]["error"] == "took longer than 5 s"
    assert re.search(r"\| timm \| 3 \| 1 \(85\) \| 1 \(75\) \| 1 \| [01] of 3 \|", printed)  # with torch-pruning or not
    assert "| `absent` | - | does not nest |" in printed


def test_unknown_names_are_named(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "nonesuch"])
    assert "no net or source is called nonesuch" in capsys.readouterr().err


def test_images_are_the_smallest_that_a_net_takes():
    class Large(Classifier):
        def forward(self, x):
            if x.shape[-1] < 100:
                raise ValueError("too small")
            return super().forward(x)

    net = Large()
    before = net.stem[1].running_mean.clone()
    _, (images,) = coverage_nets._fitting(net, (64, 96, 128, 160))
    assert images.shape == (2, 3, 128, 128)
    assert torch.equal(net.stem[1].running_mean, before)
    assert not net.training
    with pytest.raises(ValueError, match="takes images of none of these sizes"):
        coverage_nets._fitting(net, (64, 96))


def test_tables_count_what_is_exact_and_small():
    fine = {"source": "timm", "family": "a", "nested": True, "error": "", "revision": "1", "parameters": 10**6}
    fine |= {"max_difference": 1e-7, "share_of_parameters": 0.1, "whole_share": 0.01, "seconds": 1, "trained": True}
    rows = [
        fine | {"pruning": {"error": "", "share_of_parameters": 0.3}},
        fine | {"family": "b", "share_of_parameters": 0.5},
        fine | {"family": "c", "max_difference": 1e-3, "pruning": {"error": "no"}},
    ]
    assert "| timm | 3 | 2 (85) | 1 (75) | 2 | 1 of 2 | 0 |" in markdown({"rows": rows, "packages": {"torch": "2"}})
