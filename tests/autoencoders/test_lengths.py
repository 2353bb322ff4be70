"""Where lengths come from: laws that are given, learned for all images, or learned for each."""

import pytest
import torch
from shaken import shaken

from pyro_vnd.autoencoders import OrderedVAE, full_length, mlp_bodies
from pyro_vnd.autoencoders.lengths import LengthEncoder
from pyro_vnd.distributions import OrderedMask

K, N = 4, 3
PRIOR = OrderedMask(probs=torch.tensor([0.1, 0.2, 0.3, 0.4]))
NO_LENGTH_ONE = OrderedMask(probs=torch.tensor([0.0, 0.3, 0.3, 0.4]))


def law(encoder: LengthEncoder, x: torch.Tensor) -> OrderedMask:
    return OrderedMask(**encoder.values_and_lengths(x)[1])


@pytest.mark.parametrize("source", ["prior", "global", "amortised"])
def test_each_source_starts_at_the_prior_and_differs_in_what_is_learned(source: str):
    x = torch.rand(N, 6)
    encoder = LengthEncoder(mlp_bodies((6,), hidden=(5,)), 7, PRIOR, source).double()
    values, _ = encoder.values_and_lengths(x)
    assert values.shape == (N, 7)
    torch.testing.assert_close(law(encoder, x).probs.expand(N, K), PRIOR.probs.double().expand(N, K))
    moved = law(shaken(encoder, 0.5), x)
    assert moved.batch_shape == ((N,) if source == "amortised" else ())
    assert torch.allclose(moved.probs, PRIOR.probs.double()) == (source == "prior")
    narrow = encoder.narrow(2)
    torch.testing.assert_close(narrow(x), encoder.values_and_lengths(x)[0][:, :2])


def test_full_length_keeps_every_latent():
    assert torch.equal(full_length(K).keep_probs, torch.ones(K))
    assert full_length(K).mean_length == K


BAD_OPTIONS = {
    "posterior": ({"posterior_lengths": "none"}, "`posterior_lengths` must be one of .* got 'none'"),
    "units": ({"prior_lengths": OrderedMask.uniform(K + 1)}, f"`prior_lengths` must be an OrderedMask over {K} units"),
    "batch": ({"prior_lengths": OrderedMask.uniform(K).expand((2,))}, "without batch shape"),
    "kind": ({"prior_lengths": torch.ones(K)}, "`prior_lengths` must be an OrderedMask"),
    "zero global": ({"prior_lengths": NO_LENGTH_ONE, "posterior_lengths": "global"}, "no probability"),
    "zero amortised": ({"prior_lengths": full_length(K)}, "`prior_lengths` gives some lengths no probability"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_are_checked(case: str):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=f"OrderedVAE: argument .*{message}"):
        OrderedVAE((6,), K, **options)
    OrderedVAE((6,), K, prior_lengths=NO_LENGTH_ONE, posterior_lengths="prior")  # nobody learns them: they may be
