"""Autoencoders with an ordered code: short codes give the gist, whole codes lose nothing."""

from pyro_vnd.autoencoders.base import EncoderGuide, OrderedAutoencoder
from pyro_vnd.autoencoders.bodies import Bodies, conv_bodies, linear_bodies, mlp_bodies
from pyro_vnd.autoencoders.codes import Completion, full_width
from pyro_vnd.autoencoders.conditioner import Conditioner
from pyro_vnd.autoencoders.likelihoods import (
    BernoulliLikelihood,
    ContinuousBernoulliLikelihood,
    GaussianLikelihood,
    IsotropicNormal,
    Likelihood,
)
from pyro_vnd.autoencoders.linear import LinearGaussianVAE
from pyro_vnd.autoencoders.vae import ElboTerms, OrderedVAE, PriorLatents
from pyro_vnd.autoencoders.vqvae import OrderedVQVAE
from pyro_vnd.autoencoders.wae import AggregateMMD, InverseMultiquadratic, OrderedWAE

__all__ = [
    "AggregateMMD",
    "BernoulliLikelihood",
    "Bodies",
    "Completion",
    "Conditioner",
    "ContinuousBernoulliLikelihood",
    "ElboTerms",
    "EncoderGuide",
    "GaussianLikelihood",
    "InverseMultiquadratic",
    "IsotropicNormal",
    "Likelihood",
    "LinearGaussianVAE",
    "OrderedAutoencoder",
    "OrderedVAE",
    "OrderedVQVAE",
    "OrderedWAE",
    "PriorLatents",
    "conv_bodies",
    "full_width",
    "linear_bodies",
    "mlp_bodies",
]
