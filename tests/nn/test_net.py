"""A nested net as a Pyro program: its sites, and what a cut does to them."""

import copy
import pickle

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import nn
from torch.distributions import Normal

from pyro_vnd.diagnostics import to_arviz
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import fit
from pyro_vnd.nn import NestedClassifier, NestedLayer, NestedNet, Width, narrow, nest
from pyro_vnd.nn.axis import Run

MASK_PER = pytest.mark.parametrize("mask_per", ["example", "batch"])
X = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)
Y = torch.tensor([0, 1, 0, 1, 1])


def make(mask_per="example", **options) -> NestedNet:
    plain = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    return nest(plain, torch.zeros(1, 3), num_blocks={"0": 4}, mask_per=mask_per, **options)


def sites(program, *args) -> dict[str, tuple[int, ...]]:
    nodes = poutine.trace(program).get_trace(*args).nodes
    return {
        name: tuple(site["value"].shape) for name, site in nodes.items() if site["type"] == "sample" and name != "data"
    }


SIZES = {"0": 8, "2": 6}
WEIGHTS = {"0.weight": (8, 3), "0.bias": (8,), "2.weight": (6, 8), "2.bias": (6,), "4.weight": (2, 6), "4.bias": (2,)}


@MASK_PER
def test_sites_and_shapes_are_those_of_the_guide_in_the_same_order(mask_per):
    net = make(mask_per)
    rows = (5,) if mask_per == "example" else ()
    expected = {"0.mask": (*rows, 4), "2.mask": (*rows, 6)} | WEIGHTS
    assert list(sites(net.guide, X, Y).items()) == list(expected.items())
    assert list(sites(net, X).items()) == list(expected.items())
    assert list(sites(NestedClassifier(net), X, Y).items()) == [*expected.items(), ("label", (5,))]


def test_a_prefix_is_put_before_all_names():
    net = make(prefix="bnn.")
    assert list(sites(net, X)) == ["bnn.0.mask", "bnn.2.mask", *(f"bnn.{name}" for name in WEIGHTS)]
    assert list(net.laws) == list(net.guide.laws) == ["bnn.0.mask", "bnn.2.mask"]
    assert all(torch.equal(law.logits, net.guide.laws[name].logits) for name, law in net.laws.items())


def test_point_estimates_have_mask_sites_only():
    net = make(prior=None)
    assert list(sites(net, X)) == list(sites(net.guide, X)) == ["0.mask", "2.mask"]
    assert not any("scale" in name for name, _ in net.named_parameters())


@MASK_PER
def test_a_pass_of_the_model_computes_with_its_draws(mask_per):
    net = make(mask_per)
    trace = poutine.trace(net).get_trace(X)
    value = {name: site["value"] for name, site in trace.nodes.items() if "value" in site}
    first = torch.tanh(X @ value["0.weight"].T + value["0.bias"]) * value["0.mask"].repeat_interleave(2, -1)
    second = torch.relu(first @ value["2.weight"].T + value["2.bias"]) * value["2.mask"]
    expected = second @ value["4.weight"].T + value["4.bias"]
    torch.testing.assert_close(value["_RETURN"], expected, rtol=1e-12, atol=1e-12)


@MASK_PER
@pytest.mark.parametrize("width", [0.25, 1.0, 2, {"0": 0.5}, {"0": 3, "2": 0.5}])
def test_a_cut_fixes_masks_in_model_and_guide(mask_per, width):
    net = make(mask_per)
    widths = width if isinstance(width, dict) else dict.fromkeys(net.widths, width)
    free = [f"{name}.mask" for name in net.widths if name not in widths]
    for sliced in (False, True):
        with net.cut(width, sliced=sliced, rounding="nearest") as inside:
            assert inside is net
            guide_trace = poutine.trace(net.guide).get_trace(X)
            guide = sites(poutine.replay(net.guide, trace=guide_trace), X)
            assert guide == sites(poutine.replay(net, trace=guide_trace), X)
            assert [name for name in guide if name.endswith("mask")] == free
        kept = [
            net.widths[name].kept_units(widths.get(name, 1.0), "nearest") if sliced else whole
            for name, whole in SIZES.items()
        ]
        if not (free and sliced and mask_per == "batch"):  # there, random masks are sliced too
            assert guide["2.weight"] == (kept[1], kept[0])
            assert guide["4.weight"] == (2, kept[1])


