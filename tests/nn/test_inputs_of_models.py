"""Models of nets that take several inputs, or inputs by name, and return objects."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from pyro_vnd._data import Batch, input_batches, split_inputs
from pyro_vnd.diagnostics import evaluate, evaluate_cascade, evaluate_learned, evaluate_widths, loo_widths
from pyro_vnd.infer import fit
from pyro_vnd.nn import (
    CascadeNet,
    NestedClassifier,
    NestedModel,
    NormalTargets,
    narrow,
    nest,
    recalibrate_batchnorm,
    widths_for,
)
from pyro_vnd.nn.model import taken_apart

N = 40
X, Z = torch.randn(2, N, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IDS = torch.arange(N * 6).reshape(N, 6) * 7 % 11
MASK = (torch.arange(6) < 3 + torch.arange(N)[:, None] % 4).long()
Y = torch.arange(N) % 3
QUIET = {"progress": False}


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.norm, self.head = (
            nn.Linear(5, 8),
            nn.Linear(5, 8),
            nn.BatchNorm1d(8),
            nn.Linear(8, 3),
        )

    def forward(self, left, right):
        return self.head(self.norm(self.left(left).tanh() + self.right(right).tanh()))


@dataclass
class Output:
    logits: Tensor
    states: Tensor


class Named(nn.Module):
    """As nets of text have it: arguments between the two that are given, and an object that comes back."""

    def __init__(self, wrap=Output):
        super().__init__()
        self.embedding, self.body, self.head, self.wrap = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 3), wrap

    def forward(self, input_ids, cache=None, attention_mask=None):
        assert cache is None
        h = self.body(self.embedding(input_ids)).relu()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.wrap(self.head((h * mask[..., None]).sum(1)), h)


def pair():
    return nest(Pair(), (X[:2], Z[:2]), num_blocks=4)


def named(**options):
    return nest(Named(**options), {"input_ids": IDS[:2], "attention_mask": MASK[:2]}, num_blocks=4)


CASES = {
    "a tuple": (pair, (X, Z, Y)),
    "a mapping of inputs in order": (pair, {"left": X, "right": Z, "y": Y}),
    "by name": (named, {"input_ids": IDS, "attention_mask": MASK, "y": Y}),
}


def inputs_of(data):
    return split_inputs(data, {}, 2) if isinstance(data, tuple) else split_inputs((), data, 2 if "left" in data else 0)


@pytest.fixture(params=CASES)
def case(request):
    build, data = CASES[request.param]
    return NestedClassifier(build()), data


def outputs(model, blocks, data):
    batch = inputs_of(data)
    with torch.no_grad():
        return model.outputs_of(narrow(model.net, blocks).eval()(*batch.args, **batch.kwargs))


def test_a_fit_takes_the_inputs_and_what_is_observed(case):
    model, data = case
    before = [parameter.detach().clone() for parameter in model.parameters()]
    result = fit(model, model.guide, data, num_epochs=3, batch_size=10, validation=data, **QUIET)
    assert len(result.elbo) == 3
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution:UserWarning")  # of few draws
def test_scores_are_those_of_the_narrowed_net(case):
    model, data = case
    scores = evaluate_widths(model, data, [1, 4], None, batch_size=16, **QUIET)
    for place, blocks in enumerate((1, 4)):
        logits = outputs(model, blocks, data)
        nll = nn.functional.cross_entropy(logits, Y).item()
        assert scores["nll"].values[0, place] == pytest.approx(nll)
    drawn = evaluate_widths(model, data, [2], 3, batch_size=16, ood={"far": data}, **QUIET)
    assert drawn.attrs["num_samples"] == 3
    assert evaluate_learned(model, data, 3, **QUIET).attrs == drawn.attrs
    assert loo_widths(model, data, [4], 30, batch_size=16, **QUIET).keys() == {4}


def test_budgets_are_of_all_inputs(case):
    model, data = case
    model.eval()
    found = widths_for(model, 0.6, data=data, max_tries=5)
    assert found.keys() == model.net.widths.keys()
    assert set(narrow(model, budget=0.6, data=data).narrowed_to) == set(found)


def test_the_model_is_the_law_of_the_outputs(case):
    model, data = case
    model.eval()
    batch = inputs_of(data)
    with model.net.cut(1.0), torch.no_grad(), model.net._drawn("posterior", N, weights=False):
        raw = model.net.net(*batch.args, **batch.kwargs)
    torch.testing.assert_close(model.outputs_of(raw), outputs(model, 4, data))
    rows = Batch(batch.args, batch.kwargs).num_rows
    assert model.net.predict(*batch.args, **batch.kwargs, width=0.5, num_samples=2).shape == (2, rows, 3)


def test_batches_may_be_mappings():
    model = NestedClassifier(named())
    whole = {"input_ids": IDS, "attention_mask": MASK, "y": Y}
    batches = [{name: part[start : start + 15] for name, part in whole.items()} for start in range(0, N, 15)]
    scores = evaluate_widths(model, batches, [2], None, **QUIET)
    expected = evaluate_widths(model, whole, [2], None, batch_size=15, **QUIET)
    assert scores["nll"].item() == expected["nll"].item()


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda logits, h: (h, logits), 1),
        (lambda logits, h: {"states": h, "logits": logits}, None),
        (lambda logits, h: {"states": h, "scores": logits}, "scores"),
        (Output, "logits"),
        (Output, lambda returned: returned.logits),
        (lambda logits, h: logits, None),
    ],
    ids=["place", "logits", "key", "attribute", "function", "tensor"],
)
def test_outputs_are_picked(wrap, output):
    torch.manual_seed(0)
    model = NestedModel(named(wrap=wrap), NestedClassifier(named()).likelihood, output=output)
    data = {"input_ids": IDS, "attention_mask": MASK, "y": Y}
    scores = evaluate_widths(model, data, [4], None, **QUIET)
    torch.manual_seed(0)
    expected = evaluate_widths(NestedClassifier(named()), data, [4], None, **QUIET)
    assert scores["nll"].item() == pytest.approx(expected["nll"].item())
    fit(model, model.guide, data, num_epochs=1, **QUIET)


def test_a_plain_net_that_returns_an_object_is_scored():
    narrowed = narrow(named(), 0.5)
    scores = evaluate(narrowed, (IDS, Y), **QUIET)
    logits = narrowed(IDS).logits.detach()
    assert scores["nll"].item() == pytest.approx(nn.functional.cross_entropy(logits, Y).item())


def test_statistics_are_of_all_inputs():
    net = pair()
    narrowed = narrow(net, 0.5)
    recalibrate_batchnorm(narrowed, (X, Z), batch_size=13, num_inputs=2)  # the last row joins the batch before
    hidden = (narrowed.left(X).tanh() + narrowed.right(Z).tanh()).detach()
    torch.testing.assert_close(narrowed.norm.running_mean, hidden.mean(0))
    torch.testing.assert_close(narrowed.norm.running_var, hidden.var(0))
    found = evaluate_widths(net, (X, Z, Y), [0.5], None, recalibrate=(X, Z, Y), batch_size=13, **QUIET)
    expected = nn.functional.cross_entropy(narrowed.eval()(X, Z), Y).item()
    assert found["nll"].item() == pytest.approx(expected)


def test_names_of_inputs_matter_and_their_order_does_not():
    model = NestedClassifier(pair())
    expected = evaluate_widths(model, (X, Z, Y), [2], None, **QUIET)["nll"]
    turned = evaluate_widths(model, {"y": Y, "right": Z, "left": X}, [2], None, **QUIET)["nll"]
    assert turned.values == pytest.approx(expected.values, rel=1e-6)
    assert abs(evaluate_widths(model, (Z, X, Y), [2], None, **QUIET)["nll"] - expected).item() > 1e-3


def test_inputs_are_told_from_what_is_observed():
    a, b, c = torch.zeros(4, 1), torch.ones(4, 2), torch.full((4,), 2)
    assert split_inputs((a, c), {}) == Batch((a,), {}, c)
    assert split_inputs((a,), {"y": c}) == Batch((a,), {}, c)
    assert split_inputs((), {"y": c, "x": a}) == Batch((a,), {}, c)
    assert split_inputs((), {"images": a, "labels": c}) == Batch((a,), {}, c)
    assert split_inputs((a, b, c, b), {}, 2) == Batch((a, b), {}, c, (b,))
    assert split_inputs((), {"right": b, "x": a, "y": c}, 2) == Batch((a,), {"right": b}, c)
    assert split_inputs((), {"right": b, "left": a, "y": c}, 2) == Batch((), {"right": b, "left": a}, c)
    assert split_inputs((), {"left": a, "right": b, "labels": c, "weights": b}, 2) == Batch(
        (), {"left": a, "right": b}, c, (b,), ("weights",)
    )
    assert split_inputs((a,), {"y": c, "weights": b}) == Batch((a,), {}, c, (b,), ("weights",))
    assert split_inputs((a,), {"right": b, "y": c}, 2) == Batch((a,), {"right": b}, c)
    assert split_inputs((), {"ids": a, "mask": b, "y": c}, 0) == Batch((), {"ids": a, "mask": b}, c)
    parts = [*input_batches({"ids": a, "y": c}, 3, 0)]
    assert [part.num_rows for part in parts] == [3, 1]
    assert [len(part.y) for part in parts] == [3, 1]
    with pytest.raises(ValueError, match="must have the same rows"):
        list(input_batches({"ids": a[:2], "y": c}, 3, 0))
    with pytest.raises(ValueError, match="must be tensors, inputs and labels, or an iterable of batches"):
        list(input_batches([1.0, 2.0], 3))


def test_what_does_not_fit_is_said():
    model = NestedModel(pair(), NormalTargets())
    for data in ((X, Z, Y, Y), ()):
        with pytest.raises(
            ValueError, match="NestedModel: give 2 inputs, tensors with a row for each example, and what"
        ):
            model(*data)
    with pytest.raises(ValueError, match="returns Output, and output='scores': say what they are by `NestedModel"):
        NestedModel(named(), NormalTargets(), output="scores")(input_ids=IDS)
    with pytest.raises(ValueError, match=r"returns dict with \['a', 'b'\], and output=None"):
        NestedModel(named(wrap=lambda a, b: {"a": a, "b": b}), NormalTargets())(input_ids=IDS)
    with pytest.raises(
        ValueError, match=r"NestedNet\.predict: the outputs of the net must be a tensor, or have one called"
    ):
        named(wrap=lambda a, b: (a, b)).predict(input_ids=IDS)
    with pytest.raises(
        ValueError, match="`example_input` does not fit Named: missing a required argument: 'input_ids'"
    ):
        nest(Named(), {"ids": IDS})


class Weighted(nn.Module):
    """A net that takes an input by the name that data have for what is observed."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, y):
        return self.head((self.body(x) + y).tanh())


