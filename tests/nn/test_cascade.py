"""Nets that are as wide as each row needs."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from written_nets import Net

from models import nets
from pyro_vnd.diagnostics import net_cost
from pyro_vnd.nn import (
    CascadeNet,
    NestedLayer,
    NestedModel,
    NestedNet,
    NormalTargets,
    Width,
    narrow,
    nest,
    recalibrate_batchnorm,
)

STAGES = [1, 2, 4]


def small_net() -> NestedNet:
    """A net that is sure of some rows at each width, and of others not."""
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight.mul_(3)
    return nest(nn.Sequential(*layers), torch.zeros(1, 8), num_blocks=4)


def entropies(net, x):
    """Entropy at the width of each stage, (number of stages, N)."""
    logits = torch.stack([narrow(net, blocks)(x) for blocks in STAGES]).detach()
    return torch.distributions.Categorical(logits=logits).entropy()


def halving(net, x) -> CascadeNet:
    """A cascade whose stages each send about half of the rows on."""
    return CascadeNet(net, STAGES, entropies(net, x)[:-1].quantile(0.5, 1).tolist())


@pytest.fixture(scope="module")
def rows():
    return torch.randn(300, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# What it computes.


def test_thresholds_of_zero_and_infinity_are_the_widest_and_the_narrowest_net(family):
    plain, images = family
    net = nest(plain, images[:2], num_blocks=4).eval()
    for threshold, blocks, stage in ((0.0, 4, 2), (math.inf, 1, 0)):
        logits, stages = CascadeNet(net, STAGES, threshold).run(images)
        torch.testing.assert_close(logits, narrow(net, blocks)(images), rtol=1e-9, atol=1e-9)
        assert stages.tolist() == [stage] * len(images)


def test_every_stage_predicts_what_the_narrowed_net_does(family):
    plain, images = family
    net = nest(plain, images[:2], num_blocks=4).eval()
    for (stage, inputs), blocks in zip(CascadeNet(net, STAGES, 0.5).parts(images), STAGES, strict=True):
        torch.testing.assert_close(stage(*inputs)[0], narrow(net, blocks)(images), rtol=1e-9, atol=1e-9)


def test_float32_agrees_to_a_hundred_thousandth(family):
    plain, images = family[0].float(), family[1].float()
    net = nest(plain, images[:2], num_blocks=4).eval()
    logits = CascadeNet(net, STAGES, 0.0)(images)
    torch.testing.assert_close(logits, narrow(net, 4)(images), rtol=1e-5, atol=1e-5)


def test_what_is_counted_is_what_is_computed(family):
    plain, images = family
    net = nest(plain, images[:2], num_blocks=4)
    cascade, counted = CascadeNet(net, STAGES, 0.5), []
    for stage, inputs in cascade.parts(images[:1]):
        counted.append(net_cost(stage, *inputs)["multiply_adds"])
    assert cascade.multiply_adds == counted  # neither has the fused products of attention
    alone = [CascadeNet(net, [blocks]).multiply_adds[0] for blocks in STAGES]
    assert counted[0] == alone[0]
    assert all(more < whole for more, whole in zip(counted[1:], alone[1:], strict=True))  # the rest was known


def test_a_perceptron_pays_for_a_narrower_stage_by_its_last_layers_alone():
    net = small_net()  # 8-16-16-3
    cascade = CascadeNet(net, [1, 4], 0.5)
    assert cascade.whole_cost == 8 * 16 + 16 * 16 + 16 * 3
    assert cascade.multiply_adds == [8 * 4 + 4 * 4 + 4 * 3, cascade.whole_cost - 8 * 4 - 4 * 4]
    assert cascade.costs.tolist() == [60, cascade.whole_cost + 4 * 3]


def test_rows_stop_where_their_doubt_is_below_the_threshold(rows):
    net = small_net()
    logits, stages = (cascade := halving(net, rows)).run(rows)
    alone = torch.stack([narrow(net, blocks)(rows) for blocks in STAGES])
    is_sure = entropies(net, rows)[:-1] < cascade.thresholds[:, None]
    expected = torch.where(is_sure[0], 0, torch.where(is_sure[1], 1, 2))
    assert stages.bincount(minlength=3).min() > 10
    assert torch.equal(stages, expected)
    torch.testing.assert_close(logits, alone[expected, torch.arange(len(rows))])


def test_a_row_does_not_depend_on_its_batch(rows):
    cascade = halving(small_net(), rows)
    logits, stages = cascade.run(rows)
    assert stages.bincount(minlength=3).min() > 10
    for some in (rows[:1], rows[100:107], rows.flip(0)[:50]):
        found = cascade.run(some)
        places = [(rows == row).all(1).nonzero().item() for row in some]
        torch.testing.assert_close(found.logits, logits[places], rtol=1e-10, atol=1e-10)
        assert torch.equal(found.stage, stages[places])


def test_activations_in_place_leave_what_is_handed_on_alone(rows):
    def build(inplace):
        torch.manual_seed(0)
        layers = nn.Linear(8, 16), nn.ReLU(inplace), nn.Linear(16, 16), nn.ReLU(inplace), nn.Linear(16, 3)
        return CascadeNet(nest(nn.Sequential(*layers), rows[:1], num_blocks=4), STAGES, 0.0)

    torch.testing.assert_close(build(True)(rows), build(False)(rows))


def test_widths_by_group_share_what_did_not_change(rows):
    net = small_net()
    first, second = net.widths
    stages = [{first: 2, second: 1}, {first: 2, second: 3}, {first: 4, second: 3}]
    cascade = CascadeNet(net, stages, 0.0)
    torch.testing.assert_close(cascade(rows), narrow(net, stages[-1])(rows))
    units = [(8, 4), (8, 12), (16, 12)]
    shared = [8 * one + one * two for one, two in units]
    last = [3 * two for _, two in units]
    assert cascade.multiply_adds == [
        shared[0] + last[0],
        shared[1] - shared[0] + last[1],
        shared[2] - shared[1] + last[2],
    ]


def test_layers_after_a_norm_over_channels_are_computed_anew(rows):
    layers = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    net = nest(nn.Sequential(*layers), rows[:1], num_blocks=4)
    cascade = CascadeNet(net, [1, 4], 0.0)
    assert cascade.multiply_adds[1] == cascade.whole_cost - 8 * 4  # the first layer alone is shared
    torch.testing.assert_close(cascade(rows), narrow(net, 4)(rows))


def test_parts_without_a_trace_are_kept_whole(rows):
    class Gate(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    layers = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), Gate(), nn.Linear(4, 3)
    net = nest(nn.Sequential(*layers), rows[:1], num_blocks=4, exclude=["3"])
    torch.testing.assert_close(CascadeNet(net, STAGES, 0.0)(rows), narrow(net, 4)(rows))


class Recurring(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.rnn(x.unflatten(1, (2, 4)))[0].sum(1))


class Deciding(nn.Module):
    """Runs the same layers in an order that the first row decides."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.last = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(self.b(h + (self.a(x) if x[0, 0] > 0 else -self.a(-x))))


