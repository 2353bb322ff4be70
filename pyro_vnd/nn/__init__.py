"""Nets whose hidden layers can be cut to any width."""

from pyro_vnd.nn.budgets import widths_for
from pyro_vnd.nn.cascade import CascadeNet
from pyro_vnd.nn.dense_likelihoods import PixelLabels, TokenLabels
from pyro_vnd.nn.draws import NetDraws
from pyro_vnd.nn.layers import NestedLayer
from pyro_vnd.nn.likelihoods import BernoulliLabels, CategoricalLabels, NormalTargets, OrdinalLabels, PoissonCounts
from pyro_vnd.nn.model import NestedClassifier, NestedModel
from pyro_vnd.nn.narrow import narrow, recalibrate_batchnorm
from pyro_vnd.nn.narrow_draws import NarrowDraws
from pyro_vnd.nn.nest import nest
from pyro_vnd.nn.net import NestedNet
from pyro_vnd.nn.net_likelihood import NetLikelihood
from pyro_vnd.nn.norms import NestedNorm
from pyro_vnd.nn.values import ValueHead
from pyro_vnd.nn.width import Width

__all__ = [
    "BernoulliLabels",
    "CascadeNet",
    "CategoricalLabels",
    "NarrowDraws",
    "NestedClassifier",
    "NestedLayer",
    "NestedModel",
    "NestedNet",
    "NestedNorm",
    "NetDraws",
    "NetLikelihood",
    "NormalTargets",
    "OrdinalLabels",
    "PixelLabels",
    "PoissonCounts",
    "TokenLabels",
    "ValueHead",
    "Width",
    "narrow",
    "nest",
    "recalibrate_batchnorm",
    "widths_for",
]