@MASK_PER
@pytest.mark.parametrize("width", [0.25, 2, {"0": 0.5}, {"0": 3, "2": 0.5}])
def test_dense_and_sliced_and_narrow_agree_for_a_draw(mask_per, width, mean_pass):
    net = make(mask_per)
    draw = net.guide(X)
    weights = {name: value for name, value in draw.items() if not name.endswith("mask")}
    with torch.no_grad(), net.cut(width, rounding="nearest"):
        dense = poutine.condition(net, data=weights)(X) if isinstance(width, float | int) else None
    narrowed = narrow(net, width, draw=draw, rounding="nearest")
    if dense is not None:
        torch.testing.assert_close(narrowed(X), dense, rtol=1e-10, atol=1e-10)
    full = dict.fromkeys(net.widths, 1.0) | (width if isinstance(width, dict) else dict.fromkeys(net.widths, width))
    with torch.no_grad(), net.cut(full, rounding="nearest"):
        torch.testing.assert_close(narrowed(X), poutine.condition(net, data=weights)(X), rtol=1e-10, atol=1e-10)
    mean = narrow(net, width, rounding="nearest")(X)
    for sliced in (False, True):
        torch.testing.assert_close(mean, mean_pass(net, X, full, sliced), rtol=1e-10, atol=1e-10)


def test_rows_of_their_own_widths_are_a_loop_over_rows(mean_pass):
    net = make()
    fractions = torch.tensor([0.25, 0.5, 0.75, 1.0, 0.25])
    rows = mean_pass(net, X, fractions)
    for n, fraction in enumerate(fractions.tolist()):
        torch.testing.assert_close(rows[n], mean_pass(net, X[n : n + 1], fraction)[0], rtol=1e-12, atol=1e-12)


def test_a_cut_of_one_group_with_the_others_random_is_the_same_sliced():
    a, b = Width("a", 4), Width("b", 4)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = (NestedLayer(nn.Linear(3, 4), outputs=each, prior=None) for each in (a, b))
            self.last = NestedLayer(nn.Linear(8, 2), inputs=(Run(a, 4), Run(b, 4)), prior=None)

        def forward(self, x):
            return self.last(torch.cat([self.left(x), self.right(x)], -1))

    for mask_per, shape in (("example", (5, 4)), ("batch", (4,))):
        net, outputs = NestedNet(Two(), mask_per=mask_per), []
        for value in OrderedMask.uniform(4).sample((5, *shape[:-1])):
            for sliced in (False, True):
                with net.cut({"a": 2}, sliced=sliced):
                    outputs.append(poutine.condition(net, data={"b.mask": value})(X))
            torch.testing.assert_close(*outputs[-2:])
        assert len(torch.stack(outputs).unique(dim=0)) > 2


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (0.0, r"group '0': give a fraction in \(0.0, 1.0\]"),
        (7, "number of blocks from 1 to 4"),
        (True, "width True is invalid"),
        ({"1": 0.5}, r"`width` names \['1'\]; groups of the net: \['0', '2'\]"),
        ({"2": 7}, "width 7 is invalid for group '2': .* from 1 to 6"),
        (torch.tensor([0.5, 1.5]), r"tensor of fractions in \[0, 1\]"),
        (torch.tensor([0.5, float("nan")]), "tensor of fractions"),
        (torch.tensor(0.5), r"1 dimension\(s\) for mask_per='example'; got shape \(\)"),
    ],
)
def test_a_bad_cut_is_refused_before_anything_changes(width, message):
    net = make()
    with pytest.raises(ValueError, match=message), net.cut(width):
        pass
    assert net._cut is None


def test_all_groups_that_cannot_keep_so_many_blocks_are_named():
    net = make()
    with pytest.raises(
        ValueError, match=r"the width does not fit all groups:\n- width 9 is invalid for group '0'.*\n- .* '2'"
    ):
        net.kept_blocks(9)
    with pytest.raises(ValueError, match=r"^width 6 is invalid for group '0': .* from 1 to 4 \(an int\)$"):
        net.kept_blocks({"0": 6, "2": 6})


