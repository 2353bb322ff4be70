"""Nested nets in files: whole modules, and states that go into nets nested afresh."""

import io
import pickle
import subprocess
import sys
import types

import depth_nets
import pyro
import pytest
import torch
import written_nets as written
from torch import nn

from models import nets
from pyro_vnd.infer import MaskSchedule, fit
from pyro_vnd.nn import CascadeNet, NestedClassifier, NestedModel, NormalTargets, narrow, nest
from pyro_vnd.nn.tracing.tape import tensors_in


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


def loaded(thing, **options):
    return torch.load(saved(thing), **{"weights_only": False} | options)


def predicted(net, x, width=None, seed=0):
    pyro.set_rng_seed(seed)
    return net.predict(x, width=width, num_samples=2)


def perceptron(outputs=3, hidden=16):
    return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 8), nn.ReLU(), nn.Linear(8, outputs))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.body = nn.Embedding(20, 8), perceptron(outputs=1)

    def forward(self, ids):
        return self.body(self.words(ids).mean(1))


def regression(mask_per):
    """A model with much that a nested net can have: blocks always kept, a prefix, a prior by name, a learned noise."""
    ids = torch.randint(20, (40, 5))
    prior = {"": "normal", "words": 0.5}
    net = nest(Tokens(), ids[:2], num_blocks=4, frozen=2, prior=prior, mask_per=mask_per, prefix="net.")
    return NestedModel(net, NormalTargets(0.5)), (ids, torch.randn(40))


@pytest.mark.parametrize("mask_per", ["example", "batch"])
def test_a_model_that_is_loaded_is_the_one_that_was_saved(mask_per):
    model, data = regression(mask_per)
    how = {"num_epochs": 1, "batch_size": 20, "progress": False, "seed": 3, "schedule": MaskSchedule()}
    fit(model, model.guide, data, **how)
    again = loaded(model)
    assert again.guide is again.net.guide
    assert again.guide.net is again.net
    assert repr(again.net) == repr(model.net)
    for width in (None, 0.5, 1.0):
        assert torch.equal(predicted(again.net, data[0], width), predicted(model.net, data[0], width))
    for each in (model, again):
        fit(each, each.guide, data, **how)
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_guides_cascades_and_nets_that_svi_trained_are_loaded():
    x, y = torch.randn(40, 8), torch.randint(3, (40,))
    net = nest(perceptron(), x[:1], num_blocks=4)
    model = NestedClassifier(net)
    svi = pyro.infer.SVI(model, model.guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.TraceMeanField_ELBO())
    before = predicted(net, x, 0.5)
    svi.step(x, y)
    assert not torch.equal(predicted(net, x, 0.5), before)
    assert torch.equal(predicted(loaded(model).net, x, 0.5), predicted(net, x, 0.5))
    assert torch.equal(predicted(loaded(net.guide).net, x, 0.5), predicted(net, x, 0.5))
    cascade = CascadeNet(net, [0.25, 0.5, 1.0], mean_cost=0.5).fit_thresholds(x)
    again = loaded(cascade)
    assert repr(again) == repr(cascade)
    for got, wanted in zip(again.run(x), cascade.run(x), strict=True):
        assert torch.equal(got, wanted)


ELSEWHERE = """
import sys
import torch

net = torch.load(sys.argv[1], weights_only=False)
x, expected = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad(), net.cut(0.5), net._drawn("posterior", len(x), weights=False):
    torch.testing.assert_close(net.net(x), expected)
print("loaded")
"""