def test_what_data_have_too_much_or_out_of_place_is_refused_by_all():
    one = nest(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), X[:2], num_blocks=4)
    for net, data, expected in (
        (one, {"x": X, "y": Y, "w": X[:, 0]}, r"give 1 inputs, tensors with .*'y': \(.*'w': \("),
        (named(), (IDS, Y), "give named inputs, in a mapping, as the net was nested, tensors with a row"),
        (named(), (IDS, MASK, Y), "give named inputs, in a mapping"),
    ):
        scores = [lambda *given, of=of: of(*given, **QUIET) for of in (evaluate_widths, loo_widths)]
        for score in scores:
            with pytest.raises(ValueError, match=expected):
                score(net, data, [0.5])
        with pytest.raises(ValueError, match=expected):
            evaluate_learned(net, data, 2, **QUIET)
        with pytest.raises(ValueError, match=expected):
            widths_for(net, 0.5, data=data)
        model = NestedClassifier(net)
        with pytest.raises(ValueError, match=f"NestedClassifier: {expected}"):
            model(**data) if isinstance(data, dict) else model(*data)
    narrowed = narrow(one, 0.5)
    with pytest.raises(ValueError, match="evaluate: give 1 inputs"):
        evaluate(narrowed, {"x": X, "y": Y, "w": X[:, 0]}, **QUIET)
    expected = evaluate(narrowed, (X, Y), **QUIET)
    assert evaluate(narrowed, (X, Y, torch.arange(N)), **QUIET).identical(expected)


