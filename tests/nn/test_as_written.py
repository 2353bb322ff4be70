"""Nets as people write them: nested, narrowed and trained without a change."""

import warnings

import pyro
import pytest
import torch
import written_nets as written
from pyro import distributions as dist
from torch import nn

from pyro_vnd.infer import module_local_params
from pyro_vnd.nn import narrow, nest
from pyro_vnd.nn.tracing.tape import tensors_in

WARNED = {"an_unknown_operation", "a_size_that_is_hidden", "weights_with_a_spectral_norm"}


@pytest.fixture(params=written.NETS)
def case(request):
    build, units, share = written.NETS[request.param]
    plain, x = build()
    for part in plain.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            nn.init.normal_(part.running_mean)
    inputs = x if isinstance(x, tuple) else (x,)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore" if request.param in WARNED else "error", "nest: some of the net")
        net = nest(plain.eval(), inputs)
    return plain, net, inputs, units, share


def flat(outputs):
    return torch.cat([x.flatten() for x in tensors_in(outputs)])


def run(net, inputs, width, sliced=False):
    drawn = net._drawn("posterior", len(inputs[0]), weights=False)
    with torch.no_grad(), net.cut(width, sliced=sliced, rounding="nearest"), drawn:
        return net.net(*inputs)


def test_narrowed_is_masked_and_whole_is_plain(case):
    plain, net, inputs, units, share = case
    assert {name: width.num_units for name, width in net.widths.items()} == units
    with torch.no_grad():
        torch.testing.assert_close(flat(run(net, inputs, 1.0)), flat(plain(*inputs)), rtol=1e-9, atol=1e-9)
        for width in (0.25, 0.5):
            narrowed = narrow(net, width, rounding="nearest")
            expected = flat(narrowed(*inputs))
            torch.testing.assert_close(flat(run(net, inputs, width)), expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(flat(run(net, inputs, width, True)), expected, rtol=1e-9, atol=1e-9)
            assert not torch.allclose(expected, flat(plain(*inputs)))
            narrowed.train()(*inputs)
    left = sum(p.numel() for p in narrow(net, 0.25, rounding="nearest").parameters())
    assert left < share * sum(p.numel() for p in plain.parameters())


def test_groups_are_cut_unevenly(case):
    _, net, inputs, _, _ = case
    for first in (0, 1, 2):
        shares = {name: (0.75, 0.25, 0.5)[(place + first) % 3] for place, name in enumerate(net.widths)}
        expected = flat(narrow(net, shares, rounding="nearest")(*inputs))
        torch.testing.assert_close(flat(run(net, inputs, shares)), expected, rtol=1e-9, atol=1e-9)
    for name in net.widths:
        alone = dict.fromkeys(net.widths, 1.0) | {name: 1}
        expected = flat(narrow(net, alone)(*inputs))
        torch.testing.assert_close(flat(run(net, inputs, alone)), expected, rtol=1e-9, atol=1e-9)


def test_rows_have_masks_of_their_own(case):
    _, net, inputs, _, _ = case
    mixed = tensors_in(run(net, inputs, torch.tensor([0.5, 1.0])))
    narrowed, whole = (tensors_in(run(net, inputs, width)) for width in (0.5, 1.0))
    for both, narrow_rows, wide_rows in zip(mixed, narrowed, whole, strict=True):
        torch.testing.assert_close(both[0], narrow_rows[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(both[1], wide_rows[1], rtol=1e-9, atol=1e-9)


def test_a_step_of_training_reaches_all_that_is_used(case):
    _, net, inputs, _, _ = case

    def model(*inputs):
        outputs = flat([x for x in tensors_in(net(*inputs)) if x.is_floating_point()])
        pyro.sample("y", dist.Normal(outputs, 1.0).to_event(1), obs=torch.ones_like(outputs))

    net.train()
    with module_local_params(model, net.guide):
        elbo = pyro.infer.Trace_ELBO()(model, net.guide)
        loss = elbo(*inputs)
        loss.backward()
    assert loss.isfinite()
    means = [layer.plain.weight.grad for layer in net.layers.values() if layer.output_axis.widths]
    assert all(grad is not None and grad.abs().max() > 0 for grad in means)


def test_states_of_narrowed_nets_fit_each_other(case):
    _, net, inputs, _, _ = case
    narrowed = narrow(net, 0.5, rounding="nearest")
    fresh = narrow(net, 0.5, rounding="nearest")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(narrowed.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(flat(fresh(*inputs)), flat(narrowed(*inputs)))
