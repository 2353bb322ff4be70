"""The divergence of Normals: value and gradients are those of torch's formula."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.func import grad, jacrev, vmap

from pyro_vnd.distributions import NestedNormal
from pyro_vnd.distributions._fast.normals import normal_kl


def parameters(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    locs, scales = torch.randn(2, *shape, dtype=dtype), torch.rand(2, *shape, dtype=dtype) + 0.1
    return [locs[0], scales[0], locs[1], scales[1]]


def reference(q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
    return kl_divergence(Normal(q_loc, q_scale), Normal(p_loc, p_scale))


@pytest.mark.parametrize("needed", [(0, 1, 2, 3), (0, 1), (3,), (2,), (1,)])
def test_value_and_gradients(needed: tuple[int, ...]):
    found = []
    for divergence in (normal_kl, reference):
        leaves = [x.requires_grad_(i in needed) for i, x in enumerate(parameters(5, 3))]
        kl = divergence(*leaves)
        (kl * torch.arange(15).reshape(5, 3)).sum().backward()
        found.append((kl, [x.grad for x in leaves if x.requires_grad]))
        assert all(x.grad is None for i, x in enumerate(leaves) if i not in needed)
    torch.testing.assert_close(*found)


def test_second_derivatives():
    leaves = [x.requires_grad_() for x in parameters(4)]
    assert torch.autograd.gradcheck(normal_kl, leaves)
    assert torch.autograd.gradgradcheck(normal_kl, leaves)


def test_under_function_transforms():
    leaves = parameters(6)

    def total(loc: Tensor) -> Tensor:
        return normal_kl(loc, *leaves[1:]).sum()

    slopes = torch.stack([grad(total)(row) for row in leaves[0].expand(3, -1)])
    torch.testing.assert_close(vmap(grad(total))(leaves[0].expand(3, -1)), slopes)
    torch.testing.assert_close(jacrev(grad(total))(leaves[0]), torch.diag(leaves[3] ** -2))


def test_far_off_and_narrow_ones_in_float32():
    locs, scales = torch.tensor([0.0, 1e4, -1e4, 3.0]), torch.tensor([1e-6, 1.0, 1e3, 1e-3])
    grid = [x.flatten() for x in torch.meshgrid(locs, scales, locs, scales, indexing="ij")]
    doubles = [x.double().requires_grad_() for x in grid]
    leaves = [x.requires_grad_() for x in grid]
    kl, exact = normal_kl(*leaves), reference(*doubles)
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=1e-5)
    kl.sum().backward()
    exact.sum().backward()
    for leaf, double in zip(leaves, doubles, strict=True):
        torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-4, atol=1e-4)


def test_codes_have_a_second_derivative():
    """That of the latents' means is S_i / sigma_p^2."""
    scale = torch.tensor([0.5, 1.0, 2.0])
    prior = NestedNormal(torch.zeros(3), scale, torch.zeros(3))

    def divergence(loc: Tensor) -> Tensor:
        return kl_divergence(NestedNormal(loc, torch.ones(3), torch.zeros(3), validate_args=False), prior)

    expected = torch.diag(torch.tensor([1, 2 / 3, 1 / 3]) / scale**2)
    torch.testing.assert_close(torch.autograd.functional.hessian(divergence, torch.randn(3)), expected)
