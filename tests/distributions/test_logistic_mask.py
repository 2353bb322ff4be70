"""The hand-written backward pass of `logistic_mask` is that of its soft surrogate, written out naively."""

import oracles
import pytest
import torch
from torch.autograd import gradcheck
from torch.func import grad, vmap

from pyro_vnd.distributions._fast.masks import logistic_mask

# Shapes of the law, of the uniform numbers and of the temperature; None is a plain number.
SHAPES = {
    "one mask": ((6,), (1,), None),
    "two units": ((2,), (1,), ()),
    "one unit": ((3, 1), (3, 1), (3, 1)),
    "a law per row": ((5, 6), (5, 1), (5, 1)),
    "a shared law": ((6,), (7, 1), (1,)),
    "a shared law, a temperature per row": ((6,), (7, 1), (7, 1)),
    "draws of a batch": ((5, 6), (4, 5, 1), (5, 1)),
    "an expanded law": ((5, 1, 6), (4, 5, 3, 1), (3, 1)),
    "a temperature per draw": ((5, 6), (4, 5, 1), (4, 1, 1)),
}
each_shape = pytest.mark.parametrize(("law", "noise", "temperature"), SHAPES.values(), ids=SHAPES)


def inputs(law, noise, temperature, is_logits):
    param = torch.randn(law) * 2
    if not is_logits:
        param = param.softmax(-1)
    temperature = 0.4 if temperature is None else torch.rand(temperature) + 0.2
    return param, torch.rand(noise), temperature


def surrogate(param, uniform, temperature, is_logits):
    return oracles.soft_mask(param.softmax(-1) if is_logits else param, uniform, temperature)


@each_shape
@pytest.mark.parametrize("is_logits", [True, False], ids=["logits", "probs"])
def test_backward_is_that_of_the_surrogate(law, noise, temperature, is_logits):
    param, uniform, temperature = inputs(law, noise, temperature, is_logits)
    wanted = [param.requires_grad_()]
    if isinstance(temperature, torch.Tensor):
        wanted.append(temperature.requires_grad_())
    soft = surrogate(param, uniform, temperature, is_logits)
    hard = logistic_mask(param, uniform, temperature, is_logits)
    assert torch.equal(hard, (soft > 0.5).double())  # the soft mask crosses one half where the hard one jumps
    assert hard.shape == soft.shape
    weight = torch.randn(soft.shape)
    actual = torch.autograd.grad((hard * weight).sum(), wanted)
    expected = torch.autograd.grad((soft * weight).sum(), wanted, materialize_grads=True)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wanted", ["param", "temperature"])
def test_each_input_alone_can_have_the_gradient(wanted):
    param, uniform, temperature = inputs((5, 6), (4, 5, 1), (5, 1), True)
    leaf = {"param": param, "temperature": temperature}[wanted].requires_grad_()
    weight = torch.randn(4, 5, 6)
    (actual,) = torch.autograd.grad((logistic_mask(param, uniform, temperature, True) * weight).sum(), leaf)
    (expected,) = torch.autograd.grad((surrogate(param, uniform, temperature, True) * weight).sum(), leaf)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@each_shape
@pytest.mark.parametrize("is_logits", [True, False], ids=["logits", "probs"])
def test_surrogate_against_finite_differences(law, noise, temperature, is_logits):
    param, uniform, temperature = inputs(law, noise, temperature, is_logits)
    param.requires_grad_()
    assert gradcheck(lambda x: surrogate(x, uniform, temperature, is_logits), param)


@pytest.mark.parametrize("logits", [[-30.0, -10.0, 0.0, 30.0], [30.0, 0.0, -10.0, -30.0], [-30.0, 30.0, 0.0, -30.0]])
def test_backward_in_the_far_tails(logits):
    """Keep probabilities within 1e-26 of zero and one, and uniform numbers near both ends."""
    logits = torch.tensor(logits, requires_grad=True)
    for uniform in torch.tensor([1e-12, 1e-6, 0.5, 1 - 1e-6, 1 - 1e-12]).reshape(-1, 1):
        for weight in torch.eye(4)[1:]:
            hard, soft = logistic_mask(logits, uniform, 5.0, True), surrogate(logits, uniform, 5.0, True)
            (actual,) = torch.autograd.grad((hard * weight).sum(), logits)
            (expected,) = torch.autograd.grad((soft * weight).sum(), logits)
            assert expected.abs().sum() > 0
            torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-20)


