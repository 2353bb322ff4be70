"""What has no rows, no values or is no data at all is refused by its name, and so are sizes that are none."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vnd.diagnostics import (
    evaluate,
    evaluate_learned,
    evaluate_widths,
    khat_by_row,
    length_posterior,
    loo_widths,
    to_arviz,
)
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, fit
from pyro_vnd.nn import CascadeNet, narrow, nest, recalibrate_batchnorm, widths_for

QUIET = {"progress": False}
FEW = {"num_samples": 2, "num_prior": 0}
LABELS = torch.tensor([0, 1] * 6)


def make_net():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    return nest(plain, torch.randn(2, 3), num_blocks=2)


def model(x, y):
    mask = pyro.sample("mask", OrderedMask.uniform(3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * mask).sum(-1), 1.0), obs=y)


def make_guide():
    guide = AutoNested(model, latents="mean_field")
    guide(torch.randn(12, 3), torch.randn(12))
    return guide


def labelled(x):
    return (x, LABELS[: len(x)]) if isinstance(x, torch.Tensor) and x.dim() else x


def regression(x):
    return (x, torch.zeros(12)[: len(x)]) if isinstance(x, torch.Tensor) and x.dim() else x


BAD = {
    "empty": lambda x: x[:0],
    "none": lambda x: None,
    "word": lambda x: "abc",
    "array": lambda x: x.numpy(),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.to_sparse_csr(),
    "meta": lambda x: x.to("meta"),
    "without rows": lambda x: torch.tensor(1.0),
    "list": lambda x: [[1.0, 2.0, 3.0]],
    "nothing": lambda x: [],
    "none come": lambda x: iter(()),
}
NETS = {
    "net": lambda net, x: net(x),
    "predict": lambda net, x: net.predict(x),
    "draws": lambda net, x: net.draws(2).predict(x),
    "narrow draws": lambda net, x: net.draws(2).narrow(0.5).predict(x),
    "cascade": lambda net, x: CascadeNet(net, [0.5, 1.0], 0.5)(x),
    "recalibrate": lambda net, x: recalibrate_batchnorm(narrow(net, 0.5), x),
    "evaluate": lambda net, x: evaluate(narrow(net, 0.5), labelled(x), **QUIET),
    "widths": lambda net, x: evaluate_widths(net, labelled(x), [0.5], 2, **QUIET),
    "learned": lambda net, x: evaluate_learned(net, labelled(x), 2, **QUIET),
    "loo": lambda net, x: loo_widths(net, labelled(x), [0.5], 30, **QUIET),
    "budget": lambda net, x: widths_for(net, 0.6, data=labelled(x)),
    "to_arviz": lambda net, x: to_arviz(model, make_guide(), regression(x), **FEW),
    "khat": lambda net, x: khat_by_row(model, make_guide(), regression(x), num_samples=30, **QUIET),
    "lengths": lambda net, x: length_posterior(model, make_guide(), regression(x), num_samples=30),
    "fit": lambda net, x: fit(model, make_guide(), regression(x), num_epochs=1, **QUIET),
    "validation": lambda net, x: fit(
        model, make_guide(), regression(torch.randn(12, 3)), num_epochs=1, validation=regression(x), **QUIET
    ),
}
TAKEN = {
    **{(name, bad): "no values are looked at" for name in ("net",) for bad in ("sparse", "compressed", "meta")},
    **{(name, "empty"): "no rows, no outputs" for name in ("draws", "narrow draws", "cascade")},
    **{(name, "without rows"): "torch says" for name in ("draws", "narrow draws")},
    **{(name, "none"): "no data" for name in ("budget", "validation")},
}


@pytest.mark.parametrize("function", NETS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of beta support for sparse tensors
def test_data_that_are_none(function, bad):
    if (function, bad) in TAKEN:
        return
    with pytest.raises(ValueError, match=r"must|no rows|no batches|give"):
        NETS[function](make_net(), BAD[bad](torch.randn(12, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_inputs_of_another_type(dtype):
    x = torch.randn(12, 3).to(dtype)
    for function in ("net", "predict", "draws", "cascade", "recalibrate", "evaluate", "widths", "budget"):
        with pytest.raises(ValueError, match=r"type of the net's parameters, torch.float64; got .*: give x.to"):
            NETS[function](make_net(), x)
    with pytest.raises(ValueError, match=r"`validation\[0\]` must be of the dtype of `data`, torch.float64; got torch"):
        NETS["validation"](make_net(), x)


def test_a_mapping_is_given_by_name():
    x = {"input": torch.randn(12, 3)}
    net = make_net()
    for predict in (net.predict, net.draws(2).predict, net.draws(2).narrow(0.5).predict):
        with pytest.raises(ValueError, match=r"must be tensors .* by name, predict\(\*\*x\); got dict"):
            predict(x)
        assert predict(**x).shape[1:] == (12, 2)


SIZES = {
    "evaluate": lambda net, x, n: evaluate(narrow(net, 0.5), labelled(x), batch_size=n, **QUIET),
    "widths": lambda net, x, n: evaluate_widths(net, labelled(x), [0.5], 2, batch_size=n, **QUIET),
    "learned": lambda net, x, n: evaluate_learned(net, labelled(x), 2, batch_size=n, **QUIET),
    "loo": lambda net, x, n: loo_widths(net, labelled(x), [0.5], 30, batch_size=n, **QUIET),
    "recalibrate": lambda net, x, n: recalibrate_batchnorm(narrow(net, 0.5), x, batch_size=n),
    "narrow": lambda net, x, n: net.draws(2).narrow(0.5, recalibrate=x, batch_size=n),
    "budget": lambda net, x, n: widths_for(net, 0.6, data=labelled(x), batch_size=n),
    "to_arviz": lambda net, x, n: to_arviz(model, make_guide(), regression(x), path="draws.nc", batch_size=n, **FEW),
}
DRAWS = {
    "widths": lambda net, x, n: evaluate_widths(net, labelled(x), [0.5], n, **QUIET),
    "learned": lambda net, x, n: evaluate_learned(net, labelled(x), n, **QUIET),
    "loo": lambda net, x, n: loo_widths(net, labelled(x), [0.5], n, **QUIET),
    "predict": lambda net, x, n: net.predict(x, num_samples=n),
    "draws": lambda net, x, n: net.draws(n),
    "to_arviz": lambda net, x, n: to_arviz(model, make_guide(), regression(x), num_samples=n, num_prior=0),
    "khat": lambda net, x, n: khat_by_row(model, make_guide(), regression(x), num_samples=n),
}


@pytest.mark.parametrize("size", [0, -1, 2.5, "a", True])
def test_sizes_that_are_none(size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net, x = make_net(), torch.randn(12, 3)
    for functions, argument in ((SIZES, "batch_size"), (DRAWS, "num_samples")):
        for function in functions.values():
            with pytest.raises(ValueError, match=f"`{argument}` must be"):
                function(net, x, size)
