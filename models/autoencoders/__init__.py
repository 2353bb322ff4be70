"""Autoencoders with an ordered code: short codes give the gist, whole codes lose nothing."""

from models.autoencoders.base import EncoderGuide, OrderedAutoencoder
from models.autoencoders.codes import full_width
from models.autoencoders.nets import Bodies, conv_bodies, linear_bodies, mlp_bodies
from models.autoencoders.pixels import BernoulliPixels, ContinuousBernoulliPixels, GaussianPixels, Pixels
from models.autoencoders.vae import ElboTerms, OrderedVAE

__all__ = [
    "BernoulliPixels",
    "Bodies",
    "ContinuousBernoulliPixels",
    "ElboTerms",
    "EncoderGuide",
    "GaussianPixels",
    "OrderedAutoencoder",
    "OrderedVAE",
    "Pixels",
    "conv_bodies",
    "full_width",
    "linear_bodies",
    "mlp_bodies",
]
