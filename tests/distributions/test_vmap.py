"""`torch.func` over what laws do, with checks of arguments on, as they are by default."""

import oracles
import pytest
import torch
from cases import CASES, each
from torch.distributions import kl_divergence
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough

# Torch itself says so when it first differentiates in forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
WITH_ARGUMENTS = [case for case in CASES if case.units or case.batch]


def rows_of(case, *batch_shape, num_units=4):
    """A function that makes a law of its arguments, and arguments with a batch in front."""
    arguments = [case.arguments((), num_units) for _ in range(torch.Size(batch_shape).numel())]
    stacked = {name: torch.stack([row[name] for row in arguments]) for name in arguments[0]}
    values = [x.reshape(*batch_shape, *x.shape[1:]) for x in stacked.values()]
    return lambda *xs: case.of(**dict(zip(stacked, xs, strict=True))), values


@each(WITH_ARGUMENTS)
@pytest.mark.parametrize("num_units", [1, 4])
def test_scores_and_moments_of_a_batch_are_those_of_its_rows(case, num_units):
    make, arguments = rows_of(case, 2, 3, num_units=num_units)

    def results(value, *xs):
        law = make(*xs)
        found = [law.log_prob(value), law.expand((2,)).log_prob(value)]
        if case.entropy:
            found.append(law.entropy())
        if case.divergence:
            found.append(kl_divergence(law, make(*xs).expand(law.batch_shape)))
        if case.moments:
            found += [law.mean, law.variance]
        return tuple(found)

    values = torch.stack([case.value(case.build((), num_units)) for _ in range(6)])
    values = values.reshape(2, 3, *values.shape[1:])
    actual = vmap(vmap(results))(values, *arguments)
    for i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3)):
        expected = results(values[i, j], *(x[i, j] for x in arguments))
        torch.testing.assert_close(tuple(x[i, j] for x in actual), expected)


@each([case for case in WITH_ARGUMENTS if case.samples])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_draws_of_a_batch(case, randomness):
    make, arguments = rows_of(case, 50)
    one = [x[:1].expand_as(x) for x in arguments]
    for how in ("sample", "rsample") if case.reparameterised else ("sample",):
        draws = vmap(lambda *xs, how=how: getattr(make(*xs), how)((40,)), randomness=randomness)(*one)
        assert draws.shape == (50, 40, *case.event_shape())
        assert len(draws.unique(dim=0)) == (1 if randomness == "same" else 50)


@each(WITH_ARGUMENTS)
def test_derivatives_of_scores(case):
    """In reverse and forward mode, once and twice, against those of autograd."""
    make, arguments = rows_of(case, 1)
    arguments = [x[0] for x in arguments]
    value, places = case.value(make(*arguments)), tuple(range(len(arguments)))

    def score(*xs):
        return make(*xs).log_prob(value)

    expected = torch.autograd.functional.jacobian(score, tuple(arguments))
    for derivative in (grad, jacrev, jacfwd):
        torch.testing.assert_close(derivative(score, places)(*arguments), expected)
    tangents = tuple(torch.rand_like(x) for x in arguments)
    slope = sum((x * t).sum() for x, t in zip(expected, tangents, strict=True))
    torch.testing.assert_close(jvp(score, tuple(arguments), tangents)[1], slope)
    torch.testing.assert_close(
        hessian(score, places)(*arguments), torch.autograd.functional.hessian(score, tuple(arguments))
    )


@each([case for case in WITH_ARGUMENTS if case.reparameterised])
def test_derivatives_of_draws(case):
    """Row by row under one noise, and in forward mode, those of autograd."""
    make, arguments = rows_of(case, 3)
    places = tuple(range(len(arguments)))

    def drawn(*xs):
        torch.manual_seed(1)
        law = make(*xs)
        value = law.rsample((5,))
        return value.square().sum() + law.log_prob(value).sum()

    by_rows = vmap(grad(drawn, places), randomness="same")(*arguments)
    for row in range(3):
        leaves = tuple(x[row] for x in arguments)
        expected = torch.autograd.functional.jacobian(drawn, leaves)
        torch.testing.assert_close(tuple(x[row] for x in by_rows), expected)
        torch.testing.assert_close(jacfwd(drawn, places, randomness="same")(*leaves), expected)