def test_names_that_the_net_does_not_take_are_said():
    data = {"attention_mask": MASK, "y": Y}
    with pytest.raises(ValueError, match=r"arguments of Named, .*by name: missing a required argument: 'input_ids'"):
        NestedClassifier(named())(**data)
    with pytest.raises(ValueError, match=r"evaluate: inputs must be the arguments of Named, .*'input_ids'"):
        evaluate_widths(named(), data, [0.5], None, **QUIET)
    with pytest.raises(ValueError, match="got an unexpected keyword argument 'w'"):
        evaluate_learned(named(), data | {"input_ids": IDS, "w": IDS}, 2, **QUIET)


def test_an_input_by_the_name_of_what_is_observed_comes_in_order():
    by_name = nest(Weighted(), {"x": X[:2], "y": X[:2, :1]}, num_blocks=4)
    for use in (NestedClassifier, lambda net: evaluate_learned(net, {"x": X, "y": Y}, 2, **QUIET)):
        with pytest.raises(ValueError, match="Weighted was nested with an input by the name 'y', by which data have"):
            use(by_name)
    net = nest(Weighted(), (X[:2], X[:2, :1]), num_blocks=4)
    scores = evaluate_widths(NestedClassifier(net), (X, Z[:, :1], Y), [1.0], None, **QUIET)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(narrow(net, 1.0)(X, Z[:, :1]), Y).item()
    assert scores["nll"].item() == pytest.approx(expected)


