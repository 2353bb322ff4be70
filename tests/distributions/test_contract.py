"""What every distribution of the library promises as a torch and Pyro distribution, whatever its law."""

import copy
import pickle

import oracles
import pytest
import torch
from cases import CASES, LENGTH_CASES, each
from torch import nn
from torch.distributions import kl_divergence
from torch.func import vmap

from pyro_vnd.distributions import NestedAutoregressive, RelaxedOrderedMask
from pyro_vnd.distributions.nested import NestedLaw
from pyro_vnd.distributions.weights import LogScaleNormal

BATCH_SHAPES = [(), (3,), (2, 3), (0,), (2, 0)]


def first_argument(case) -> str:
    """The parameter of the lengths, of a law that has one."""
    return next(name for name in ("probs", "logits", *case.units, *case.batch) if name in case.units | case.batch)


WITH_ARGUMENTS = [case for case in CASES if case.units or case.batch]


@each()
@pytest.mark.parametrize("num_units", [1, 4])
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES)
@pytest.mark.parametrize("sample_shape", [(), (5,), (5, 1), (0,)])
def test_shapes_and_support(case, batch_shape, sample_shape, num_units):
    law, event_shape = case.build(batch_shape, num_units), case.event_shape(num_units)
    assert type(law) is case.cls
    assert law.batch_shape == batch_shape
    assert law.event_shape == event_shape
    assert law.has_rsample is case.reparameterised
    assert law.has_enumerate_support is case.enumerable
    assert law.support.event_dim == law.event_dim == len(event_shape)
    for name in ("keep_probs", "length_probs") * case.over_lengths + ("mean", "variance") * case.moments:
        assert getattr(law, name).shape == (*batch_shape, *event_shape), name
    if case.over_lengths:
        assert law.num_units == num_units
        assert law.mean_length.shape == batch_shape
    draws = [case.value(law, sample_shape)] + ([law.rsample(sample_shape)] if case.reparameterised else [])
    for value in draws:
        assert value.shape == (*sample_shape, *batch_shape, *event_shape)
        if value.numel() or case.over_lengths:  # torch's constraint of independent entries fails for empty batches
            assert law.support.check(value).all()
        assert torch.isfinite(law.log_prob(value)).all()
        assert law.log_prob(value).shape == (*sample_shape, *batch_shape)
        if case.hard:
            assert ((value == 0) | (value == 1)).all()
            assert (value[..., 0] == 1).all()


@each()
@pytest.mark.parametrize("small", [(), (3,), (1, 3), (2, 1)])
def test_expand_is_native(case, small):
    law = case.build(small)
    big = law.expand((2, 3))
    assert type(big) is case.cls
    assert big.batch_shape == (2, 3)
    value = case.value(big, (4,))
    assert value.shape == (4, 2, 3, *case.event_shape())
    torch.testing.assert_close(big.log_prob(value), law.log_prob(value).expand(4, 2, 3))
    if case.over_lengths:
        assert torch.equal(big.keep_probs, law.keep_probs.expand(2, 3, 4))
    assert law.expand_by([7]).batch_shape == (7, *small)
    if case.samples:
        assert big.expand((5, 2, 3)).sample().shape == (5, 2, 3, *case.event_shape())
        assert len(law.expand((50, *small)).sample().unique(dim=0)) > 1  # each row has its own noise


@each(divergence=True)
def test_divergence_of_expanded_laws(case):
    q, p = case.build((3,)), case.build()
    kl = kl_divergence(q.expand((2, 3)), p.expand((2, 3)))
    assert kl.shape == (2, 3)
    assert (kl > 0).all()
    torch.testing.assert_close(kl, kl_divergence(q, p).expand(2, 3))
    torch.testing.assert_close(kl_divergence(q, q), torch.zeros(3))


@each(infers_shapes=True)
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES)
def test_infer_shapes(case, batch_shape):
    batch_shape = () if case.expanded else batch_shape
    law = case.build(batch_shape)
    shapes = {name: value.shape for name, value in case.arguments(batch_shape).items()}
    assert case.cls.infer_shapes(**shapes) == (law.batch_shape, law.event_shape)


@each([case for case in LENGTH_CASES if case.batch])
def test_infer_shapes_of_a_scalar_temperature(case):
    shapes = {name: value.shape for name, value in case.arguments((3,)).items()}
    law = case.build((3,), temperature=torch.tensor(0.5))
    assert case.cls.infer_shapes(**(shapes | {"temperature": torch.Size([])})) == (law.batch_shape, law.event_shape)


@each()
@pytest.mark.parametrize(
    ("batch_shape", "value_shape"), [((), (2, 3)), ((3,), (2, 3)), ((3,), ()), ((2, 1), (3,)), ((2, 3), (1, 3))]
)
def test_log_prob_broadcasts(case, batch_shape, value_shape):
    law = case.build(batch_shape)
    value = case.value(case.build().expand(value_shape))
    log_prob = law.log_prob(value)
    shape = torch.broadcast_shapes(batch_shape, value_shape)
    assert log_prob.shape == shape
    every = law.log_prob(value.expand(*shape, *case.event_shape()).clone())
    torch.testing.assert_close(log_prob, every)