def test_a_net_that_is_cut_says_so():
    net = make()
    assert "cut" not in repr(net)
    with net.cut({"0": 1}, sliced=True):
        assert "cut to 1 of 4 blocks of 0, the other groups random, sliced" in repr(net)
        assert "cut to 1 of 4 blocks of 0" in net._repr_html_()
        with net.cut(1.0):
            assert "cut to 4 of 4 blocks of 0, 6 of 6 blocks of 2" in repr(net)
    with net.cut(torch.tensor([0.5, 0.0])):
        assert "cut to fractions of 2 rows" in repr(net)
    assert "cut" not in repr(net)


def test_a_fraction_must_fit_every_group_or_be_rounded():
    net = make()  # 4 blocks and 6
    assert net.kept_blocks(0.5) == {"0": 2, "2": 3}
    assert net.kept_blocks({"2": 1 / 3}) == {"2": 2}
    assert [net.kept_blocks(0.3, rounding) for rounding in ("down", "nearest", "up")] == [
        {"0": 1, "2": 1},
        {"0": 1, "2": 2},
        {"0": 2, "2": 2},
    ]
    calls = {
        "cut": lambda width: net.cut(width).__enter__(),
        "predict": lambda width: net.predict(X, width=width),
        "narrow": lambda width: narrow(net, width),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"group '2' can keep: near it are 0.1666667 .* and 0.3333333 \(2 of 6"):
            call(0.25)
        with pytest.raises(
            ValueError, match=r"(?s)does not fit all groups; rounding=.*\n- .*group '0'.*\n- .*group '2'"
        ):
            call(0.3)
        with pytest.raises(ValueError, match=r"(?s)\n- width 0.3 .*group '0'.*\n- width 0.4 .*group '2'"):
            call({"0": 0.3, "2": 0.4})
    assert net._cut is None
    torch.manual_seed(1)
    rounded = net.predict(X, width=0.3, rounding="up")
    torch.manual_seed(1)
    assert torch.equal(rounded, net.predict(X, width={"0": 2, "2": 2}))


def test_other_misuses_are_named():
    net = make()
    with pytest.raises(ValueError, match="one fraction for each of 2 rows; the batch has 5"), net.cut(torch.ones(2)):
        net(X)
    with pytest.raises(ValueError, match="sliced=True needs one width"), net.cut(torch.ones(5), sliced=True):
        pass
    with pytest.raises(ValueError, match=r"0 dimension\(s\) for mask_per='batch'"), make("batch").cut(torch.ones(5)):
        pass
    with pytest.raises(ValueError, match=r"`num_samples` must be an integer,? at least 1; got 0"):
        net.predict(X, num_samples=0)
    with pytest.raises(ValueError, match="`mask_per` must be 'example' or 'batch'; got 'row'"):
        make("row")
    with pytest.raises(ValueError, match="no NestedLayer with a width"):
        NestedNet(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="two widths have the name 'a'"):
        NestedNet(nn.Sequential(*(NestedLayer(nn.Linear(2, 2), outputs=Width("a", 2)) for _ in range(2))))
    with pytest.raises(ValueError, match="weights were drawn in a plate"), pyro.plate("rows", 2, dim=-3):
        net(X)


def test_an_error_inside_leaves_nothing_behind():
    net, before = make(), make().predict(X, width=1.0).shape
    for width in (0.5, {"0": 1}):
        with pytest.raises(ValueError, match=r"got torch.float64 of shape"), net.cut(width, sliced=True):
            net(torch.zeros(5, 4))
        with pytest.raises(ValueError, match=r"got torch.float64 of shape"):
            net.predict(torch.zeros(5, 4))
        with pytest.raises(KeyError), net.cut(0.5), net.cut(1):
            raise KeyError
        assert net._cut is None
        for each in net.widths.values():
            assert (each.mask, each.keep_probs, each.kept) == (None, None, None)
        assert all(layer.values == {} for layer in net.layers.values())
        assert net.predict(X, width=1.0).shape == before


def test_cuts_can_be_nested():
    net = make()
    with net.cut(1.0):
        with net.cut({"0": 1}):
            assert "2.mask" in sites(net, X)
        assert "2.mask" not in sites(net, X)


