"""Mistakes in the arguments of `fit`: each is refused, by name, before anything is trained or written."""

import itertools
import re
from functools import partial

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import AutoReparam, LocScaleReparam
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from pyro_vnd.autoencoders import OrderedVAE, OrderedVQVAE, mlp_bodies
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import (
    AutoNested,
    KLWeights,
    MaskSchedule,
    NestedELBO,
    OptimizerSettings,
    Plateau,
    cosine_to_zero,
    fit,
    linear,
)
from pyro_vnd.nn import NestedClassifier, nest

N = 24


def model(x, y=None):
    mask = pyro.sample("mask", OrderedMask.uniform(4))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * mask).sum(-1), 0.5), obs=y)


@pytest.fixture
def rows():
    return torch.randn(N, 4), torch.randn(N)


def refused(message, program, guide, data, **arguments):
    with pytest.raises(ValueError, match=message) as caught:
        fit(program, guide, data, **{"num_epochs": 1, "progress": False} | arguments)
    assert str(caught.value).startswith("fit: ")
    return caught.value


SGD = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
WRONG = [
    ("num_epochs", 2.5, "an integer at least 1; got 2.5"),
    ("num_epochs", "3", "an integer at least 1; got '3'"),
    ("num_epochs", True, "an integer at least 1; got True"),
    ("batch_size", 10.0, "an integer from 1 to 24, the rows of data; got 10.0"),
    ("lr", "0.1", "a finite number > 0; got '0.1'"),
    ("lr", 0, "a finite number > 0; got 0"),
    ("lr", -0.1, "a finite number > 0; got -0.1"),
    ("lr", torch.nan, "a finite number > 0; got nan"),
    ("lr", True, "a finite number > 0; got True"),
    ("weights", 0.5, r"KLWeights\(latents=, local=, lengths=\); got 0.5"),
    ("weights", KLWeights, "got the class KLWeights"),
    ("elbo", NestedELBO, r"NestedELBO\(\), .*; got the class NestedELBO"),
    ("elbo", 3, r"an objective, NestedELBO\(\)"),
    ("elbo", pyro.infer.RenyiELBO(), r"TraceEnum_ELBO\(\); got RenyiELBO, which goes with pyro.infer.SVI"),
    ("elbo", pyro.infer.TraceGraph_ELBO(), "got TraceGraph_ELBO, which goes with pyro.infer.SVI"),
    ("elbo", pyro.infer.JitTrace_ELBO(), "got JitTrace_ELBO, which goes with pyro.infer.SVI"),
    ("elbo", pyro.infer.JitTraceMeanField_ELBO(), "got JitTraceMeanField_ELBO, which goes with"),
    ("elbo", pyro.infer.ReweightedWakeSleep(), "got ReweightedWakeSleep, which goes with"),
    ("schedule", MaskSchedule, r"a MaskSchedule\(\), a PriceSchedule\(\) or None; .*; got the class MaskSchedule"),
    ("schedule", linear(0, 1), r"a PriceSchedule\(\) or None; weights of KLs go to `weights`"),
    ("schedule", "uniform", r"a MaskSchedule\(\), a PriceSchedule\(\) or None"),
    ("callbacks", Plateau(), r"a list of Callback objects; got Plateau\("),
    ("callbacks", [Plateau], "a list of Callback objects; got .<class"),
    ("progress", 1, "True or False; got 1"),
    ("precision", "16", "'32' or 'bf16'; got '16'"),
    ("device", "nowhere", "a device that torch has here; got 'nowhere'"),
    ("plate", 3, "the name of a plate; got 3"),
    ("seed", 1.5, r"an integer from 0 to 2\*\*63 - 1, or None; got 1.5"),
    ("seed", "s", "an integer from 0"),
    ("seed", -1, "an integer from 0"),
    ("seed", 2**63, "an integer from 0"),
    ("seed", 2**64, "an integer from 0"),
    ("seed", True, "an integer from 0"),
    ("resume", "more", "True, False or 'extend'; got 'more'"),
    ("checkpoint", 3, "the path of a file; got 3"),
    ("checkpoint", "", "the path of a file; got ''"),
    ("optimizer", pyro.optim.Adam({"lr": 0.1}), "not one of pyro.optim, which is for pyro.infer.SVI; got <pyro"),
    ("optimizer", pyro.optim.Adam, "not one of pyro.optim"),
    ("optimizer", SGD, "what makes one, not one that is made; got SGD"),
    (
        "optimizer",
        "adam",
        "a class of torch.optim, a function of parameters and `lr`, or OptimizerSettings; got 'adam'",
    ),
    ("optimizer", lambda params, lr: 3, "what makes a torch optimiser .*; got the class int"),
    ("optimizer", lambda params, lr: torch.optim.LBFGS(params, lr=lr), "whose step needs no closure; got the class L"),
    ("lr_schedule", cosine_to_zero, r"such as cosine_to_zero\(\), or None; got <function cosine_to_zero"),
    ("lr_schedule", linear(1, 0), "a function of an optimiser and the number of steps"),
    ("lr_schedule", 0.1, "a function of an optimiser and the number of steps"),
    ("lr_schedule", lr_scheduler.StepLR(SGD, 3), "what makes one, not one that is made; got <torch"),
    ("lr_schedule", lambda o, n: 0.1, "what makes a torch LRSch"),
    ("lr_schedule", lambda o, n: lr_scheduler.ReduceLROnPlateau(o), "needs no value; got the class ReduceLROnPlateau"),
    ("guide", AutoNormal, "a Pyro program that can be called, .*; got the class AutoNormal"),
    ("guide", None, "a Pyro program that can be called, .*; got None"),
]


