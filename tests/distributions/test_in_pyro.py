"""The laws as sample sites: plates, particles, handlers, prediction and model graphs."""

import pyro
import pytest
import torch
from cases import each
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO


def plate_model(case, **options):
    law = case.build()

    def model():
        with pyro.plate("rows", 6, **options):
            return pyro.sample("z", law)

    return model


@each(samples=True)
def test_site_in_a_plate_with_subsampling(case):
    trace = poutine.trace(plate_model(case, subsample_size=3)).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert type(site["fn"]) is case.cls
    assert site["value"].shape == (3, *case.event_shape())
    # Half the rows stand for all of them.
    torch.testing.assert_close(site["log_prob"], 2 * site["fn"].log_prob(site["value"]))


@each(samples=True)
def test_vectorised_particles(case):
    """Values are (particles, rows, K), and the loss of a subsampled plate is right in expectation."""
    prior, law, seen = case.build(), case.build(), []

    def model():
        with pyro.plate("rows", 6, subsample_size=3):
            seen.append(pyro.sample("z", prior).shape)

    def guide():
        with pyro.plate("rows", 6, subsample_size=3):
            pyro.sample("z", law)

    elbo = Trace_ELBO(num_particles=400, max_plate_nesting=1, vectorize_particles=True)
    loss = elbo.loss(model, guide)
    assert seen == [(400, 3, *case.event_shape())]
    z = law.sample((20_000,))
    log_ratio = law.log_prob(z) - prior.log_prob(z)
    # Each particle sums three independent rows, counted twice; the other error, of 120,000 rows, is small beside it.
    z_score = (loss - 6 * log_ratio.mean()) / (2 * log_ratio.std() * (3 / 400) ** 0.5)
    assert z_score.abs() < 4


@each(samples=True)
def test_sites_of_two_nested_plates(case):
    law = case.build((3,))

    def model():
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            return pyro.sample("z", law)

    assert model().shape == (2, 3, *case.event_shape())


@each()
def test_mask_scale_and_condition(case):
    law = case.build((3,))
    value = case.value(law)
    with poutine.trace() as tracer, poutine.condition(data={"a": value, "b": value, "c": value}):
        pyro.sample("a", law.to_event(1))
        with poutine.scale(scale=3.0):
            pyro.sample("b", law.to_event(1))
        with poutine.mask(mask=torch.tensor(False)):
            pyro.sample("c", law.to_event(1))
    trace = tracer.trace
    trace.compute_log_prob()
    expected = law.log_prob(value).sum()
    factors = [trace.nodes[name]["log_prob_sum"] / expected for name in "abc"]
    torch.testing.assert_close(torch.stack(factors), torch.tensor([1.0, 3.0, 0.0]))


@each(samples=True)
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(case, parallel):
    draws = Predictive(plate_model(case), num_samples=5, parallel=parallel)()["z"]
    assert draws.shape == (5, 6, *case.event_shape())


@each(samples=True)
def test_model_graph(case):
    graph = pyro.render_model(plate_model(case), render_distributions=True)
    assert case.cls.__name__ in graph.source
