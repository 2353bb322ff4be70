"""`torch.compile` makes one graph of what laws do, with the values and gradients of the plain code.

With checks of our own on or off; torch's laws, which some consist of, compile to one graph without theirs alone.
"""

import subprocess
import sys

import pyro
import pytest
import torch
from cases import CASES, Case, compiles, each
from torch.distributions import kl_divergence

from pyro_vnd._compat import recall
from pyro_vnd.autoencoders.likelihoods import IsotropicNormal
from pyro_vnd.distributions import NestedNormal, OrderedMask, RelaxedOrderedMask
from pyro_vnd.distributions.weights import LogScaleNormal

pytestmark = compiles
WITH_ARGUMENTS = [case for case in CASES if case.units or case.batch]


def compiled(function, **options):
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


def everything(case: Case, value, **options):
    """A function of the arguments of a law that returns all that the law can do."""

    def run(*arguments):
        law = case.of(**dict(zip(case.units | case.batch, arguments, strict=True)), **options)
        found = [law.log_prob(value), law.expand((3, *law.batch_shape)).log_prob(value)]
        if case.samples:
            found.append(law.sample((2,)))
        if case.reparameterised:
            draw = law.rsample((2,))
            found += [draw, law.log_prob(draw)]  # scored by what the draw remembers
        if case.entropy:
            found.append(law.entropy())
        if case.divergence:
            found.append(kl_divergence(law, law.expand(law.batch_shape)))
        if case.moments:
            found += [law.mean, law.variance]
        return found

    return run


def value_and_gradients(function, arguments):
    leaves = [x.clone().requires_grad_() for x in arguments]
    torch.manual_seed(0)
    found = function(*leaves)
    total = sum((x * torch.linspace(1, 2, x.numel()).reshape(x.shape)).sum() for x in found)
    return found, torch.autograd.grad(total, leaves, allow_unused=True)


@each(WITH_ARGUMENTS)
def test_one_graph(case):
    arguments = list(case.arguments(() if case.expanded else (3,)).values())
    options = {} if case.cls in (IsotropicNormal, LogScaleNormal) else {"validate_args": True}
    value = case.value(case.of(**dict(zip(case.units | case.batch, arguments, strict=True)))).clone()
    run = everything(case, value, **options)
    with pyro.validation_enabled(False):
        torch.testing.assert_close(value_and_gradients(compiled(run), arguments), value_and_gradients(run, arguments))


SOME = [case for case in WITH_ARGUMENTS if case.name in ("logistic-logits", "nested-normal-logits", "cut-exact")]


@each(SOME)
def test_one_graph_without_checks_and_for_all_sizes_of_batch(case):
    run = everything(case, torch.ones(4), validate_args=False)
    graph = compiled(run, dynamic=True)
    for size in (3, 5, 8):
        arguments = list(case.arguments((size,)).values())
        with torch.compiler.set_stance("fail_on_recompile" if size > 3 else "default"):
            found = value_and_gradients(graph, arguments)
        torch.testing.assert_close(found, value_and_gradients(run, arguments))


def test_shapes_are_still_checked():
    with pytest.raises(Exception, match=r"argument `value` must have shape \(..., 4\), one entry a unit; got \(3,\)"):
        compiled(lambda logits: OrderedMask(logits=logits).log_prob(torch.ones(3)))(torch.zeros(4))


@pytest.mark.parametrize("family", [NestedNormal, RelaxedOrderedMask])
def test_a_draw_that_leaves_a_compiled_function_remembers_how_it_was_made(family):
    """So that it has the score that it would have without compilation; changed in place, it has forgotten."""
    law = family(0.5, 0.5, torch.zeros(4)) if family is NestedNormal else family(0.5, logits=torch.zeros(4))
    draw = compiled(lambda: law.rsample((5,)))()
    assert recall(draw) is not None
    assert recall(draw.clone()) is None
    torch.testing.assert_close(law.log_prob(draw), law.log_prob(draw.clone()))
    with torch.no_grad():
        draw.mul_(1)
    assert recall(draw) is None


def test_the_first_divergence_of_a_process_compiles():
    """Torch looks for it in a way that cannot be compiled, but once."""
    program = """if True:
        import torch
        from torch.distributions import kl_divergence
        from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough
        def divergences(x):
            q, p = OrderedMaskStraightThrough(0.2, logits=x), NestedNormal(x, 1.0, x)
            return kl_divergence(q, OrderedMask.uniform(4)) + kl_divergence(p, NestedNormal(0.0, 1.0, 0 * x))
        torch.compile(divergences, backend="aot_eager", fullgraph=True)(torch.zeros(4))
        """
    subprocess.run([sys.executable, "-c", program], check=True)