@pytest.mark.parametrize("output", [True, False, 1.0, ("logits",)])
def test_outputs_that_name_nothing_are_refused(output):
    with pytest.raises(ValueError, match="`output` must be a key or the name of an attribute"):
        NestedModel(pair(), NormalTargets(), output=output)


class Packed(nn.Module):
    """A net that packs its sequences by the lengths that it finds in them."""

    def __init__(self):
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(11, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, ids):
        lengths = (ids > 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(self.embedding(ids), lengths, True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][-1])


FILLED = (1 + IDS % 10) * MASK


def packed():
    return nest(Packed(), FILLED[:2], num_blocks=4)


def as_dict(logits, states):
    return {"scores": logits, "states": states}


@pytest.mark.parametrize(
    ("build", "data"),
    [
        (pair, (X, Z, Y)),
        (pair, {"y": Y, "right": Z, "left": X}),
        (lambda: NestedClassifier(named()), {"y": Y, "attention_mask": MASK, "input_ids": IDS}),
        (lambda: NestedClassifier(named(wrap=as_dict), output="scores"), CASES["by name"][1]),
        (packed, (FILLED, Y)),
    ],
)
def test_cascades_take_the_inputs_of_the_net_and_pick_its_outputs(build, data):
    model = build()
    net, *_, outputs_of = taken_apart("test", model)
    batch = split_inputs(*((data, {}) if isinstance(data, tuple) else ((), data)), net.num_inputs)
    cascade = CascadeNet(model, [0.25, 0.5, 1.0], mean_cost=0.9).fit_thresholds(data)
    with torch.no_grad():
        stages = [outputs_of(narrow(net, width).eval()(*batch.args, **batch.kwargs)) for width in (0.25, 0.5, 1.0)]
    found = cascade.run(*batch.args, **batch.kwargs)
    assert len(found.stage.unique()) > 1
    torch.testing.assert_close(found.logits, torch.stack(stages)[found.stage, torch.arange(N)])
    scores = evaluate_cascade(cascade, data, data, [0.9], **QUIET)
    assert scores["share_of_rows"].values.ravel() == pytest.approx((found.stage.bincount(minlength=3) / N).numpy())
    assert scores["nll"].item() == pytest.approx(nn.functional.cross_entropy(found.logits, Y).item())
    draws = CascadeNet(model, [0.25, 1.0], 0.0, num_samples=2, recalibrate=data)
    assert draws(*batch.args, **batch.kwargs).shape == (2, N, 3)


def test_cascades_say_what_does_not_fit():
    cascade = CascadeNet(named(), [0.5, 1.0], 0.5)
    with pytest.raises(ValueError, match="give the inputs input_ids, attention_mask; got 0 in order and"):
        cascade(input_ids=IDS)
    with pytest.raises(ValueError, match=r"CascadeNet\.fit_thresholds: give named inputs, in a mapping"):
        cascade.fit_thresholds((IDS, MASK), 0.9)
    with pytest.raises(ValueError, match="`cascade` must be a CascadeNet; got NestedClassifier"):
        evaluate_cascade(NestedClassifier(pair()), (X, Z, Y), (X, Z, Y), [0.5])


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids, mask):
        h = self.embedding(ids)
        attended = nn.functional.scaled_dot_product_attention(h, h, h, mask[:, None])
        return self.head(self.body(attended).relu().mean(1))


def test_masks_that_are_added_to_scores_are_data():
    mask = torch.zeros(N, 6).double().masked_fill(MASK == 0, -torch.inf)
    model = NestedClassifier(nest(Attending(), (IDS[:2], mask[:2]), num_blocks=4))
    result = fit(model, model.guide, (IDS, mask, Y), num_epochs=2, validation=(IDS, mask, Y), **QUIET)
    assert all(math.isfinite(value) for value in result.elbo)
    scores = evaluate_widths(model, (IDS, mask, Y), [0.5], None, **QUIET)
    with torch.no_grad():
        logits = narrow(model.net, 0.5).eval()(IDS, mask)
    assert scores["nll"].item() == pytest.approx(nn.functional.cross_entropy(logits, Y).item())
    with pytest.raises(ValueError, match=r"`data\[1\]` .* must be finite; got NaN or inf \(-inf only in a mask"):
        fit(model, model.guide, (IDS, mask - 1, Y), num_epochs=1, **QUIET)
