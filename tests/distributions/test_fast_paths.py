"""Each fast path equals the plain code beside it: values, gradients, second derivatives, and under `torch.func`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from pyro_vnd._compat import only_plain_code
from pyro_vnd.distributions._fast import arrays, log_uniform, masks, mixtures, normals
from pyro_vnd.distributions._fast.broadcast import broadcast_shapes


def real(*shape: int) -> Tensor:
    return torch.randn(shape)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.1


@dataclass(frozen=True)
class Path:
    """A fast path, its plain code, inputs that may have a gradient, and inputs that may not."""

    fast: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: Callable[[], list[Tensor]]
    rest: Callable[[], tuple[Any, ...]] = tuple
    times: int = 2  # differentiable so often


PATHS = {
    "logistic_mask of logits": Path(
        lambda x, t, u: masks.logistic_mask(x, u, t, True),
        lambda x, t, u: masks.plain_logistic_mask(x, u, t, True),
        lambda: [real(5, 7), positive(5, 1)],
        lambda: (torch.rand(5, 1),),
        times=1,
    ),
    "logistic_mask of probabilities": Path(
        lambda x, t, u: masks.logistic_mask(x, u, t, False),
        lambda x, t, u: masks.plain_logistic_mask(x, u, t, False),
        lambda: [real(5, 7).softmax(-1), positive(5, 1)],
        lambda: (torch.rand(5, 1),),
        times=1,
    ),
    "hard_mask": Path(
        masks.hard_mask,
        masks.plain_hard_mask,
        list,
        lambda: (real(5, 7).softmax(-1).flip(-1).cumsum(-1).flip(-1), torch.rand(5, 1)),
        times=0,
    ),
    "normal_kl": Path(
        normals.normal_kl,
        normals.plain_normal_kl,
        lambda: [real(5, 3), positive(5, 3), real(5, 3), positive(5, 3)],
    ),
    "variance_and_kl": Path(
        normals.variance_and_kl,
        normals.plain_variance_and_kl,
        lambda: [real(5, 3), real(5, 3)],
        lambda: ((0.3, 0.7),),
    ),
    "draw_and_kl": Path(
        lambda x, y, prior, noise: normals.draw_and_kl(x, y, noise, prior),
        lambda x, y, prior, noise: normals.plain_draw_and_kl(x, y, noise, prior),
        lambda: [real(5, 3), real(5, 3)],
        lambda: ((0.0, 0.7), real(5, 3)),
    ),
    "mixture_terms": Path(
        mixtures.mixture_terms,
        mixtures.plain_mixture_terms,
        lambda: [real(4, 3), real(4, 3, 5), positive(4, 3, 5), real(4, 3, 5)],
    ),
    "log_uniform_kl": Path(
        log_uniform.log_uniform_kl, log_uniform.plain_log_uniform_kl, lambda: [real(5, 3), positive(5, 3)]
    ),
    "noisy": Path(arrays.noisy, arrays.plain_noisy, lambda: [real(5, 3), positive(5, 3)], lambda: (real(5, 3),)),
    "leading_block": Path(
        arrays.leading_block, arrays.plain_leading_block, lambda: [real(5, 4, 3)], lambda: ({0: 2, 2: 1},)
    ),
}
each = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def differentiable(times: int) -> pytest.MarkDecorator:
    names = [name for name, path in PATHS.items() if path.times >= times]
    return pytest.mark.parametrize("path", [PATHS[name] for name in names], ids=names)


def as_tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def arguments(path: Path, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], tuple[Any, ...]]:
    torch.manual_seed(0)
    leaves = [x.to(dtype).requires_grad_() for x in path.inputs()]
    return leaves, tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in path.rest())


def weighted(found: Any) -> Tensor:
    """One number, of which each entry of what was found has another share."""
    return sum((x * torch.linspace(1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() for x in as_tuple(found))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(path, dtype):
    leaves, rest = arguments(path, dtype)
    fast, plain = path.fast(*leaves, *rest), path.plain(*leaves, *rest)
    for ours, theirs in zip(as_tuple(fast), as_tuple(plain), strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert ours.requires_grad is theirs.requires_grad is (path.times > 0)
    torch.testing.assert_close(
        as_tuple(fast), as_tuple(plain), rtol=2e-6 if dtype == torch.float32 else 1e-12, atol=1e-6
    )
    if path.times:
        found, expected = (torch.autograd.grad(weighted(x), leaves) for x in (fast, plain))
        torch.testing.assert_close(found, expected, rtol=2e-5 if dtype == torch.float32 else 1e-10, atol=1e-6)


@differentiable(1)
def test_the_fast_path_is_what_is_compared(path):
    leaves, rest = arguments(path)
    for function, is_fast in ((path.fast, True), (path.plain, False)):
        steps = {type(x.grad_fn) for x in as_tuple(function(*leaves, *rest))}
        assert all(issubclass(step, torch.autograd.function.BackwardCFunction) is is_fast for step in steps)


@differentiable(1)
def test_gradients_of_one_input_at_a_time(path):
    leaves, rest = arguments(path)
    for i in range(len(leaves)):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(leaves)]
        found, expected = (torch.autograd.grad(weighted(f(*alone, *rest)), alone[i]) for f in (path.fast, path.plain))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "path", [p for p in PATHS.values() if p.times > 1], ids=[n for n in PATHS if PATHS[n].times > 1]
)
def test_second_derivatives(path):
    leaves, rest = arguments(path)
    directions = [torch.randn_like(x) for x in leaves]

    def second(function):
        first = torch.autograd.grad(weighted(function(*leaves, *rest)) ** 2, leaves, create_graph=True)
        return torch.autograd.grad(first, leaves, directions)

    torch.testing.assert_close(second(path.fast), second(path.plain), rtol=1e-8, atol=1e-8)


@differentiable(1)
def test_under_function_transforms(path):
    """A batch of each input, by vmap of values and of gradients, is as a loop of the plain code."""
    leaves, rest = arguments(path)
    batch = [torch.stack([x.detach(), x.detach() * 0.9 + 0.01]) for x in leaves]
    rows = [[x[i].clone().requires_grad_() for x in batch] for i in range(2)]
    values = as_tuple(vmap(lambda *x: path.fast(*x, *rest))(*batch))
    slopes = vmap(grad(lambda *x: weighted(path.fast(*x, *rest)), tuple(range(len(leaves)))))(*batch)
    for i, row in enumerate(rows):
        expected = as_tuple(path.plain(*row, *rest))
        torch.testing.assert_close(tuple(x[i] for x in values), expected)
        expected = torch.autograd.grad(weighted(expected), row)
        torch.testing.assert_close(tuple(x[i] for x in slopes), expected, rtol=1e-8, atol=1e-8)


def test_hard_masks_under_vmap():
    _, (keep_probs, uniform) = arguments(PATHS["hard_mask"])
    batch = torch.stack([uniform, uniform / 2])
    found = vmap(lambda u: masks.hard_mask(keep_probs, u))(batch)
    assert torch.equal(found, masks.plain_hard_mask(keep_probs, batch))


@differentiable(1)
def test_a_wrong_gradient_is_rejected(path):
    """The power of the above: one that is a thousandth off."""
    leaves, rest = arguments(path)
    found = torch.autograd.grad(1.001 * weighted(path.fast(*leaves, *rest)), leaves)
    expected = torch.autograd.grad(weighted(path.plain(*leaves, *rest)), leaves)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("shapes", [[(3,)], [(3,), (3,)], [(2, 1), (3,)], [(), (4,), (1,)], [(0,), (1,)]])
def test_broadcast_shapes(shapes):
    shapes = [torch.Size(shape) for shape in shapes]
    assert broadcast_shapes(*shapes) == torch.broadcast_shapes(*shapes)


@pytest.mark.parametrize("shapes", [[(3,), (2,)], [(0,), (3,)], [(3,), (0,)], [(2, 1), (3, 4)]])
def test_shapes_that_do_not_broadcast(shapes):
    with pytest.raises(RuntimeError):
        broadcast_shapes(*shapes)


def test_noise_of_no_variance_has_no_slope_beyond_bounds():
    """Where all inputs of a row are zero, variance and all: the value is the mean, and nothing is infinite."""
    mean, variance = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    y = arrays.noisy(mean, variance, torch.tensor([1.0, -1.0, 0.0]))
    y.sum().backward()
    torch.testing.assert_close(y, torch.ones(3))
    assert torch.isfinite(variance.grad).all()


def test_plain_code_takes_over_where_torch_traces_operations_and_nowhere_else():
    seen = []

    def look(x):
        seen.append(only_plain_code())
        return x.sum()

    look(torch.ones(3))
    vmap(look)(torch.ones(2, 3))
    grad(look)(torch.ones(3))
    vmap(grad(look))(torch.ones(2, 3))
    with torch.inference_mode():
        look(torch.ones(3))
    assert seen == [False, True, True, True, False]


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_mixtures_of_extreme_weights_and_values_far_away(value):
    """Weights that underflow, and densities that do, in float32."""
    loc = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float32).requires_grad_()
    logits = torch.tensor([300.0, 0.0, -300.0], dtype=torch.float32).requires_grad_()
    inputs = (
        torch.tensor(value, dtype=torch.float32).requires_grad_(),
        loc,
        (loc.detach().exp()).requires_grad_(),
        logits,
    )
    found, expected = mixtures.mixture_terms(*inputs), mixtures.plain_mixture_terms(*(x.double() for x in inputs))
    torch.testing.assert_close(found, tuple(x.float() for x in expected), rtol=1e-5, atol=1e-5)
    slopes = [torch.autograd.grad(sum(terms), inputs) for terms in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-5)
