"""Autoencoders with an ordered code: short codes give the gist, whole codes lose nothing."""

from models.autoencoders.base import EncoderGuide, OrderedAutoencoder
from models.autoencoders.codes import full_width
from models.autoencoders.completion import Completion
from models.autoencoders.isotropic_normal import IsotropicNormal
from models.autoencoders.linear import LinearGaussianVAE
from models.autoencoders.mmd import AggregateMMD, InverseMultiquadratic
from models.autoencoders.nets import Bodies, conv_bodies, linear_bodies, mlp_bodies
from models.autoencoders.pixels import BernoulliPixels, ContinuousBernoulliPixels, GaussianPixels, Pixels
from models.autoencoders.vae import ElboTerms, OrderedVAE, PriorLatents
from models.autoencoders.vqvae import OrderedVQVAE
from models.autoencoders.wae import OrderedWAE

__all__ = [
    "AggregateMMD",
    "BernoulliPixels",
    "Bodies",
    "Completion",
    "ContinuousBernoulliPixels",
    "ElboTerms",
    "EncoderGuide",
    "GaussianPixels",
    "InverseMultiquadratic",
    "IsotropicNormal",
    "LinearGaussianVAE",
    "OrderedAutoencoder",
    "OrderedVAE",
    "OrderedVQVAE",
    "OrderedWAE",
    "Pixels",
    "PriorLatents",
    "conv_bodies",
    "full_width",
    "linear_bodies",
    "mlp_bodies",
]
