"""What the tests of nested nets share: passes at the posterior mean, and real digits."""

from collections.abc import Iterator
from dataclasses import replace

import pyro
import pytest
import torch
from torch import Tensor

from models import datasets, nets
from pyro_vnd.nn import NestedNet


@pytest.fixture(autouse=True)
def fresh_start() -> Iterator[None]:
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.fixture
def mean_pass():
    """Outputs of a cut net at the mean of its weights."""

    def run(net: NestedNet, x: Tensor, width, sliced: bool = False) -> Tensor:
        cut = net.cut(width, sliced=sliced, rounding="nearest")
        with torch.no_grad(), cut, net._drawn("posterior", len(x), weights=False):
            return net.net(x)

    return run


@pytest.fixture(scope="session")
def digits() -> datasets.Dataset:
    """Digits as vectors, in float64 as everything else here."""
    data = datasets.load("digits", flatten=True)
    parts = {
        name: (part := getattr(data, name))._replace(images=part.images.double())
        for name in ("train", "validation", "test")
    }
    return replace(data, **parts)


SMALL_NETS = {
    "mlp": (lambda: nets.mlp(64, hidden=(16, 8)), (64,)),
    "lenet": (lambda: nets.lenet(channels=(4, 8), hidden=8, image_size=8), (1, 8, 8)),
    "vgg11": (lambda: nets.vgg11(1, width=1 / 16, hidden=(8,), image_size=16), (1, 16, 16)),
    "resnet18": (lambda: nets.resnet18(1, base=8), (1, 16, 16)),
    "resnext29": (lambda: nets.resnext29(1, cardinality=4, base_width=4, depth=11, base=8), (1, 8, 8)),
    "mobilenet": (
        lambda: nets.mobilenet_v2(1, width=0.25, stages=[(1, 16, 1, 1), (6, 24, 2, 2)], last_channels=32),
        (1, 16, 16),
    ),
    "vit": (lambda: nets.vit(1, image_size=8, dim=16, depth=2, heads=4), (1, 8, 8)),
}


@pytest.fixture(params=SMALL_NETS)
def family(request) -> tuple[torch.nn.Module, Tensor]:
    """A small net of each family, with statistics of its own in all norms, and images."""
    build, shape = SMALL_NETS[request.param]
    plain, images = build(), torch.randn(6, *shape)
    for module in plain.modules():
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, name, None)
            if "Norm" in type(module).__name__ and tensor is not None:
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return plain.eval(), images
