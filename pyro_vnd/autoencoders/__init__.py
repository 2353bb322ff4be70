"""Autoencoders with an ordered code: short codes give the gist, whole codes lose nothing."""

from pyro_vnd.autoencoders.bodies import Bodies, conv_bodies, linear_bodies, mlp_bodies
from pyro_vnd.autoencoders.conditioner import Conditioner
from pyro_vnd.autoencoders.lengths import full_length
from pyro_vnd.autoencoders.likelihoods import (
    BernoulliLikelihood,
    ContinuousBernoulliLikelihood,
    GaussianLikelihood,
    Likelihood,
)
from pyro_vnd.autoencoders.linear import LinearGaussianVAE
from pyro_vnd.autoencoders.prior_fit import fit_prior
from pyro_vnd.autoencoders.vae import OrderedVAE
from pyro_vnd.autoencoders.vqvae import OrderedVQVAE
from pyro_vnd.autoencoders.wae import OrderedWAE

__all__ = [
    "BernoulliLikelihood",
    "Bodies",
    "Conditioner",
    "ContinuousBernoulliLikelihood",
    "GaussianLikelihood",
    "Likelihood",
    "LinearGaussianVAE",
    "OrderedVAE",
    "OrderedVQVAE",
    "OrderedWAE",
    "conv_bodies",
    "fit_prior",
    "full_length",
    "linear_bodies",
    "mlp_bodies",
]
