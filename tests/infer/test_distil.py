"""What distilled lengths gain, that nothing else changes, and models of one's own."""

import copy
import math

import numpy as np
import pytest
import torch
from odd import NO_NUMBERS
from torch import nn

from models.datasets import load
from pyro_vnd.autoencoders import LinearGaussianVAE, OrderedVAE, OrderedVQVAE, OrderedWAE, mlp_bodies
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import distil_lengths, fit
from pyro_vnd.nn import ValueHead

QUIET = {"progress": False}
BRIEF = {"num_steps": 30, "progress": False}


@pytest.fixture(scope="module")
def digits():
    return load("digits").train.images


@pytest.fixture(scope="module")
def fixed(digits):
    """A model that was trained under a fixed uniform law, in float32: its lengths know nothing of images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        vae = OrderedVAE((1, 8, 8), 16, bodies=mlp_bodies((1, 8, 8), hidden=(128,)), posterior_lengths="prior")
        fit(vae, vae.guide, digits, num_epochs=60, batch_size=128, lr=0.003, **QUIET)
        torch.set_default_dtype(before)
    return vae


class Shuffled(nn.Module):
    """The same model, whose head looks at another image of the batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def add_value_head(self):
        return self.model.add_value_head()

    def value_inputs(self, x):
        return self.model.value_inputs(x)[torch.randperm(len(x))]

    def value_curve(self, x, lengths):
        return self.model.value_curve(x, lengths)


def test_a_head_that_sees_the_image_gains_and_one_that_sees_another_does_not(fixed, digits):
    model = copy.deepcopy(fixed)
    report = distil_lengths(model, digits, num_steps=1000, **QUIET)
    assert report.mean_lengths == (2, 4, 8, 12)
    blind = distil_lengths(Shuffled(copy.deepcopy(fixed)), digits, num_steps=1000, **QUIET)
    for i in (0, 1):  # at longer codes there is hardly anything to gain on so small images
        assert report.share_of_gain[i] > max(0.7, blind.share_of_gain[i] + 0.5)
        assert report.correlation[i] > 0.5
        assert abs(blind.correlation[i]) < 0.35  # of 108 rows: 3.5 standard errors of a correlation of zero
        assert blind.share_of_gain[i] < 0.25
    assert report.share_of_gain[0] < 1 + 1e-6
    assert list(report.prices) == sorted(report.prices, reverse=True)
    assert (report.num_rows, report.num_held_out) == (971, 108)
    assert report.seconds > 0
    text = str(report).splitlines()
    assert text[0].startswith("lengths distilled from 971 rows in ")
    assert len(text) == 2 + 4
    # The law that is used has the mean lengths that were asked for, and the prices of the report have them, too.
    law = model.lengths(digits, mean_length=4.0)
    assert law.mean_length.mean().item() == pytest.approx(4.0, rel=0.02)
    assert model.encoder.value_head.price_at(4.0).item() == pytest.approx(report.prices[1], rel=0.2)


def test_the_report_is_about_rows_that_were_held_out(fixed, digits):
    """By hand, from the same head, on the rows that the seed holds out."""
    model = copy.deepcopy(fixed)
    report = distil_lengths(model, digits, seed=3, **BRIEF)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        copy.deepcopy(fixed).add_value_head()
        rows = torch.randperm(len(digits))[:108]
    with torch.no_grad():
        head, x = model.encoder.value_head, digits[rows]
        predicted, curves = head(model.value_inputs(x)).double(), model.value_curve(x).double()
    units = torch.arange(1, 17)
    for i, m in enumerate(report.mean_lengths):
        laws = []
        for values in (predicted, curves):  # bisection by hand
            low, high = -1e4, 1e4
            for _ in range(100):
                price = (low + high) / 2
                probs = (values - price * units).softmax(-1)
                low, high = (price, high) if (probs * units).sum(-1).mean() > m else (low, price)
            laws.append(probs)
        at = curves[:, int(m) - 1].mean()
        mine, best = ((law * curves).sum(-1).mean() - at for law in laws)
        assert report.share_of_gain[i] == pytest.approx((mine / best).item(), rel=1e-3)
        means = torch.stack([(law * units).sum(-1) for law in laws])
        assert report.correlation[i] == pytest.approx(torch.corrcoef(means)[0, 1].item(), rel=1e-3)


