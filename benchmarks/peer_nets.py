"""Training steps of Bayesian nets and autoencoders as other libraries have them, each the way that is theirs.

All are made of the same plain net and take the same batches. A library is imported when a step of it is made, so that
those that are not installed are missed only then.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import count
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.by_hand import Step, adam_step
from pyro_vnd.autoencoders import mlp_bodies

__all__ = ["PACKAGES", "bayesian_torch_step", "blitz_step", "pythae_step", "torch_uncertainty_step", "tyxe_step"]

PACKAGES = {  # on the package index, by name here
    "TyXe": "tyxe",
    "bayesian-torch": "bayesian-torch",
    "blitz": "blitz-bayesian-pytorch",
    "torch-uncertainty": "torch_uncertainty",
    "pythae": "pythae",
}
PRIOR_SCALE, RHO = 0.1, -5.0
_NUMBER = count()


def tyxe_step(net: nn.Sequential, example: Tensor, num_data: int) -> Step:
    """Make a step with TyXe: its net in a torch loop, under local reparameterisation; the KL is exact.

    The loop is that of its `PytorchBNN`, since Pyro's optimisers have a torch one for each parameter.
    """
    import pyro.distributions as dist
    import tyxe

    class AutoNormal(tyxe.guides.AutoNormal):  # type: ignore[misc]
        """TyXe's own, but for a function of Pyro 1.8 that Pyro 1.9 has no longer."""

        def get_loc(self, site_name: str) -> Tensor:
            return attrgetter(f"{site_name}.loc")(self)

        def get_scale(self, site_name: str) -> Tensor:
            return attrgetter(f"{site_name}.scale")(self)

    prior, name = tyxe.priors.IIDPrior(dist.Normal(0.0, PRIOR_SCALE)), f"tyxe_{next(_NUMBER)}"  # one in Pyro's store
    bayesian = tyxe.PytorchBNN(net, prior, AutoNormal, name=name)
    local: Callable[[], AbstractContextManager[Any]] = tyxe.poutine.local_reparameterization

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with local():
            return F.cross_entropy(bayesian(x), y) + bayesian.cached_kl_loss / num_data

    return adam_step(list(bayesian.pytorch_parameters(example)), loss)


def bayesian_torch_step(net: nn.Sequential, example: Tensor, num_data: int) -> Step:
    """Make a step with bayesian-torch's reparameterisation layers, which draw weights; the KL is exact.

    The KLs are those that the layers return with their outputs, for which they need not compute deviations again.
    """
    from bayesian_torch.layers import Conv2dReparameterization, LinearReparameterization

    made = {"prior_variance": PRIOR_SCALE, "posterior_rho_init": RHO}
    net = _replaced(
        net,
        lambda layer: LinearReparameterization(layer.in_features, layer.out_features, **made),
        lambda layer: Conv2dReparameterization(
            layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding, **made
        ),
    )
    random = (LinearReparameterization, Conv2dReparameterization)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        kl = torch.zeros(())
        for module in net:
            if isinstance(module, random):
                x, of_layer = module(x)
                kl = kl + of_layer
            else:
                x = module(x)
        return F.cross_entropy(x, y) + kl / num_data

    return adam_step(net.parameters(), loss)


def blitz_step(net: nn.Sequential, example: Tensor, num_data: int) -> Step:
    """Make a step with blitz, which draws weights; the KL is that of the draw, with one Normal as the prior."""
    from blitz.modules import BayesianConv2d, BayesianLinear
    from blitz.utils import variational_estimator

    made = {"prior_dist": torch.distributions.Normal(0.0, PRIOR_SCALE), "posterior_rho_init": RHO}
    bayesian = variational_estimator(type("BlitzNet", (nn.Sequential,), {}))(
        *_replaced(
            net,
            lambda layer: BayesianLinear(layer.in_features, layer.out_features, **made),
            lambda layer: BayesianConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding, **made
            ),
        )
    )

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return bayesian.sample_elbo(x, y, F.cross_entropy, sample_nbr=1, complexity_cost_weight=1 / num_data)

    return adam_step(bayesian.parameters(), loss)


def torch_uncertainty_step(net: nn.Sequential, example: Tensor, num_data: int) -> Step:
    """Make a step with torch-uncertainty, which draws weights; the KL is that of the draw from a mixture prior.

    The package imports Lightning and torchvision when it is imported, which its layers and their loss do not need.
    """
    _without_imports("torch_uncertainty", "layers", "losses", "utils")
    from torch_uncertainty.layers.bayesian import BayesConv2d, BayesLinear
    from torch_uncertainty.losses.bayesian import ELBOLoss

    made = {"prior_sigma_1": PRIOR_SCALE, "sigma_init": RHO}
    net = _replaced(
        net,
        lambda layer: BayesLinear(layer.in_features, layer.out_features, **made),
        lambda layer: BayesConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding, **made
        ),
    )
    return adam_step(net.parameters(), ELBOLoss(net, nn.CrossEntropyLoss(), kl_weight=1 / num_data, num_samples=1))


def pythae_step(image_shape: tuple[int, ...], num_latents: int, lr: float) -> Step:
    """Make a step of pythae's plain VAE with the bodies of ours; the noise of its images is fixed."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    bodies = mlp_bodies(image_shape)

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.heads = bodies.encoder, nn.Linear(bodies.num_features, 2 * num_latents)

        def forward(self, x: Tensor) -> Any:
            loc, log_variance = self.heads(self.body(x)).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.entry, self.body = nn.Linear(num_latents, bodies.num_inputs), bodies.decoder

        def forward(self, code: Tensor) -> Any:
            return ModelOutput(reconstruction=self.body(self.entry(code)))

    vae = VAE(VAEConfig(input_dim=image_shape, latent_dim=num_latents), encoder=Encoder(), decoder=Decoder())
    return adam_step(vae.parameters(), lambda x: vae({"data": x}).loss, lr)


def _replaced(net: Iterable[nn.Module], linear: Callable[[Any], Any], conv: Callable[[Any], Any]) -> nn.Sequential:
    """Return a net with other layers in place of linear ones and convolutions."""
    kinds = {nn.Linear: linear, nn.Conv2d: conv}
    return nn.Sequential(*(kinds.get(type(module), lambda same: same)(module) for module in net))


def _without_imports(package: str, *subpackages: str) -> None:
    """Let modules of a package be imported without what its own `__init__` imports."""
    for name in (package, *(f"{package}.{each}" for each in subpackages)):
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.modules[name] = module = ModuleType(name)
        module.__path__ = list(spec.submodule_search_locations)
