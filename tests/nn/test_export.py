"""Narrowed nets where neither Pyro nor this library is: exported programs, ONNX, compiled code."""

import shutil
import subprocess
import sys
import warnings

import depth_nets
import pytest
import torch
import written_nets as written
from torch import nn
from torch._dynamo.exc import UserError
from torch._dynamo.testing import CompileCounterWithBackend

from pyro_vnd.nn import narrow, nest
from pyro_vnd.nn.tracing.tape import tensors_in

NETS = {name: (entry[0], name in depth_nets.NETS) for name, entry in {**written.NETS, **depth_nets.NETS}.items()}
# What fixes the number of rows in the code of the net itself: `len(x)`, and a number of chunks that depends on it.
ROWS_ARE_FIXED = {"sizes_of_layers_asked_for", "pairs_in_one_batch", "picked_tokens"}


def mostly_slow(*quick):
    """Names of nets as people write them; those that are not given are slow tests."""
    assert set(quick) <= set(NETS)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in NETS]


def narrowed_net(name):
    """A net as it is, narrowed to a half in width and depth, and inputs."""
    build, depth = NETS[name]
    plain, x = build()
    inputs = x if isinstance(x, tuple) else (x,)
    return plain.eval(), narrow(nest(plain.eval(), inputs, depth=depth), 0.5, rounding="nearest"), inputs


def more_rows(inputs, num_rows=5):
    return tuple(x.repeat(3, *[1] * (x.dim() - 1))[:num_rows] for x in inputs)


def any_rows(net, inputs):
    """Shapes for `torch.export`: the first axis of each input is free."""
    shapes = tuple({0: torch.export.Dim("rows", min=2)} for _ in inputs)
    return (shapes,) if isinstance(net, written.Net) else shapes


def exported(net, inputs):
    with warnings.catch_warnings():
        # So say torch's own pruned layers and recurrent nets, narrowed or not.
        warnings.filterwarnings("ignore", "The tensor attribute.* assigned during export", UserWarning)
        return torch.export.export(net, inputs, dynamic_shapes=any_rows(net, inputs))


def assert_same(outputs, expected, **tolerance):
    for got, wanted in zip(tensors_in(outputs), tensors_in(expected), strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)


def test_families_are_exported_for_any_number_of_rows(family):
    plain, images = family
    narrowed = narrow(nest(plain, images[:2], num_blocks=4).eval(), 0.5)
    program = exported(narrowed, (images[:2],)).module()
    for rows in (images, images[:3]):
        torch.testing.assert_close(program(rows), narrowed(rows))


@pytest.mark.filterwarnings("ignore:nest. some of the net:UserWarning")
@pytest.mark.parametrize("name", mostly_slow("attention_with_padding", "a_vision_transformer", "shuffled_channels"))
def test_nets_as_written_are_exported_for_any_number_of_rows(name):
    plain, narrowed, inputs = narrowed_net(name)
    if name in ROWS_ARE_FIXED:
        for net in (plain, narrowed):
            with pytest.raises(UserError, match="Constraints violated"):
                exported(net, inputs)
        assert_same(torch.export.export(narrowed, inputs).module()(*inputs), narrowed(*inputs))
        return
    more = more_rows(inputs)
    assert_same(exported(narrowed, inputs).module()(*more), narrowed(*more))


# Deprecations of torch's exporter and of onnxscript are not ours.
quiet_onnx = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def run_onnx(net, inputs, more, path):
    """Export to ONNX for any number of rows, and run on other ones."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(net, inputs, path, dynamo=True, verbose=False, dynamic_shapes=any_rows(net, inputs))
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {each.name: x.numpy() for each, x in zip(session.get_inputs(), more, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, given)]


@pytest.mark.slow
@quiet_onnx
def test_onnx_of_families(family, tmp_path):
    torch.set_default_dtype(torch.float32)
    plain, images = family[0].float(), family[1].float()
    narrowed = narrow(nest(plain, images[:2], num_blocks=4).eval(), 0.5)
    outputs = run_onnx(narrowed, (images[:2],), (images,), tmp_path / "net.onnx")
    assert_same(outputs, narrowed(images).detach(), rtol=1e-4, atol=1e-5)


@quiet_onnx
@pytest.mark.parametrize("name", mostly_slow("an_lstm"))
def test_onnx_of_nets_as_written(name, tmp_path):
    if name == "features_of_some_blocks":
        pytest.skip("returns a number, which ONNX cannot")
    torch.set_default_dtype(torch.float32)
    _, narrowed, inputs = narrowed_net(name)
    more = inputs if name in ROWS_ARE_FIXED else more_rows(inputs)
    outputs = run_onnx(narrowed, inputs, more, tmp_path / "net.onnx")
    with torch.no_grad():
        assert_same(outputs, narrowed(*more), rtol=1e-4, atol=1e-5)


# Programs and states are loaded where the library, Pyro and the class of the net cannot be imported; the module itself,
# whole, where only its class can.
LOAD = """
import sys