def test_a_nested_net_is_loaded_in_another_process(tmp_path, mean_pass):
    x = torch.randn(5, 64)
    net = nest(nets.mlp(64, hidden=(16, 8)), x[:1], num_blocks=4)
    torch.save(net, tmp_path / "net.pt")
    torch.save((x, mean_pass(net, x, 0.5)), tmp_path / "data.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "net.pt"), str(tmp_path / "data.pt")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=".")
    assert run.stdout.strip() == "loaded", run.stderr[-2000:]


NETS = {**written.NETS, **depth_nets.NETS}
FUNCTIONS: list[types.FunctionType] = []


class Pickler(pickle.Pickler):
    """Pickles local functions of the nets as written; those of anybody else are errors, as they always are."""

    def persistent_id(self, thing):
        if not isinstance(thing, types.FunctionType) or thing.__module__ not in (written.__name__, depth_nets.__name__):
            return None
        FUNCTIONS.append(thing)
        return len(FUNCTIONS) - 1


class Unpickler(pickle.Unpickler):
    def persistent_load(self, place):
        return FUNCTIONS[place]


def flat(outputs):
    return torch.cat([x.flatten() for x in tensors_in(outputs)])


@pytest.mark.filterwarnings("ignore:nest. some of the net:UserWarning")
@pytest.mark.parametrize("name", [name for name in NETS if name != "weights_with_a_spectral_norm"])
def test_nets_as_written_can_be_pickled(name):
    """But for the layer with a spectral norm, which torch saves by its state only."""
    build, *_ = NETS[name]
    plain, x = build()
    inputs = x if isinstance(x, tuple) else (x,)
    net = nest(plain.eval(), inputs, depth=name in depth_nets.NETS)
    small = narrow(net, 0.5, rounding="nearest")
    file = io.BytesIO()
    Pickler(file).dump((net, small))
    file.seek(0)
    again, again_small = Unpickler(file).load()
    with torch.no_grad():
        expected = flat(small(*inputs))
        for each in (again_small, narrow(again, 0.5, rounding="nearest")):
            torch.testing.assert_close(flat(each(*inputs)), expected)


# States: tensors alone, which `torch.load` takes without trusting the file.


def test_a_state_goes_into_the_same_net_nested_afresh(family, mean_pass):
    plain, images = family
    net = nest(plain, images[:2], num_blocks=4, width_init=0.3).eval()
    fresh = nest(plain, images[:2], num_blocks=4).eval()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(1.1)
    state = loaded(net.state_dict(), weights_only=True)
    fresh.load_state_dict(state)
    for width in (0.25, 1.0):
        torch.testing.assert_close(mean_pass(fresh, images, width), mean_pass(net, images, width))
        torch.testing.assert_close(predicted(fresh, images, width), predicted(net, images, width))
    for name, law in net.laws.items():
        assert torch.equal(fresh.laws[name].logits, law.logits)


def test_groups_that_differ_are_named():
    x = torch.zeros(1, 8)
    blocks = {"0": 3, "2": 4}
    state = loaded(NestedClassifier(nest(perceptron(hidden=12), x, num_blocks=blocks)).state_dict(), weights_only=True)
    # Two of four blocks always kept: laws over as many lengths as those of three blocks.
    other = nest(perceptron(hidden=12), x, num_blocks=4, frozen={"0": 2})
    with pytest.raises(RuntimeError, match="that of a net with other groups, so nest the same net") as error:
        NestedClassifier(other).load_state_dict(state)
    assert "- '0': 12 units in 3 blocks, 1 always kept in the state, 12 units in 4 blocks, 2 always" in str(error.value)
    assert "- '2'" not in str(error.value)
    with pytest.raises(RuntimeError, match="'2': 8 units in 4 blocks, 1 always kept in the state, no group in the net"):
        NestedClassifier(nest(perceptron(hidden=12), x, num_blocks={"0": 3}, exclude=["4"])).load_state_dict(state)
    NestedClassifier(nest(perceptron(hidden=12), x, num_blocks=blocks, frozen=1)).load_state_dict(state)


def test_states_that_do_not_say_their_groups_are_taken():
    x = torch.zeros(1, 8)
    net, fresh = (nest(perceptron(), x, num_blocks=4) for _ in range(2))
    fresh.load_state_dict(dict(net.state_dict()))
    assert torch.equal(predicted(fresh, x, 0.5), predicted(net, x, 0.5))


def test_a_single_row_of_the_example_is_saved(tmp_path):
    x = torch.randn(1000, 1000)
    net = nest(nn.Sequential(nn.Linear(1000, 2), nn.ReLU(), nn.Linear(2, 1)), x)
    torch.save(net, tmp_path / "net.pt")
    assert (tmp_path / "net.pt").stat().st_size < 8 * 10_000
    x.zero_()
    assert net.example[0].shape == (1, 1000)
    assert net.example[0].any()