MODELS = {
    "vae": lambda: OrderedVAE((9,), 4, posterior_lengths="prior"),
    "amortised": lambda: OrderedVAE((9,), 4),
    "autoregressive": lambda: OrderedVAE((9,), 4, prior_latents="autoregressive", posterior_lengths="prior"),
    "priced": lambda: OrderedVAE((9,), 4, posterior_lengths="priced"),
    "wae": lambda: OrderedWAE((9,), 4),
    "tokens": lambda: OrderedVQVAE((9,), 4, 2, 8),
    "linear": lambda: LinearGaussianVAE((9,), 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_but_the_head(name: str):
    model, x = MODELS[name](), torch.rand(60, 9)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mode, state, grads = model.training, torch.get_rng_state(), [p.grad for p in model.parameters()]
    distil_lengths(model, x, **BRIEF)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == mode
    assert all(part.training == mode for part in model.modules() if "ValueHead" not in type(part).__name__)
    after = model.state_dict()
    for key, value in before.items():
        if "value_head" not in key:
            assert torch.equal(after[key], value), key
    changed = [key for key in after if key not in before or not torch.equal(after[key], before[key])]
    assert changed
    assert all("value_head" in key for key in changed)
    assert all(p.grad is None for key, p in model.named_parameters() if "value_head" not in key)
    assert grads == [None] * len(grads)
    assert model.lengths(x, mean_length=2.0).batch_shape == (60,)


def test_one_seed_makes_one_head_whatever_the_caller_drew():
    model, x = MODELS["vae"](), torch.rand(60, 9)
    heads = []
    for seed in (0, 0, 1):
        torch.rand(7)
        again = copy.deepcopy(model)
        distil_lengths(again, x, seed=seed, **BRIEF)
        heads.append(again.encoder.value_head.state_dict())
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])
    assert any(not torch.equal(heads[0][key], heads[2][key]) for key in heads[0])
    torch.manual_seed(5)
    distil_lengths(copy.deepcopy(model), x, seed=None, **BRIEF)
    goes_on = torch.rand(1)
    torch.manual_seed(5)
    assert not torch.equal(torch.rand(1), goes_on)  # None goes on with the caller's random numbers


class Own(nn.Module):
    """A model of one's own, whose data are a mapping: rows of two kinds, of which one needs one unit, one all."""

    def __init__(self, num_units: int) -> None:
        super().__init__()
        self.num_units, self.head = num_units, None

    def add_value_head(self):
        if self.head is None:
            self.head = ValueHead(2, self.num_units, hidden=(16,))
        return self.head

    def value_inputs(self, kind, other):
        return torch.stack([kind, other], -1)

    def value_curve(self, kind, other, lengths):
        steps = torch.tensor(lengths) / self.num_units
        return 10 * torch.where(kind[:, None] > 0, steps, steps.new_tensor(1.0).expand_as(steps))


@pytest.mark.parametrize("num_units", [1, 2, 5])
def test_a_model_of_ones_own(num_units: int):
    model = Own(num_units)
    kind = (torch.arange(400) % 2).double()
    data = {"kind": kind, "other": torch.rand(400)}
    report = distil_lengths(model, data, num_steps=300, **QUIET)
    assert report.mean_lengths == tuple(m for m in (2.0, 4.0) if m <= 0.9 * num_units)
    for share, r in zip(report.share_of_gain, report.correlation, strict=True):
        assert share == pytest.approx(1, abs=0.02)
        assert r > 0.99
    if num_units > 1:
        head = model.head
        with torch.no_grad():
            law = OrderedMask(logits=head(model.value_inputs(**data))).tilt(head.price_at((1 + num_units) / 2))
        assert law.mean_length.mean().item() == pytest.approx((1 + num_units) / 2, rel=0.02)
        means = [law.mean_length[kind == k].mean().item() for k in (0, 1)]
        assert means[1] - means[0] > 0.5


def test_prices_may_be_given():
    model, x = MODELS["vae"](), torch.rand(60, 9)
    distil_lengths(model, x, prices=(0.1, 10.0), **BRIEF)
    assert model.encoder.value_head.mean_lengths.isfinite().all()