@each(samples=True)
def test_log_prob_is_a_function_of_the_value_alone(case):
    law = case.build((3,))
    value = law.rsample((2,)) if case.reparameterised else law.sample((2,))
    copies = [
        value.clone(),
        value.detach(),
        value.detach().clone(),
        value.reshape(value.shape),
        value.expand(value.shape),
        torch.stack([value[0], value[1]]),
        torch.tensor(value.tolist()),
    ]
    for other in copies:
        torch.testing.assert_close(law.log_prob(other), law.log_prob(value))
    # Scored by another law, so that nothing remembered from the draw can stand in for the value.
    prior = case.build((3,))
    torch.testing.assert_close(prior.log_prob(value.detach().clone()), prior.log_prob(value))
    assert not torch.allclose(prior.log_prob(value), law.log_prob(value))


@each(samples=True)
@pytest.mark.parametrize("made_inside", [False, True])
def test_samples_of_inference_mode(case, made_inside):
    """They are scored inside and outside of it, and a law that was used there has its gradients after it."""
    arguments = {name: value.requires_grad_() for name, value in case.arguments((3,)).items()}
    law = case.of(**arguments)
    with torch.inference_mode():
        inner = case.of(**arguments) if made_inside else law
        values = [inner.sample((2,))] + ([inner.rsample((2,)), inner.rsample()] if case.reparameterised else [])
        inside = [inner.log_prob(value) for value in values]
    for value, log_prob in zip(values, inside, strict=True):
        assert value.is_inference()
        with torch.no_grad():
            torch.testing.assert_close(law.log_prob(value), log_prob)
    if not made_inside:
        found = torch.autograd.grad(law.log_prob(values[0].clone()).sum(), list(arguments.values()), allow_unused=True)
        fresh = case.of(**arguments).log_prob(values[0].clone()).sum()
        torch.testing.assert_close(found, torch.autograd.grad(fresh, list(arguments.values()), allow_unused=True))
        assert any(gradient is not None and (gradient != 0).any() for gradient in found)


@each()
@pytest.mark.parametrize("used", [False, True])
def test_pickle_and_deepcopy(case, used):
    law = case.build((3,))
    value = case.value(law)
    if used:  # whatever was derived and kept must not get in the way
        law.log_prob(value).sum() + (law.mean_length.sum() if case.over_lengths else 0)
        if case.moments:
            law.variance.sum()
    for other in (pickle.loads(pickle.dumps(law)), copy.deepcopy(law), copy.copy(law)):
        assert type(other) is case.cls
        assert other.batch_shape == law.batch_shape
        torch.testing.assert_close(other.log_prob(value), law.log_prob(value))
        if case.over_lengths:
            torch.testing.assert_close(other.keep_probs, law.keep_probs)
        if case.samples:
            torch.manual_seed(1)
            expected = law.sample()
            torch.manual_seed(1)
            assert torch.equal(other.sample(), expected)


@each(WITH_ARGUMENTS)
def test_deepcopy_of_a_module_that_holds_a_law(case):
    name = first_argument(case)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.param = nn.Parameter(case.arguments((3,))[name])
            self.law = case.build((3,), **{name: self.param})

    holder = Holder()
    value = holder.law.sample()
    holder.law.log_prob(value).sum().backward()
    holder.zero_grad()
    for other in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder.law))):
        law = other.law if isinstance(other, nn.Module) else other
        law.log_prob(value).sum().backward()
        if isinstance(other, nn.Module):
            assert other.param.grad.abs().sum() > 0  # the copy's law follows the copy's parameter
    assert holder.param.grad is None


