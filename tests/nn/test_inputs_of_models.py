"""Models of nets that take several inputs, or inputs by name, and return objects."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from pyro_vnd._data import Batch, input_batches, split_inputs
from pyro_vnd.diagnostics import evaluate, evaluate_learned, evaluate_widths, loo_widths
from pyro_vnd.infer import fit
from pyro_vnd.nn import NestedClassifier, NestedModel, NormalTargets, narrow, nest, recalibrate_batchnorm, widths_for

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
    assert loo_widths(model, data, [4], 25, batch_size=16, **QUIET).keys() == {4}


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
        (), {"left": a, "right": b}, c, (b,)
    )
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