WRONG_WEIGHTS = [
    ("latents", "1", "a number or a function of t, finite and >= 0; got '1'"),
    ("latents", None, "a number or a function of t, finite and >= 0; got None"),
    ("latents", lambda t: "1", "a number or a function of t, finite and >= 0; got '1' at t = 0"),
    ("local", float, "a number or a function of t, finite and >= 0; got <class 'float'>"),
    ("lengths", MaskSchedule(), "a number or a function of t, finite and >= 0; got MaskSchedule"),
]


@pytest.mark.parametrize(("argument", "value", "message"), WRONG_WEIGHTS)
def test_wrong_weights(argument, value, message, rows):
    refused(
        f"`weights.{argument}` must be {message}",
        model,
        AutoNested(model),
        rows,
        weights=KLWeights(**{argument: value}),
    )


@pytest.mark.parametrize(("argument", "value", "message"), WRONG)
def test_wrong_arguments(argument, value, message, rows):
    guide = value if argument == "guide" else AutoNested(model)
    arguments = {} if argument == "guide" else {argument: value}
    if argument == "lr_schedule":
        arguments = {"optimizer": OptimizerSettings(lr_schedule=value)}
    if argument == "resume":
        arguments["checkpoint"] = "file.pt"
    refused(rf"`{argument}` must be .*{message}|`{argument}` must be {message}", model, guide, rows, **arguments)


def test_lbfgs_needs_a_closure(rows):
    refused("`optimizer` is LBFGS, which needs a closure", model, AutoNested(model), rows, optimizer=torch.optim.LBFGS)


def test_numbers_of_numpy_and_torch_are_numbers(rows):
    how = {
        "num_epochs": np.int64(2),
        "batch_size": torch.tensor(12),
        "lr": np.float32(0.25),
        "optimizer": OptimizerSettings(clip_norm=np.float32(9), accumulate=np.int64(2)),
        "weights": KLWeights(np.float64(0.5), lengths=lambda t: torch.tensor(t + 1)),
        "seed": np.int64(3),
    }
    plain = {"num_epochs": 2, "batch_size": 12, "lr": 0.25, "weights": KLWeights(0.5, lengths=lambda t: t + 1)}
    plain |= {"optimizer": OptimizerSettings(clip_norm=9.0, accumulate=2), "seed": 3}
    found, expected = (fit(model, AutoNested(model), rows, progress=False, **each).elbo for each in (how, plain))
    assert found == expected


def test_what_makes_torch_optimisers_and_schedulers_is_taken(rows):
    for optimizer in (torch.optim.SGD, pyro.optim.clipped_adam.ClippedAdam, lambda p, lr: torch.optim.Adam(p, lr=lr)):
        for schedule in (lr_scheduler.CosineAnnealingLR, lambda o, n: lr_scheduler.StepLR(o, n), cosine_to_zero()):
            how = {"optimizer": OptimizerSettings(optimizer, schedule), "num_epochs": 2, "progress": False}
            assert len(fit(model, AutoNested(model), rows, **how).elbo) == 2


X, Y = torch.randn(N, 4), torch.randn(N)
DATA = {
    "numpy": (
        (X.numpy(), Y),
        r"`data\[0\]` must be a tensor with rows; got ndarray: give tensors, torch.as_tensor\(x\)",
    ),
    "one array": (X.numpy(), r"`data` must be .*; got ndarray: give tensors, torch.as_tensor\(x\)"),
    "DataFrame": (pd.DataFrame(X.numpy()), r"got DataFrame: give tensors, torch.as_tensor\(x.to_numpy\(\)\)"),
    "Series": ((X, pd.Series(Y.numpy())), r"`data\[1\]` .*; got Series: give tensors, .*to_numpy"),
    "TensorDataset": (TensorDataset(X, Y, Y), r"the arguments of `model`, \(x, y=None\); got 3 by place"),
    "DataLoader": (DataLoader(TensorDataset(X, Y, Y)), r"the arguments of `model`, \(x, y=None\); got 3 by place"),
    "names": ({"images": X, "y": Y}, r"the arguments of `model`, \(x, y=None\); got \['images', 'y'\]"),
    "too many": ((X, Y, Y), r"the arguments of `model`, \(x, y=None\); got 3 by place"),
    "lists": ([[1.0], [2.0]], r"`data\[0\]` must be a tensor with rows; got float"),
    "None": (None, "`data` must be a tensor, .*; got NoneType"),
}