class Written(nn.Module):
    """Asks a layer for its sizes, and reads channels with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.weight = nn.Linear(8, 16), nn.Linear(16, 3), nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x):
        h = self.first(x.to(self.first.weight.dtype)).view(len(x), self.first.out_features)
        return self.last(nn.functional.linear(h.tanh(), self.weight).relu())


class Squared(nn.Linear):
    def forward(self, x):
        return super().forward(x).square()


def hooked():
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    net[2].register_forward_hook(lambda layer, args, out: out.square())
    return net


@pytest.mark.parametrize(
    ("build", "num_shared"),
    [
        (Recurring, 0),
        (Deciding, 1),
        (Written, 1),
        (lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), Squared(16, 16), nn.Tanh(), nn.Linear(16, 3)), 1),
        (hooked, 1),
    ],
    ids=["recurrent", "decides-by-data", "written", "own-forward", "hook"],
)
def test_only_what_stays_the_same_is_shared(build, num_shared, rows):
    torch.manual_seed(0)
    plain = build()
    net = nest(plain, rows[:2], num_blocks=4)
    cascade = CascadeNet(net, STAGES, 0.0)
    for x in (rows, -rows):
        torch.testing.assert_close(cascade(x), narrow(net, 4)(x), rtol=1e-10, atol=1e-10)
    (_, (x, *known)) = cascade.parts(rows)[1]
    assert len(known) == num_shared


def test_stages_have_statistics_of_their_own(rows):
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
    net = nest(nn.Sequential(*layers), rows[:2], num_blocks=4)
    for threshold, blocks in ((0.0, 4), (math.inf, 1)):
        found = CascadeNet(net, STAGES, threshold, recalibrate=rows)(rows)
        expected = recalibrate_batchnorm(narrow(net, blocks), rows).eval()(rows)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(CascadeNet(net, STAGES, threshold)(rows), expected)


def test_dropout_is_off_and_the_net_keeps_its_mode(rows):
    torch.manual_seed(0)
    net = nest(nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 3)), rows[:1], num_blocks=4).train()
    cascade = CascadeNet(net, STAGES, 0.5).train()
    assert net.training
    assert not cascade.training
    torch.testing.assert_close(cascade(rows), cascade(rows), rtol=0, atol=0)


def test_it_is_a_copy_that_can_be_copied_and_saved(rows, tmp_path):
    net = small_net()
    cascade = CascadeNet(net, STAGES, mean_cost=0.6).fit_thresholds(rows)
    before = cascade(rows)
    other = CascadeNet(small_net(), STAGES)
    other.load_state_dict(cascade.state_dict())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    for each in (cascade, copy.deepcopy(cascade), pickle.loads(pickle.dumps(cascade)), other):
        torch.testing.assert_close(each(rows), before, rtol=0, atol=0)


# Draws of the weights.


def test_draws_are_those_of_the_guide_and_cost_a_pass_each(rows):
    net = small_net()
    cascade = CascadeNet(net, STAGES, 0.0, num_samples=3, seed=5)
    torch.manual_seed(5)
    with net.cut(1.0), torch.no_grad():
        expected = torch.stack([narrow(net, 4, net.guide(rows[:1]))(rows) for _ in range(3)])
    torch.testing.assert_close(cascade(rows), expected)
    assert cascade.multiply_adds == [3 * cost for cost in CascadeNet(net, STAGES).multiply_adds]


def test_doubt_is_of_the_mean_of_the_draws(rows):
    net = small_net()
    entropy, information = (
        CascadeNet(net, STAGES, 0.0, num_samples=4, doubt=doubt).parts(rows)[0][0](rows)
        for doubt in ("entropy", "mutual_information")
    )
    probs = entropy[0].softmax(-1)
    total = torch.distributions.Categorical(probs.mean(1)).entropy()
    torch.testing.assert_close(entropy[1], total)
    torch.testing.assert_close(information[1], total - torch.distributions.Categorical(probs).entropy().mean(1))
    assert (information[1] > 0).all()


# Thresholds.


@pytest.mark.parametrize("mean_cost", [0.3, 0.5, 0.77, 0.95])
@pytest.mark.parametrize("doubt", ["entropy", "mutual_information"])
def test_the_mean_cost_is_what_was_asked_for_within_a_row(rows, mean_cost, doubt):
    draws = None if doubt == "entropy" else 2
    cascade = CascadeNet(
        small_net(),
        STAGES,
        mean_cost=2 * mean_cost if draws and mean_cost < 0.5 else mean_cost,
        doubt=doubt,
        num_samples=draws,
    )
    cascade.fit_thresholds(rows)
    spent = cascade.costs[cascade.run(rows).stage].sum().item()
    assert cascade.mean_cost * len(rows) - cascade.costs[-1] <= spent <= cascade.mean_cost * len(rows)


def test_a_mean_cost_is_a_fraction_or_a_number(rows):
    net = small_net()
    half = CascadeNet(net, STAGES).whole_cost // 2
    thresholds = [CascadeNet(net, STAGES, mean_cost=cost).fit_thresholds(rows).thresholds for cost in (0.5, half)]
    thresholds.append(CascadeNet(net, STAGES, mean_cost=0.9).fit_thresholds((rows, rows), 0.5).thresholds)
    batched = CascadeNet(net, STAGES).fit_thresholds((batch for batch in rows.split(7)), 0.5)
    for each in (*thresholds[1:], batched.thresholds):
        torch.testing.assert_close(each, thresholds[0])


def test_more_than_all_stages_cost_sends_all_rows_through_them(rows):
    cascade = CascadeNet(small_net(), [1, 3]).fit_thresholds(rows, 1.0)
    assert cascade.thresholds.tolist() == [0.0]
    assert cascade.run(rows).stage.min() == 1


def test_a_single_width_is_that_width_for_all_rows(rows):
    net = small_net()
    cascade = CascadeNet(net, [0.5]).fit_thresholds(rows, 0.9)
    torch.testing.assert_close(cascade(rows), narrow(net, 0.5)(rows))


def test_it_says_what_it_does():
    assert repr(CascadeNet(small_net(), [0.25, 1.0], 0.3)).splitlines() == [
        "CascadeNet",
        "  stage 0: all rows, 1 blocks, 60 multiply-adds (13.9% of the whole net)",
        "  stage 1: entropy >= 0.3, 4 blocks, 384 multiply-adds (88.9% of the whole net)",
    ]


def test_what_does_not_fit_is_named(rows):
    net = small_net()
    by_hand = NestedNet(nn.Sequential(NestedLayer(nn.Linear(8, 4), outputs=Width("hidden", 4))))
    refused = [
        (lambda: CascadeNet(net.net, STAGES), "`net` must be a NestedNet.*got Sequential"),
        (lambda: CascadeNet(NestedModel(net, NormalTargets()), STAGES), "`net` must be .* of classes.*NormalTargets"),
        (lambda: CascadeNet(by_hand, STAGES), "made by `nest`, from which it knows"),
        (lambda: CascadeNet(net, 0.5), r"`widths` must be a list of widths; got 0\.5"),
        (lambda: CascadeNet(net, []), r"`widths` must be a list of widths; got \[\]"),
        (lambda: CascadeNet(net, [0.5, 0.25]), r"must grow from stage to stage.*got 0\.5 before 0\.25"),
        (lambda: CascadeNet(net, [0.5, 2]), "must grow from stage to stage"),
        (lambda: CascadeNet(net, [0.3, 1.0]), r"width 0\.3 .* near it are 0\.25"),
        (lambda: CascadeNet(net, STAGES, [0.1]), "`threshold` .* each of the 2 stages"),
        (lambda: CascadeNet(net, STAGES, -0.1), r"`threshold` must be a number >= 0.*got -0\.1"),
        (lambda: CascadeNet(net, STAGES, "a"), "`threshold` must be a number >= 0.*got 'a'"),
        (lambda: CascadeNet(net, STAGES, True), "`threshold` must be a number >= 0.*got True"),
        (lambda: CascadeNet(net, STAGES, torch.ones(7)), "`threshold` must be a number >= 0"),
        (lambda: CascadeNet(net, STAGES, math.nan), "`threshold` .* got nan"),
        (lambda: CascadeNet(net, STAGES, doubt="margin"), r"`doubt` must be one of .*got 'margin'"),
        (lambda: CascadeNet(net, STAGES, doubt="mutual_information"), "needs `num_samples` of at least 2"),
        (lambda: CascadeNet(net, STAGES, num_samples=0), "`num_samples` must be an integer >= 1; got 0"),
        (lambda: CascadeNet(net, STAGES, mean_cost=1.5), r"`mean_cost` must be a fraction .*got 1\.5"),
        (lambda: CascadeNet(net, STAGES, mean_cost=True), "`mean_cost` must be a fraction .*got True"),
        (lambda: CascadeNet(net, STAGES, mean_cost=0.1), r"`mean_cost` is 0\.1, 43 .*narrowest .* has 60: .*0\.1389"),
        (lambda: CascadeNet(net, STAGES).fit_thresholds(rows), "fit_thresholds: give `mean_cost`"),
        (lambda: CascadeNet(net, STAGES).fit_thresholds(rows[:0], 0.5), "`data` has no rows"),
        (lambda: CascadeNet(net, STAGES).fit_thresholds(rows * math.nan, 0.5), "`data` has 300 rows whose predictions"),
        (lambda: CascadeNet(net, STAGES)(rows), "no thresholds yet: call `fit_thresholds` with validation inputs"),
        (lambda: CascadeNet(net, STAGES, 0.5)(rows.float()), "inputs must be of the type .*torch.float64"),
        (lambda: CascadeNet(net, STAGES, 0.5)(rows[:, :5]), r"inputs must be like the example .*\(1, 8\)"),
    ]
    for make, message in refused:
        with pytest.raises(ValueError, match=message):
            make()


def test_rows_without_a_prediction_are_said_rather_than_stopped_at_the_first_stage(rows):
    cascade = halving(small_net(), rows)
    x = rows.clone()
    x[3:5, 2] = math.nan
    with pytest.raises(
        ValueError, match="CascadeNet: predictions are NaN for 2 of 300 rows: the inputs, or the weight"
    ):
        cascade(x)


# Parts that are exported.


def routed(parts, thresholds, x):
    """A cascade put together from its exported parts."""
    logits, doubt, *known = parts[0](x)
    logits, rows = logits.clone(), torch.arange(len(x))
    for part, threshold in zip(parts[1:], thresholds, strict=True):
        on = doubt >= threshold
        rows, known = rows[on], [value[on] for value in known]
        logits[rows], doubt, *known = part(x[rows], *known)
    return logits


@pytest.mark.parametrize(
    "build",
    [
        small_net,
        lambda: nest(nets.lenet(channels=(4, 8), hidden=8, image_size=8), torch.zeros(1, 1, 8, 8), num_blocks=4),
    ],
    ids=["mlp", "lenet"],
)
def test_exported_parts_are_the_cascade(build, rows):
    torch.manual_seed(0)
    net = build()
    x = rows if net.input_shapes[0] == (1, 8) else torch.randn(60, 1, 8, 8)
    cascade = halving(net, x)
    batch = torch.export.Dim("batch", min=2)
    parts = []
    for stage, inputs in cascade.parts(x[:4]):
        dynamic = ({0: batch}, *[tuple({0: batch} for _ in inputs[1:])][: len(inputs) - 1])
        parts.append(torch.export.export(stage, inputs, dynamic_shapes=dynamic).module())
    logits, stages = cascade.run(x)
    assert stages.bincount(minlength=3).min() >= 2
    torch.testing.assert_close(routed(parts, cascade.thresholds, x), logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_parts_compute_the_same(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.set_default_dtype(torch.float32)
    cascade, x = CascadeNet(small_net().float(), STAGES, 0.5), torch.randn(4, 8)
    for number, (stage, inputs) in enumerate(cascade.parts(x)):
        path = tmp_path / f"{number}.onnx"
        torch.onnx.export(stage, inputs, path, dynamo=True, verbose=False)
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        found = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        for one, other in zip(found, stage(*inputs), strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other.detach(), rtol=1e-4, atol=1e-5)


def test_layers_whose_rows_are_no_examples_are_not_shared():
    def forward(net, x):
        h = net.a(x.transpose(0, 1)).relu()
        return net.o(net.b(h.flatten(0, 1)).relu().unflatten(0, (x.shape[1], -1)).mean(0))

    layers = {"a": nn.Linear(4, 16), "b": nn.Linear(16, 12), "o": nn.Linear(12, 3)}
    net, x = nest(Net(forward, **layers), torch.randn(2, 7, 4)), torch.randn(6, 7, 4)
    logits = torch.stack([narrow(net, width)(x) for width in (0.25, 0.5)]).detach()
    doubts = torch.distributions.Categorical(logits=logits).entropy()
    cascade = CascadeNet(net, [0.25, 0.5, 1.0], threshold=doubts.quantile(0.5, 1).tolist())
    run = cascade.run(x)
    assert run.stage.unique().numel() > 1
    for stage, width in enumerate((0.25, 0.5, 1.0)):
        rows = run.stage == stage
        torch.testing.assert_close(run.logits[rows], narrow(net, width)(x)[rows])