@MASK_PER
def test_predictions_are_those_of_narrowed_draws_on_average(mask_per):
    net = make(mask_per)
    outputs = net.predict(X, width=0.5, num_samples=400)
    assert outputs.shape == (400, 5, 2)
    assert not outputs.requires_grad
    by_hand = torch.stack([narrow(net, 0.5, draw=net.guide(X))(X) for _ in range(200)])
    error = (outputs.var(0) / 400 + by_hand.var(0) / 200).sqrt()
    assert ((outputs.mean(0) - by_hand.mean(0)).abs() < 5 * error).all()
    with poutine.trace() as trace:
        net.predict(X)
    assert not trace.trace.nodes


@MASK_PER
def test_state_dict_deepcopy_and_pickle(mask_per, mean_pass):
    net, other = make(mask_per), make(mask_per)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    other.load_state_dict(net.state_dict())
    for twin in (other, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(mean_pass(twin, X, 0.5), mean_pass(net, X, 0.5))
        for name, law in net.laws.items():
            assert torch.equal(twin.laws[name].logits, law.logits)
        with torch.no_grad():
            twin.net[0].plain.weight.zero_()
            next(iter(twin.widths.values())).logits.zero_()
        assert list(sites(twin.guide, X)) == list(sites(net, X))
    assert not torch.equal(other.laws["0.mask"].logits, net.laws["0.mask"].logits)


@MASK_PER
@pytest.mark.parametrize("prior", ["normal", Normal(torch.tensor(0.0, dtype=torch.float32), 1.0)])
def test_float_and_double(mask_per, prior):
    net = make(mask_per, prior=prior)
    assert net.float()(X.float()).dtype == net.predict(X.float(), width=0.5).dtype == torch.float32
    assert net.double()(X).dtype == net.predict(X, width=0.5).dtype == torch.float64
    assert all(value.dtype == torch.float64 for value in net.guide(X).values())


@MASK_PER
def test_predictive_of_pyro(mask_per):
    net = make(mask_per)
    model = NestedClassifier(net)
    draws = Predictive(model, guide=net.guide, num_samples=4)(X)
    assert draws["label"].shape == (4, 5)
    assert draws["0.mask"].shape[0] == draws["0.weight"].shape[0] == 4
    assert Predictive(model, num_samples=3)(X)["label"].shape == (3, 5)


def test_the_guide_is_one_module_and_no_part_of_the_net():
    net = make()
    before = list(net.state_dict()), [type(part) for part in net.modules()]
    guide = net.guide
    assert net.guide is guide
    assert (guide.net, NestedClassifier(net).guide) == (net, guide)
    assert (list(net.state_dict()), [type(part) for part in net.modules()]) == before
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), copy.deepcopy(guide).net):
        assert twin is not net
        assert twin.guide.net is twin
        assert twin.guide is twin.guide
        assert twin.guide is not guide
    classifier = copy.deepcopy(NestedClassifier(net))
    assert classifier.guide.net is classifier.net


def test_the_guide_shares_its_parameters_with_the_net():
    net = make()
    assert {id(p) for p in net.guide.parameters()} == {id(p) for p in net.parameters()}


def test_data_by_name_in_any_order():
    x, labels = torch.randn(6, 3), torch.arange(6) % 2
    plain = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    elbos = []
    for names in (("x", "y"), ("y", "x")):
        torch.manual_seed(0)
        model = NestedClassifier(nest(plain, x[:1]))
        data = {name: {"x": x, "y": labels}[name] for name in names}
        elbos.append(fit(model, model.guide, data, num_epochs=2, progress=False).elbo)
        assert set(to_arviz(model, model.guide, data, num_samples=3).log_likelihood) == {"label"}
    torch.manual_seed(0)
    model = NestedClassifier(nest(plain, x[:1]))
    assert elbos == [fit(model, model.guide, (x, labels), num_epochs=2, progress=False).elbo] * 2
    with pytest.raises(ValueError, match="one argument must be a tensor"):
        model.guide(y=None)


def test_a_tensor_of_widths_is_of_fractions_and_rounded_to_the_nearest():
    net, x = make(), torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"fractions in \[0, 1\].*got shape \(5,\), torch.int64"):
        net.predict(x, width=torch.ones(5).long())
    for rounding in ("up", "closest"):
        with pytest.raises(ValueError, match="`rounding` must be 'nearest' or None for a tensor of fractions"):
            net.predict(x, width=torch.full((5,), 0.3), rounding=rounding)