@pytest.mark.parametrize(("data", "message"), DATA.values(), ids=DATA)
def test_data_that_are_no_tensors_or_no_arguments(data, message):
    refused(message, model, AutoNested(model), data)


def test_arguments_of_the_guide_are_those_of_the_model(rows):
    class Guide(PyroModule):
        def forward(self, x):
            pass

    refused(r"the arguments of `guide`, \(x\); got 2 by place", model, Guide(), rows)


def test_programs_without_a_signature_that_can_be_read_are_taken(rows):
    class Program:
        __signature__ = "unknown"  # as some wrappers leave it

        def __call__(self, x, y=None):
            return model(x, y)

    how = {"num_epochs": 2, "progress": False}
    found, expected = (fit(program, AutoNested(model), rows, **how).elbo for program in (Program(), model))
    assert found == expected


def test_a_schedule_without_a_signature_is_made_before_it_is_judged(rows):
    settings = OptimizerSettings(lr_schedule=partial(itertools.repeat))  # of which Python knows no signature
    message = "`lr_schedule` must be what makes a torch LRScheduler whose step needs no value; got the class repeat"
    refused(message, model, AutoNested(model), rows, optimizer=settings)


def test_a_plate_without_a_size(rows):
    def without(x, y=None):
        mask = pyro.sample("mask", OrderedMask.uniform(4))
        with pyro.plate("data"):
            pyro.sample("y", dist.Normal((x * mask).sum(-1), 0.5), obs=y)

    refused(r"plate 'data' has no size: write pyro.plate\('data', len\(x\)\)", without, AutoNested(without), rows)


@pytest.mark.parametrize("elbo", [None, pyro.infer.Trace_ELBO()])
def test_data_and_law_that_broadcast_to_a_square(elbo, rows):
    x, y = rows
    latents = None if elbo is None else "mean_field"
    message = r"site 'y' has data of shape \(24, 1\) and a law of shape \(24,\)"
    refused(message, model, AutoNested(model, latents=latents), (x, y[:, None]), elbo=elbo)

    def column(x, y):
        mask = pyro.sample("mask", OrderedMask.uniform(4))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * mask).sum(-1, keepdim=True), 0.5), obs=y)

    message = r"site 'y' has data of shape \(24,\) and a law of shape \(24, 24\)"
    refused(message, column, AutoNested(column, latents=latents), rows, elbo=elbo)


def make_net(dtype=None, outputs=2):
    return nest(
        nn.Sequential(nn.Linear(4, 8, dtype=dtype), nn.ReLU(), nn.Linear(8, outputs, dtype=dtype)), X[:1].to(dtype)
    )


def make_vae(kind=OrderedVAE, **arguments):
    return kind((4,), bodies=mlp_bodies((4,), hidden=(8,)), **arguments).float()