hidden = {"pyro", "pyro_vnd", "models", "written_nets"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import torch
program, data, state, *whole = sys.argv[1:]
inputs, expected = torch.load(data, weights_only=True)
nets = [torch.export.load(program).module()]
assert sum(value.numel() for value in torch.load(state, weights_only=True).values()) > 0
if whole:
    hidden.remove("models")
    nets.append(torch.load(whole[0], weights_only=False))
for net in nets:
    torch.testing.assert_close(net(*inputs), expected, rtol=1e-9, atol=1e-9)
assert not any(name.partition(".")[0] in hidden for name in sys.modules)
print("loaded")
"""


def load_elsewhere(net, inputs, folder, whole):
    paths = [folder / name for name in ("net.pt2", "data.pt", "state.pt", "whole.pt")][: 3 + whole]
    torch.export.save(exported(net, inputs), paths[0])
    more = more_rows(inputs)
    torch.save((more, net(*more).detach()), paths[1])
    torch.save(net.state_dict(), paths[2])
    if whole:
        torch.save(net, paths[3])
    command = [sys.executable, "-c", LOAD, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=".")
    assert run.stdout.strip() == "loaded", run.stderr[-2000:]


def test_a_program_is_loaded_without_any_code(tmp_path):
    _, narrowed, inputs = narrowed_net("an_lstm")
    load_elsewhere(narrowed, inputs, tmp_path, whole=False)


@pytest.mark.slow
def test_families_are_loaded_where_the_library_is_not(family, tmp_path):
    plain, images = family
    narrowed = narrow(nest(plain, images[:2], num_blocks=4).eval(), 0.5)
    load_elsewhere(narrowed, (images,), tmp_path, whole=True)


@pytest.fixture
def backend():
    """What compiles without a C++ compiler, and counts graphs."""
    torch.compiler.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_families_are_one_graph_with_the_same_outputs(family, backend):
    plain, images = family
    narrowed = narrow(nest(plain, images[:2], num_blocks=4).eval(), 0.5)
    fast = torch.compile(narrowed, backend=backend, fullgraph=True)
    torch.testing.assert_close(fast(images), narrowed(images))
    assert backend.frame_count == 1
    torch.testing.assert_close(fast(images[:3]), narrowed(images[:3]))


@pytest.mark.filterwarnings("ignore:nest. some of the net:UserWarning")
@pytest.mark.parametrize("name", mostly_slow("attention_with_padding", "halves_as_slices"))
def test_compiled_nets_as_written_have_the_same_outputs(name, backend):
    _, narrowed, inputs = narrowed_net(name)
    fast = torch.compile(narrowed, backend=backend)
    with torch.no_grad():
        assert_same(fast(*inputs), narrowed(*inputs))
    # torch leaves its own recurrent nets as they are, and what calls them.
    assert backend.frame_count > 0 or any(isinstance(part, nn.RNNBase) for part in narrowed.modules())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of what torch.compile imports
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_by_inductor(family):
    plain, images = family
    narrowed = narrow(nest(plain, images[:2], num_blocks=4).eval(), 0.5)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(narrowed)(images), narrowed(images))


@pytest.mark.parametrize("sliced", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_nested_net_that_is_compiled_computes_the_same(sliced, backend, mean_pass):
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(6, 8)
    net = nest(plain, x[:1], num_blocks=4)
    expected = {width: mean_pass(net, x, width, sliced) for width in (0.25, 1.0)}
    net.net.compile(backend=backend)
    for width, outputs in expected.items():
        torch.testing.assert_close(mean_pass(net, x, width, sliced), outputs)
    assert backend.frame_count > 0
