"""The bijection between lengths and masks, and the constraints that say what a mask is."""

import copy
import pickle

import pytest
import torch
from oracles import all_masks
from torch.distributions import biject_to, constraints, transform_to

from pyro_vnd.distributions import (
    NestedNormal,
    RelaxedOrderedMask,
    TailSum,
    binary_ordered_mask,
    nested_vector,
    ordered_mask,
)

each_size = pytest.mark.parametrize("num_units", [2, 3, 4, 5])
each_map = pytest.mark.parametrize("registry", [biject_to, transform_to])


def simplex(*shape):
    return torch.distributions.Dirichlet(torch.ones(shape)).sample()


def test_tail_sum_of_one_hot_lengths_are_the_masks():
    assert torch.equal(TailSum()(torch.eye(6)), all_masks(6))
    assert torch.equal(TailSum().inv(all_masks(6)), torch.eye(6))


@each_size
def test_tail_sum_is_a_bijection(num_units):
    transform, one_hot = TailSum(), simplex(7, num_units)
    mask = transform(one_hot)
    assert transform.domain.check(one_hot).all()
    assert transform.codomain.check(mask).all()
    torch.testing.assert_close(transform.inv(mask), one_hot)
    torch.testing.assert_close(transform(transform.inv(mask.clone())), mask)


@each_size
def test_log_det_is_that_of_the_jacobian(num_units):
    """In the K - 1 free coordinates: all but the last of the simplex, all but the first of the mask."""
    transform, one_hot = TailSum(), simplex(num_units)

    def free(x):
        return transform(torch.cat([x, 1 - x.sum(-1, keepdim=True)]))[1:]

    jacobian = torch.autograd.functional.jacobian(free, one_hot[:-1])
    log_det = transform.log_abs_det_jacobian(one_hot, transform(one_hot))
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet)


def test_log_det_has_the_batch_shape():
    one_hot = simplex(2, 3, 4)
    assert TailSum().log_abs_det_jacobian(one_hot, TailSum()(one_hot)).shape == (2, 3)


def test_tail_sums_are_equal_and_can_be_copied():
    assert TailSum() == TailSum()
    assert TailSum() != torch.distributions.transforms.SoftmaxTransform()
    assert len({TailSum(), TailSum()}) == 1
    for other in (pickle.loads(pickle.dumps(TailSum())), copy.deepcopy(TailSum())):
        assert other == TailSum()


@each_map
@each_size
def test_maps_of_the_relaxed_support(registry, num_units):
    transform = registry(RelaxedOrderedMask(0.5, logits=torch.zeros(num_units)).support)
    free = transform.inverse_shape((num_units,))
    unconstrained = 2 * torch.randn(9, *free)
    mask = transform(unconstrained)
    assert mask.shape == (9, num_units)
    assert ordered_mask.check(mask).all()
    torch.testing.assert_close(transform(transform.inv(mask)), mask)
    if registry is biject_to:
        assert free == (num_units - 1,)
        torch.testing.assert_close(transform.inv(mask), unconstrained)


@each_size
def test_log_det_of_the_bijection(num_units):
    transform = biject_to(ordered_mask)
    x = torch.randn(num_units - 1)
    jacobian = torch.autograd.functional.jacobian(lambda t: transform(t)[1:], x)
    log_det = transform.log_abs_det_jacobian(x, transform(x))
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet)


@each_map
@pytest.mark.parametrize("constraint", [nested_vector, binary_ordered_mask])
def test_no_map_to_laws_with_atoms(registry, constraint):
    with pytest.raises(NotImplementedError, match="AutoNested" if constraint is nested_vector else None):
        registry(constraint)
    assert NestedNormal(torch.zeros(2), torch.ones(2), torch.zeros(2)).support is nested_vector


VECTORS = {
    "full": ([1.0, 1.0, 1.0], True, True),
    "one unit": ([1.0, 0.0, 0.0], True, True),
    "soft": ([1.0, 0.5, 0.2], True, False),
    "soft, rounded": ([1.0, 0.5, 0.5 + 1e-7], True, False),
    "one, rounded": ([1.0 - 1e-7, 0.5, 0.2], True, False),
    "nothing": ([0.0, 0.0, 0.0], False, False),
    "gap": ([1.0, 0.0, 1.0], False, False),
    "increasing": ([1.0, 0.2, 0.3], False, False),
    "negative": ([1.0, 0.5, -0.1], False, False),
    "above one": ([1.1, 1.1, 0.0], False, False),
    "nan": ([1.0, float("nan"), 0.0], False, False),
    "last nan": ([1.0, 0.0, float("nan")], False, False),
}


@pytest.mark.parametrize(("vector", "soft", "hard"), VECTORS.values(), ids=VECTORS)
def test_membership(vector, soft, hard):
    vector = torch.tensor(vector)
    assert ordered_mask.check(vector).item() is soft
    assert binary_ordered_mask.check(vector).item() is hard
    assert nested_vector.check(vector).item() is bool(torch.isfinite(vector).all())


def test_membership_is_told_for_each_vector():
    batch = torch.stack([torch.tensor(vector) for vector, *_ in VECTORS.values()]).reshape(3, 4, 3)
    for constraint, column in ((ordered_mask, 1), (binary_ordered_mask, 2)):
        expected = [row[column] for row in VECTORS.values()]
        assert constraint.check(batch).shape == (3, 4)
        assert constraint.check(batch).reshape(-1).tolist() == expected


def test_constraints_describe_themselves():
    assert [repr(c) for c in (ordered_mask, binary_ordered_mask, nested_vector)] == [
        "ordered_mask",
        "binary_ordered_mask",
        "nested_vector",
    ]
    assert binary_ordered_mask.is_discrete
    assert not ordered_mask.is_discrete
    assert all(isinstance(c, constraints.Constraint) for c in (ordered_mask, nested_vector))