X = torch.rand(60, 9)


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (
            nn.Linear(9, 2),
            X,
            {},
            "`model` must be an nn.Module with the methods of `ValuedModel`; Linear lacks add_val",
        ),
        (object(), X, {}, "object lacks add_value_head, value_inputs, value_curve"),
        (None, X[:19], {}, "`data` and `num_rows_used` must have 20 rows at least; got 19 and 20000"),
        (None, X, {"num_rows_used": 5}, "must have 20 rows at least; got 60 and 5"),
        (None, X / 0, {}, "`data` of shape .* must be finite"),
        (None, [X, X[:3]], {}, "the same number of rows"),
        (None, X, {"num_lengths": 0}, "distil_lengths: argument `num_lengths` must be an integer >= 1; got 0"),
        (None, X, {"num_steps": 1.5}, "`num_steps` must be an integer >= 1; got 1.5"),
        (None, X, {"batch_size": -1}, "`batch_size` must be an integer >= 1; got -1"),
        (None, X, {"prices": (2.0, 1.0)}, r"`prices` must be two prices, 0 < low < high; got \(2.0, 1.0\)"),
        (None, X, {"prices": (0.0, 1.0)}, "`prices` must be two prices"),
        (None, X, {"prices": (1.0, math.inf)}, "`prices` must be two prices"),
        (None, X, {"prices": (1.0,)}, "`prices` must be two prices"),
        (None, X, {"prices": 5}, "`prices` must be two prices, 0 < low < high; got 5"),
        (None, X, {"prices": ("a", "b")}, "`prices` must be two prices"),
        (None, X, {"lr": 0.0}, "`lr` must be finite and > 0; got 0.0"),
        (None, X, {"lr": "x"}, "`lr` must be finite and > 0; got 'x'"),
        (
            None,
            (X, torch.arange(60)),
            {},
            r"`data` must be what OrderedVAE.value_inputs\(x.*\(Tensor, Tensor\)",
        ),
        (None, {"y": X}, {}, r"`data` must be what OrderedVAE.value_inputs\(x.* takes; .*\(y\)"),
    ],
)
def test_errors(model, data, options, message: str):
    model = MODELS["vae"]() if model is None else model
    with pytest.raises(ValueError, match=f"distil_lengths: .*{message.removeprefix('distil_lengths: ')}"):
        distil_lengths(model, data, **BRIEF | options)


ODD = [*NO_NUMBERS.values(), "", b"", [], [1, True], True, np.array([1.0, 2.0]), torch.ones(2), torch.tensor(True)]


@pytest.mark.parametrize(
    "argument", ["num_lengths", "num_rows_used", "num_steps", "batch_size", "prices", "lr", "seed"]
)
def test_odd_numbers(argument):
    model = MODELS["vae"]()
    for odd in ODD:
        with pytest.raises(ValueError, match=f"^distil_lengths: argument `{argument}` must be "):
            distil_lengths(model, X, **BRIEF | {argument: odd})


def test_numbers_of_other_libraries():
    for batch_size in (7, np.int64(7)):
        report = distil_lengths(
            MODELS["vae"](), torch.rand(60, 9), batch_size=batch_size, lr=torch.tensor(0.003), **BRIEF
        )
        assert report.num_rows == 54


def test_a_head_that_diverges_says_so_and_is_what_it_was():
    model, x = MODELS["vae"](), torch.rand(60, 9)
    distil_lengths(model, x, **BRIEF)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^distil_lengths: argument `lr` must be lower: the head has diverged at 1e"):
        distil_lengths(model, x, lr=1e300, **BRIEF)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


WRONG_METHODS = {
    "add_value_head": [None, nn.Linear(2, 2)],
    "value_inputs": [None, torch.ones(3, 2), torch.ones(27), torch.full((27, 2), math.nan)],
    "value_curve": [[1.0], torch.ones(27), torch.ones(27, 1), torch.ones(27, 4) / 0, torch.ones(27, 4).to_sparse()],
}


@pytest.mark.parametrize("method", WRONG_METHODS)
def test_methods_that_return_something_else(method):
    data = {"kind": torch.zeros(30), "other": torch.zeros(30)}
    for wrong in WRONG_METHODS[method]:

        def returns_it(self, kind=None, other=None, lengths=None, wrong=wrong):
            return wrong

        wrong_model = type("Wrong", (Own,), {method: returns_it})(4)
        with pytest.raises(ValueError, match=rf"^distil_lengths: argument `model` must return .*{method}.*; got "):
            distil_lengths(wrong_model, data, **BRIEF)


def test_heads_are_not_trained_in_inference_mode():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"which torch\.inference_mode does not allow"):
        distil_lengths(MODELS["vae"](), X, **BRIEF)


def test_a_prior_that_rules_lengths_out_leaves_nothing_to_choose():
    prior = OrderedMask(probs=torch.tensor([0.0, 0.5, 0.5]))
    model = OrderedVAE((9,), 3, prior_lengths=prior, posterior_lengths="prior")
    with pytest.raises(ValueError, match="`prior_lengths` gives some lengths no probability"):
        distil_lengths(model, X, **BRIEF)