@each([case for case in CASES if "probs" in case.units])
@pytest.mark.parametrize("probs", [[0.5, 0.0, 0.5], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
def test_lengths_of_probability_zero(case, probs):
    by_lengths = case.by_lengths(3)

    def total(probs):
        torch.manual_seed(1)
        law = by_lengths(probs=probs)
        draw = law.rsample() if case.reparameterised else law.sample()
        parts = [law.log_prob(draw)] + ([law.entropy()] if case.entropy else [])
        return sum(parts) + (kl_divergence(law, law) if case.divergence else 0)

    leaf = torch.tensor(probs, requires_grad=True)
    value = total(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    rows = leaf.detach().expand(3, 3)
    torch.testing.assert_close(vmap(total, randomness="same")(rows), value.expand(3))
    torch.testing.assert_close(vmap(grad(total), randomness="same")(rows), gradient.expand(3, 3))
    assert torch.isfinite(value + gradient).all()


@each(over_lengths=True)
def test_one_wrong_row_of_a_batch_is_found(case):
    name = "logits" if "logits" in case.units else "probs"
    lengths = torch.rand(3, 4)
    lengths[1, 2] = float("nan")
    by_lengths = case.by_lengths()
    with pytest.raises(ValueError, match=f"argument `{name}` of shape .4,. must have finite"):
        vmap(lambda x: by_lengths(**{name: x}).keep_probs)(lengths)
    with pytest.raises(ValueError, match="argument `value`"):
        vmap(case.build().log_prob)(lengths)
    with pytest.raises(ValueError, match=r"argument `value` must have shape|argument `value` must be .* of shape"):
        vmap(case.build().log_prob)(torch.ones(3, 5))


def test_other_wrong_rows():
    wrong = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match=r"argument `scale` of shape .2,. must be finite and > 0"):
        vmap(lambda scale: NestedNormal(zeros, scale, zeros).mean)(wrong)
    with pytest.raises(ValueError, match=r"argument `temperature` of shape .. must be positive"):
        vmap(lambda x: OrderedMaskStraightThrough(x, logits=zeros).mean)(wrong[1])
    with pytest.raises(ValueError, match=r"argument `probs` of shape .2,. must have values >= 0"):
        vmap(lambda probs: OrderedMask(probs=probs).mean)(wrong)
    with pytest.raises(ValueError, match="argument `p` must be strictly between 0 and 1"):
        vmap(lambda p: OrderedMask.geometric(p, 3).mean)(wrong[1])
    with pytest.raises(ValueError, match="cut: argument `length` must be integers from 1 to 3"):
        vmap(lambda length: OrderedMask.uniform(3).cut(length).mean)(torch.arange(5))
    with pytest.raises(ValueError, match=r"argument `price` .* must be finite"):
        vmap(lambda price: OrderedMask.uniform(4).tilt(price).probs)(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match=r"argument `mean_length` .* strictly between"):
        vmap(lambda mean: OrderedMask.uniform(4).at_mean_length(mean).probs)(torch.tensor([2.0, 5.0]))
    with pytest.raises(ValueError, match=r"argument `cost` .* > 0 for one unit"):
        vmap(lambda cost: OrderedMask.uniform(4).tilt(1.0, cost).probs)(torch.tensor([[1.0] * 4, [1.0, 0.0, 0.0, 0.0]]))


@each([case for case in CASES if case.over_lengths and not case.is_cut and hasattr(case.cls, "cut")])
def test_cut_to_lengths_of_a_batch(case):
    make, arguments = rows_of(case, 5)
    lengths = torch.arange(5)

    def results(length, *xs):
        torch.manual_seed(1)
        law, prior = make(*xs).cut(length), make(*xs).cut(length)
        draw = law.rsample() if case.reparameterised else law.sample()
        divergence = kl_divergence(law, prior) if case.divergence else torch.zeros(())
        return draw, law.keep_probs, law.log_prob(draw), divergence

    actual = vmap(results, randomness="same")(lengths, *arguments)
    for row in range(5):
        expected = results(lengths[row], *(x[row] for x in arguments))
        torch.testing.assert_close(tuple(x[row] for x in actual), expected)


def test_a_law_that_a_transform_used_is_as_good_as_new():
    logits = torch.randn(4, requires_grad=True)
    law = OrderedMaskStraightThrough(0.2, logits=logits)
    mask = law.sample()
    vmap(grad(lambda z: (law.log_prob(z) * law.entropy() * z).sum()))(mask.expand(3, 4))
    (gradient,) = torch.autograd.grad(law.log_prob(mask), logits)
    torch.testing.assert_close(gradient, mask - torch.cat([mask[1:], torch.zeros(1)]) - logits.softmax(-1))


def draw(logits, temperature=0.2, sample_shape=(), **options):
    return OrderedMaskStraightThrough(temperature, logits=logits, **options).rsample(sample_shape)


def test_different_noise_for_each_row_follows_the_law():
    logits = torch.tensor([0.5, -1.0, 1.0, 0.0])
    masks = vmap(draw, randomness="different")(logits.expand(20_000, 4))
    assert oracles.law_pvalue(masks, logits.softmax(-1)) > 1e-3
    shifted = logits.softmax(-1) + torch.tensor([0.02, -0.02, 0.0, 0.0])
    assert oracles.law_pvalue(masks, shifted) < 1e-6


@pytest.mark.parametrize("noise", ["logistic", "gumbel"])
def test_same_noise_for_each_row(noise):
    masks = vmap(lambda x: draw(x, noise=noise), randomness="same")(torch.zeros(50, 16))
    assert len(masks.unique(dim=0)) == 1


def test_vmap_over_nothing_but_randomness():
    logits = torch.tensor([0.5, -1.0, 1.0, 0.0])
    law = OrderedMaskStraightThrough(0.2, logits=logits)
    masks = vmap(lambda _: law.rsample(), randomness="different")(torch.arange(20_000))
    assert oracles.law_pvalue(masks, logits.softmax(-1)) > 1e-3
    # The law still works outside.
    assert oracles.law_pvalue(law.rsample((20_000,)), logits.softmax(-1)) > 1e-3


@pytest.mark.parametrize("sample_shape", [(), (3,)])
@pytest.mark.parametrize("parameter", ["logits", "probs"])
def test_gradients_under_vmap(sample_shape, parameter):
    """With a tensor temperature; a row of equal weights has the gradient of a plain batch with the same noise."""
    weight = torch.arange(4.0)

    def objective(value, temperature):
        law = OrderedMaskStraightThrough(temperature, **{parameter: value})
        return (law.rsample(sample_shape) * weight).sum()

    values, temperature = torch.rand(5, 4) + 0.1, torch.rand(5) + 0.2
    torch.manual_seed(1)
    actual = vmap(grad(objective, argnums=(0, 1)), randomness="same")(values, temperature)
    for row in range(5):
        torch.manual_seed(1)
        leaves = values[row].clone().requires_grad_(), temperature[row].clone().requires_grad_()
        expected = torch.autograd.grad(objective(*leaves), leaves)
        torch.testing.assert_close(tuple(x[row] for x in actual), expected)
        assert all((x != 0).any() for x in expected)


def test_jacobian():
    """Row i is the gradient of mask entry i; the first unit is always kept."""
    logits = torch.randn(4)
    torch.manual_seed(1)
    jacobian = jacrev(draw)(logits)
    assert torch.equal(jacobian[0], torch.zeros(4))
    for i in range(1, 4):
        torch.manual_seed(1)
        leaf = logits.clone().requires_grad_()
        torch.testing.assert_close(jacobian[i], torch.autograd.grad(draw(leaf)[i], leaf)[0])


def test_stacked_networks():
    """Masks within functional calls over stacked weights, as an ensemble is evaluated."""
    net = torch.nn.Linear(6, 2)
    stacked = {name: torch.randn(9, *x.shape) for name, x in net.named_parameters()}
    x, logits = torch.randn(3, 6), torch.zeros(9, 6)

    def output(weights, row):
        return functional_call(net, weights, (x * draw(row, sample_shape=(3,)),))

    assert vmap(output, randomness="different")(stacked, logits).shape == (9, 3, 2)
