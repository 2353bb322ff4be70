"""Models and numbers that the scores of autoencoders do not take are refused by name."""

import pytest
import torch
from odd import NO_NUMBERS

from pyro_vnd.autoencoders import OrderedVAE, fit_prior
from pyro_vnd.diagnostics import evaluate_lengths, evaluate_prefixes

X = torch.rand(6, 8)
VAE = OrderedVAE((8,), 4)
LEARNED = OrderedVAE((8,), 4, prior_latents="autoregressive")
QUIET = {"progress": False}
ODD = [*NO_NUMBERS.values(), 2**70, 2.5, -(2**64), torch.ones(2)]
CALLS = {
    "model": [lambda v: evaluate_prefixes(v, X, [2], **QUIET), lambda v: evaluate_lengths(v, X, [2], **QUIET)],
    "prefixes": [lambda v: evaluate_prefixes(VAE, X, v, **QUIET), lambda v: evaluate_prefixes(VAE, X, [2, v], **QUIET)],
    "mean_lengths": [lambda v: evaluate_lengths(VAE, X, v, **QUIET)],
    "chosen": [lambda v: evaluate_lengths(VAE, X, [2], chosen=v, **QUIET)],
    "laws": [lambda v: evaluate_lengths(VAE, X, [2], laws=v, **QUIET)],
    "seed": [
        lambda v: evaluate_prefixes(VAE, X, [2], seed=v, **QUIET),
        lambda v: evaluate_lengths(VAE, X, [2], seed=v, **QUIET),
    ],
    "num_samples": [lambda v: evaluate_prefixes(VAE, X, [2], num_samples=v, **QUIET)],
    "num_importance": [lambda v: evaluate_prefixes(VAE, X, [2], num_importance=v, **QUIET)],
    "batch_size": [lambda v: fit_prior(LEARNED, X, num_epochs=1, batch_size=v, **QUIET)],
}


@pytest.mark.parametrize("argument", CALLS)
def test_odd_arguments(argument):
    for odd in ODD:
        if argument == "laws" and odd == {}:
            continue
        for call in CALLS[argument]:
            with pytest.raises(ValueError, match=rf"^\w+: argument `{argument}` "):
                call(odd)