def test_gradient_of_a_sum_of_float32_masks_against_float64():
    """A thousand units of unequal weight: sums from both ends keep float32's digits."""
    param, uniform = 4 * torch.randn(8, 1000, dtype=torch.float32), torch.rand(8, 1, dtype=torch.float32)
    weight = torch.randn(8, 1000)

    def gradient(dtype):
        leaf = param.to(dtype).requires_grad_()
        mask = logistic_mask(leaf, uniform.to(dtype), 0.2, True)
        return torch.autograd.grad((mask * weight.to(dtype)).sum(), leaf)[0].double()

    exact = gradient(torch.float64)
    assert (gradient(torch.float32) - exact).norm() / exact.norm() < 1e-4


def test_second_derivative_raises():
    logits = torch.zeros(3, requires_grad=True)
    mask = logistic_mask(logits, torch.rand(4, 1), 0.2, True)
    (first,) = torch.autograd.grad((mask**2).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


# Which inputs are mapped, and over which dimension.
MAPPED = {
    "all": (0, 0, 0),
    "noise": (None, 0, None),
    "law": (0, None, None),
    "temperature": (None, None, 0),
    "law and noise": (0, 0, None),
    "law, over another dimension": (1, 0, None),
}


@pytest.mark.parametrize("in_dims", MAPPED.values(), ids=MAPPED)
@pytest.mark.parametrize("extra", [(), (3,)], ids=["vectors", "a further batch of noise"])
def test_vmap_equals_a_loop(in_dims, extra):
    rows = 5
    shapes = ((6,), (*extra, 1), (1,))
    leaves = [
        torch.rand(*shape[:dim], rows, *shape[dim:]) + 0.1 if dim is not None else torch.rand(shape) + 0.1
        for shape, dim in zip(shapes, in_dims, strict=True)
    ]
    leaves[1] = leaves[1] / 1.2  # below one
    weight = torch.randn(*extra, 6)

    def objective(param, uniform, temperature):
        return (logistic_mask(param, uniform, temperature, True) * weight).sum()

    actual = vmap(grad(objective, argnums=(0, 2)), in_dims=in_dims)(*leaves)
    values = vmap(objective, in_dims=in_dims)(*leaves)
    for row in range(rows):
        inputs = [x if dim is None else x.select(dim, row) for x, dim in zip(leaves, in_dims, strict=True)]
        inputs = [x.detach().clone().requires_grad_(i != 1) for i, x in enumerate(inputs)]
        value = objective(*inputs)
        expected = torch.autograd.grad(value, [inputs[0], inputs[2]])
        torch.testing.assert_close(values[row], value)
        torch.testing.assert_close(tuple(x[row] for x in actual), expected)


def test_nested_vmap_equals_a_batch():
    logits, uniform = torch.randn(2, 3, 6), torch.rand(2, 3, 1)

    def mask(param, noise):
        return logistic_mask(param, noise, 0.2, True)

    assert torch.equal(vmap(vmap(mask))(logits, uniform), mask(logits, uniform))


def test_gradient_of_a_law_outside_of_vmap():
    """The law is shared by the mapped draws: its gradient is their sum."""
    uniform, weight = torch.rand(7, 1), torch.randn(6)

    def total(logits):
        return vmap(lambda noise: (logistic_mask(logits, noise, 0.3, True) * weight).sum())(uniform).sum()

    logits = torch.randn(6, requires_grad=True)
    (expected,) = torch.autograd.grad((oracles.soft_mask(logits.softmax(-1), uniform, 0.3) * weight).sum(), logits)
    torch.testing.assert_close(grad(total)(logits), expected)
    torch.testing.assert_close(torch.autograd.grad(total(logits), logits)[0], expected)