@each(WITH_ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_parameters(case, dtype, default):
    torch.set_default_dtype(default)
    law = case.build((3,), dtype=dtype)
    value = law.rsample() if case.reparameterised else law.sample()
    results = [value, law.sample(), law.log_prob(value)]
    if case.over_lengths:
        results += [law.keep_probs, law.mean_length]
    if case.moments:
        results += [law.mean, law.variance]
    if case.entropy:
        results.append(law.entropy())
    if case.hard:
        results += [law.mode, law.covariance_matrix]
    if case.enumerable:
        results.append(law.enumerate_support())
    assert {x.dtype for x in results} == {dtype}


@each(over_lengths=True, is_cut=False)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_lengths_are_cast_up(case, half):
    name = first_argument(case)
    arguments = case.arguments((3,), 50, torch.float32)
    exact = case.of(**(arguments | {name: arguments[name].to(half).float()}))
    law = case.of(**(arguments | {name: arguments[name].to(half)}))
    value = law.sample()
    assert value.dtype == law.log_prob(value).dtype == law.keep_probs.dtype == torch.float32
    assert torch.equal(law.keep_probs, exact.keep_probs)


@each(samples=True)
def test_sample_has_no_gradient(case):
    law = case.of(**{name: value.requires_grad_() for name, value in case.arguments((3,)).items()})
    assert not law.sample().requires_grad
    assert law.log_prob(law.sample()).requires_grad


@each([case for case in CASES if case.learned])
def test_every_parameter_learns_from_a_sample(case):
    arguments = {name: value.requires_grad_() for name, value in case.arguments((3,)).items()}
    value = case.of(**arguments).rsample((20,))
    (value * torch.randn(value.shape)).sum().backward()
    for name in case.learned:
        grad = arguments[name].grad
        assert torch.isfinite(grad).all(), name
        assert (grad != 0).any(-1).all() if name in case.units else (grad != 0).all(), name


@each(over_lengths=True)
def test_one_unit_is_always_kept(case):
    law = case.build((3,), 1)
    assert torch.equal(law.keep_probs, torch.ones(3, 1))
    assert torch.equal(law.mean_length, torch.ones(3))
    if not isinstance(law, NestedLaw):
        assert torch.equal(law.sample((5,)), torch.ones(5, 3, 1))
        torch.testing.assert_close(law.log_prob(torch.ones(3, 1)), torch.zeros(3))


@each([case for case in CASES if case.cls is not LogScaleNormal])  # has torch's, with all its numbers
def test_repr_names_the_class_and_the_batch_shape(case):
    text = repr(case.build((2, 3)))
    assert case.cls.__name__ in text
    assert "2, 3" in text
    assert len(text) < 150


@each(over_lengths=True)
def test_repr_says_what_the_lengths_are(case):
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
    single, batch = (repr(case.with_lengths(probs=x)) for x in (probs[0], probs))
    assert "K = 4, mean length 3.0, mode 4" in single
    assert (
        "batch (2,), K = 4, mean length " + ("2.0 to 3.0, mode 2 to 4" if case.is_cut else "1.6 to 3.0, mode 1 to 4")
        in batch
    )
    assert ("1 of 2 cut" in batch) is case.is_cut


@each([case for case in LENGTH_CASES if case.cls is not NestedAutoregressive])
def test_repr_never_raises(case):
    unchecked = {"validate_args": False}
    for logits in (torch.full((3, 4), torch.nan), torch.zeros(0, 4), torch.zeros(3, 4, device="meta")):
        assert "K = 4" in repr(
            case.with_lengths(logits=logits, **unchecked, **({"temperature": 0.5} if case.batch else {}))
        )
    seen = []

    def look(logits):
        seen.append(repr(case.with_lengths(logits=logits, **unchecked)))
        return logits

    vmap(look, randomness="same")(torch.zeros(2, 4))
    assert "K = 4" in seen[0]


@each(over_lengths=True)
def test_plain_samples_under_vmap(case):
    """Of 20,000 laws, each with noise of its own: the lengths have their law, by chi-square; the power beside it."""
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def draw(row):
        return case.with_lengths(probs=row, validate_args=False).sample()

    values = vmap(draw, randomness="different")(probs.expand(20_000, 4))
    assert values.shape == (20_000, 4)
    if case.cls is not RelaxedOrderedMask:
        masks = (values != 0).to(values)
        assert oracles.law_pvalue(masks, probs) > 1e-3
        assert oracles.law_pvalue(masks, probs + torch.tensor([0.02, -0.02, 0.0, 0.0])) < 1e-6


@each(enumerable=True)
def test_enumerate_support_shapes(case):
    law = case.build((2, 3))
    assert law.enumerate_support().shape == (4, 2, 3, 4)
    assert law.enumerate_support(expand=False).shape == (4, 1, 1, 4)
    assert law.expand((5, 2, 3)).enumerate_support().shape == (4, 5, 2, 3, 4)
    assert law.support.check(law.enumerate_support()).all()
    total = law.log_prob(law.enumerate_support()).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros(2, 3))


@each(enumerable=False)
def test_what_cannot_be_enumerated_says_so(case):
    with pytest.raises(NotImplementedError):
        case.build().enumerate_support()


@each(reparameterised=False)
def test_what_is_not_reparameterised_says_so(case):
    with pytest.raises(NotImplementedError):
        case.build().rsample()


@pytest.mark.gpu
@each(WITH_ARGUMENTS)
def test_tensors_on_a_gpu(case):
    arguments = {name: value.cuda() for name, value in case.arguments((3,), dtype=torch.float32).items()}
    law = case.of(**arguments)
    value = law.rsample((1000,)) if case.reparameterised else law.sample((1000,))
    assert value.is_cuda
    assert law.support.check(value).all()
    on_cpu = case.of(**{name: x.cpu() for name, x in arguments.items()})
    expected = on_cpu.log_prob(value.detach().cpu())
    torch.testing.assert_close(law.log_prob(value.detach()).cpu(), expected, rtol=1e-3, atol=1e-3)