class OwnNet(PyroModule):
    """A model of one's own: nets and autoencoders of the library look at their inputs themselves."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1).float()

    def forward(self, x, y=None):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.net(x)[:, 0] + shift, 0.5), obs=y)


def test_data_of_another_dtype():
    for x, message in (
        (X.double(), "`data.0.` must be of the dtype of the parameters, torch.float32; got torch.float64"),
        ((X * 9).to(torch.uint8), r"torch.float32, images as x.float\(\) / 255; got torch.uint8"),
        ((X * 9).long(), "torch.float32; got torch.int64"),
    ):
        program = OwnNet()
        refused(message, program, AutoNormal(program), (x, Y))


def test_an_error_of_types_that_are_right_stays_what_it_is(rows):
    def broken(x, y):
        if pyro.sample("w", dist.Normal(0.0, 1.0)).requires_grad:  # not where a guide is made
            raise RuntimeError("no such type of file")

    with pytest.raises(RuntimeError, match="no such type of file"):
        fit(broken, AutoNormal(broken), (rows[0], torch.arange(N)), num_epochs=1, progress=False)


def test_neither_model_nor_guide_has_parameters(rows):
    def guide(x, y=None):
        pyro.sample("mask", OrderedMaskStraightThrough(0.2, logits=torch.zeros(4)))

    refused("neither model nor guide has parameters; is the guide an nn.Module", model, guide, rows)


def test_data_of_another_dtype_than_the_latents(rows):
    x, y = rows

    def product(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    message = "`data.0.` must be of the dtype of the parameters, torch.float64; got torch.float32"
    refused(message, product, AutoNormal(product), (x.float(), y))


def test_the_guide_of_another_net_or_autoencoder(rows):
    labels = torch.arange(N) % 2
    first, second = make_net(torch.float64), make_net(torch.float64)
    data = rows[0].double(), labels
    message = "`guide` is the guide of another model: this NetGuide shares no parameters with `model`, NestedClassifier"
    refused(message, NestedClassifier(first), second.guide, data)

    class Wrapped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.guide = net.guide

        def forward(self, x, y=None):
            return self.guide(x)

    refused(message, NestedClassifier(first), Wrapped(second), data)
    fit(NestedClassifier(first), Wrapped(first), data, num_epochs=1, progress=False)
    for kind, size in ((OrderedVAE, {"num_latents": 2}), (OrderedVQVAE, {"num_tokens": 2})):
        one, other = make_vae(kind, **size), make_vae(kind, **size)
        refused("`guide` is the guide of another model", one, other.guide, X.float())
        fit(one, one.guide, X.float(), num_epochs=1, progress=False)


def other_model(x, y=None):
    mask = pyro.sample("m2", OrderedMask.uniform(4))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * mask).sum(-1), 0.5), obs=y)


@pytest.mark.parametrize("elbo", [None, pyro.infer.Trace_ELBO(), pyro.infer.TraceMeanField_ELBO()])
@pytest.mark.filterwarnings("ignore:Found (non-auxiliary )?vars")
def test_the_guide_of_another_function(elbo, rows):
    message = r"site 'm2' of the guide is not in the model, whose latents are \['mask'\]: is it the guide of another"
    refused(message, model, AutoNested(other_model), rows, elbo=elbo)
    x, y = rows
    drawn = AutoNormal(funnel)
    drawn(x)  # made where nothing is observed
    refused(r"site 'y' of the guide is observed in the model", funnel, drawn, (x, y), elbo=elbo)
    pyro.clear_param_store()


def test_an_auxiliary_site_of_the_guide_is_its_own_affair(rows):
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(4))

        def forward(self, x, y=None):
            pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("mask", OrderedMask(logits=self.logits))

    assert len(fit(model, Guide(), rows, elbo=pyro.infer.Trace_ELBO(), num_epochs=2, progress=False).elbo) == 2


class WithParam(PyroModule):
    def forward(self, x, y=None):
        pyro.param("s", torch.tensor(1.0))
        model(x, y)


def with_param(x, y=None):
    pyro.param("s", torch.tensor(1.0))
    model(x, y)


@pytest.mark.parametrize("program", [WithParam(), with_param], ids=["module", "function"])
def test_pyro_param_in_a_model(program, rows):
    message = (
        "parameter 's' belongs to no nn.Module: make model and guide PyroModules, with a PyroParam .* or train with"
    )
    refused(message, program, AutoNested(program), rows)


def funnel(x, y=None):
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(0.0, s))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x[:, 0], 0.5), obs=y)


def test_reparametrised_models(rows):
    for how in (AutoReparam(), {"w": LocScaleReparam()}):
        learned = poutine.reparam(funnel, how)
        message = r"_centered' belongs to no nn.Module: .* must not be learned: AutoReparam\(centered=0.0\)"
        refused(message, learned, AutoNormal(learned), rows)
    for how in (AutoReparam(centered=0.0), {"w": LocScaleReparam(0.0)}):
        fixed = poutine.reparam(funnel, how)
        assert len(fit(fixed, AutoNormal(fixed), rows, num_epochs=2, progress=False).elbo) == 2


def test_a_module_that_is_no_part_of_the_model(rows):
    class Slope(PyroModule):
        def __init__(self):
            super().__init__()
            self.slope = PyroParam(torch.ones(()))

        def forward(self, x):
            return self.slope * x

    slope = Slope()

    def closure(x, y=None):
        return model(slope(x), y)

    message = "calls a PyroModule that is no part of it, .*: make it one, of an nn.Module that holds it"
    refused(message, closure, AutoNested(closure), rows)


def test_a_refused_fit_leaves_all_as_it_was(rows, tmp_path):
    guide = AutoNested(other_model)
    guide(*rows)
    before = {name: p.clone() for name, p in guide.named_parameters()}
    refused("m2", model, guide, rows, elbo=pyro.infer.Trace_ELBO(), checkpoint=tmp_path / "fit.pt")
    assert all(torch.equal(p, before[name]) for name, p in guide.named_parameters())
    assert [*tmp_path.iterdir()] == []
    refused(
        re.escape(f"`checkpoint` is {str(tmp_path)!r}, a folder"), model, AutoNested(model), rows, checkpoint=tmp_path
    )
    pyro.clear_param_store()
