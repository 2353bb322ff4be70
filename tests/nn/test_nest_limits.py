"""What nest refuses, leaves whole or says, rather than being wrong about it."""

import warnings

import pyro
import pytest
import torch
import written_nets as written
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from written_nets import Net

from pyro_vnd.infer import module_local_params
from pyro_vnd.nn import NestedClassifier, narrow, nest
from pyro_vnd.nn.checking import Misfit, check_and_count
from pyro_vnd.nn.reads import Read


def linears(*sizes):
    return {chr(97 + i): nn.Linear(*size) for i, size in enumerate(sizes)}


def test_strict_lists_all_at_once_and_the_default_warns_once():
    def forward(net, x):
        x = torch.fft.rfft(net.a(x)).real
        return net.d(net.c(net.part(net.b(x)).relu()).relu())

    part = Net(lambda net, x: torch.special.i0e(x))
    plain = Net(forward, **linears((8, 16), (9, 12), (12, 10), (10, 3)), part=part)
    with pytest.raises(ValueError, match="2 parts of the net cannot be followed") as caught:
        nest(plain, torch.randn(4, 8), strict=True)
    lines = str(caught.value).splitlines()[1:]
    assert lines == ["- `fft_rfft` in the forward of the net", "- `special_i0e` in `part`"]
    assert "exclude=['part'] leaves these parts alone, and strict=False" in str(caught.value)
    with pytest.warns(UserWarning, match=r"(?s)34% of the parameters can be narrowed.*`fft_rfft`.*`special_i0e` in"):
        net = nest(plain, torch.randn(4, 8))
    assert list(net.widths) == ["c"]
    assert "`special_i0e` in `part` cannot be followed" in repr(net)


def test_rows_that_are_no_examples_are_left_whole_or_cut_by_batch():
    def forward(net, x):
        places = torch.arange(4.0).double()[:, None]
        return net.d(net.a(x).relu()) + net.c(net.b(places).relu()).mean(0)

    plain, x = Net(forward, **linears((8, 16), (1, 12), (12, 3), (16, 3))), torch.randn(4, 8)
    net = nest(plain, x)
    assert list(net.widths) == ["a"]
    assert 'rows of the input of `c` are not the examples; mask_per="batch" can cut it' in net.whole["b"]
    assert list(nest(plain, x, mask_per="batch").widths) == ["a", "b"]


def test_rows_that_disturb_each_other_are_refused():
    def forward(net, x):
        h = net.b(net.a(x).relu())
        return h @ h.T

    plain, x = Net(forward, **linears((8, 16), (16, 4))), torch.randn(4, 8)
    with pytest.raises(ValueError, match='rows of different widths disturb each other; nest with mask_per="batch"'):
        nest(plain, x)
    assert nest(plain, x, mask_per="batch").widths


def test_a_number_of_examples_that_is_written_down_is_said():
    plain = Net(lambda net, x: net.b(net.a(x).view(2, 16)), **linears((8, 16), (16, 3)))
    with pytest.raises(ValueError, match="the net runs on 2 examples, but not on 3"):
        nest(plain, torch.randn(2, 8))


def test_the_example_is_looked_at():
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="`example_input` has 1 numbers that are NaN"):
        nest(plain, x.index_put((torch.tensor(0),) * 4, torch.tensor(torch.nan).double()))
    with pytest.warns(UserWarning, match="looks like images of bytes"):
        nest(plain, torch.randint(0, 256, x.shape).double())
    with pytest.raises(ValueError, match=r"inputs must be of the type of the net's parameters, torch\.float64; got"):
        nest(plain, torch.randint(0, 256, x.shape, dtype=torch.uint8))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"out": (x,)}, lambda x: written.Output(x, None)])
@pytest.mark.parametrize("training", [False, True])
def test_the_check_finds_what_differs_in_any_output_and_mode(wrap, training):
    def forward(net, x):
        x = net.b(net.a(x).relu())
        return wrap(net.c(x.relu()) if net.training is training else net.d(x))

    plain, x = Net(forward, **linears((8, 16), (16, 12), (12, 3), (12, 3))), torch.randn(2, 8)
    net = nest(plain, x)
    assert check_and_count(net, (x,), trains=True).keys() == net.layers.keys()
    with torch.no_grad():
        net.layers["c"].output_axis.runs = net.layers["a"].output_axis.runs[:0]
    net.layers["c"].input_axis.runs = net.layers["b"].input_axis.runs  # the wrong channels
    with pytest.raises(Misfit):
        check_and_count(net, (x,), trains=True)


def test_the_layer_that_differs_is_named_and_left_alone():
    """A size that is hidden from the trace makes the layer that reads it differ."""
    build, *_ = written.NETS["a_size_that_is_hidden"]
    with pytest.warns(UserWarning, match=r"`b` is the first layer that differs"):
        net = nest(*build())
    assert list(net.widths) == ["c"]
    assert type(net.net.b) is nn.Linear
    with pytest.raises(ValueError, match=r"exclude=\['b'\] leaves these parts alone"):
        nest(*build(), strict=True)


def test_a_net_that_runs_in_evaluation_only_says_so():
    def forward(net, x):
        if net.training:
            raise RuntimeError("targets should not be none when in training mode")
        return net.b(net.a(x).relu())

    plain = Net(forward, **linears((8, 16), (16, 3)))
    with pytest.warns(UserWarning, match="training mode, in which the net does not run on the example"):
        assert nest(plain, torch.randn(2, 8)).widths


def test_statistics_of_the_net_given_stay_what_they_were():
    plain, x = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(2, 8)
    net = nest(plain, x)
    assert plain[1].num_batches_tracked == net.net[1].plain.num_batches_tracked == 0
    assert torch.equal(net.net[1].plain.running_mean, plain[1].running_mean)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_normalised_weights_become_means_and_the_net_given_keeps_its_own(norm):
    plain, x = nn.Sequential(norm(nn.Linear(8, 32)), nn.ReLU(), nn.Linear(32, 3)), torch.randn(4, 8)
    before = plain(x)  # as after any evaluation: the weight is a tensor with a history
    net = nest(plain, x)
    assert list(net.layers["0"].log_scales) == ["bias", "weight"]
    torch.testing.assert_close(narrow(net, 1.0)(x), before)
    with torch.no_grad():
        net.layers["0"].plain.weight.mul_(-3)
    assert not torch.allclose(net.predict(x, width=1.0)[0], before)
    torch.testing.assert_close(plain(x), before)


def test_a_weight_that_is_read_twice_is_drawn_once():
    build, *_ = written.NETS["weights_that_a_function_reads_again"]
    plain, x = build()
    net = nest(plain, x)
    for width in (1.0, 0.5):
        with torch.no_grad(), net.cut(width), net._drawn("posterior", len(x)) as values:
            a, b = (values[f"{name}.weight"] for name in "ab")
            kept_a, kept_b = (torch.arange(size) < width * size for size in (32, 8))
            found = net.net(x)
        hidden = F.linear(x, a, values["a.bias"]).relu() * kept_a
        code = F.linear(hidden, b, values["b.bias"]) * kept_b
        torch.testing.assert_close(found, ((code @ b).relu() * kept_a) @ a)


def test_a_parameter_of_two_modules_has_one_value():
    build, *_ = written.NETS["an_embedding_tied_to_the_output"]
    plain, x = build()
    net = nest(plain, x)
    assert not net.layers["out"].log_scales
    assert net.net.embed.weight is net.layers["out"].plain.weight
    narrowed = narrow(net, 0.5)
    assert narrowed.embed.weight is narrowed.out.weight
    assert narrowed.embed.weight.shape == (50, 8)
    assert narrowed.embed.embedding_dim == 8


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_through_a_checkpoint_are_those_without_it(reentrant):
    def build(keep):
        def forward(net, x):
            h = net.a(x).relu()
            return net.d(net.b(h) if keep else checkpoint(net.b, h, use_reentrant=reentrant))

        inner = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        return Net(forward, a=nn.Linear(8, 32), b=inner, d=nn.Linear(32, 3))

    x, y, gradients = torch.randn(4, 8), torch.tensor([0, 1, 2, 0]), []
    for keep in (True, False):
        torch.manual_seed(1)
        net = nest(build(keep), x, num_blocks=8)
        model = NestedClassifier(net)
        torch.manual_seed(2)
        with module_local_params(model, net.guide):
            pyro.infer.Trace_ELBO()(model, net.guide)(x, y).backward()
        gradients.append({name: parameter.grad for name, parameter in net.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])
    # Outside of a nested net checkpoints are what they were.
    counted = []
    h = torch.ones(2, requires_grad=True)
    checkpoint(lambda h: counted.append(1) or h.exp(), h, use_reentrant=False).sum().backward()
    assert len(counted) == 2


def test_recurrent_nets_are_narrowed_to_those_of_torch():
    build, *_ = written.NETS["a_gru_in_both_directions"]
    narrowed = narrow(nest(*build()), 0.5)
    assert type(narrowed.rnn) is nn.GRU
    assert (narrowed.rnn.input_size, narrowed.rnn.hidden_size, narrowed.rnn.num_layers) == (16, 8, 2)
    build, *_ = written.NETS["a_cell_in_a_loop"]
    narrowed = narrow(nest(*build()), 0.5)
    assert type(narrowed.cell) is nn.LSTMCell
    assert (narrowed.cell.hidden_size, narrowed.hidden) == (8, 8)


def test_wrappers_for_several_devices_are_left_away():
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    net = nest(nn.DataParallel(plain), torch.randn(2, 8))
    assert list(net.layers) == ["0", "2"]


def test_rows_are_asked_for_where_they_are():
    """With another layout than that of the example, a mask by example has nowhere to go, and says so."""
    build, *_ = written.NETS["pairs_in_one_batch"]
    plain, (x, y) = build()
    net = nest(plain, (x, y))
    with pytest.raises(ValueError, match="a layer reads 7 rows where there are masks for 3 examples"):
        net(torch.randn(3, 8), torch.randn(4, 8))


def test_reads_are_named_tuples_of_channels():
    net = nest(*written.NETS["parameters_without_modules"][0]())
    assert all(isinstance(read, Read) for _, _, read in net.reads)
    assert [name for _, name, _ in net.reads] == ["w2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "w1" in repr(net)


def test_layers_whose_outputs_are_not_used_are_left_whole_and_can_be_excluded():
    def forward(net, x):
        h = net.b(net.a(x).relu()).relu()
        net.c(h)
        net.d(h + torch.ones(12))
        return net.e(h)

    plain, x = Net(forward, **linears((8, 16), (16, 12), (12, 10), (12, 10), (12, 3))), torch.randn(4, 8)
    net = nest(plain, x, strict=True)
    assert list(net.widths) == ["a"]  # the constant has a fixed size
    assert net.whole["c"] == net.whole["d"] == "nothing reads it"
    assert nest(plain, x, exclude=["c"], strict=True).whole["b"].endswith("is excluded")


def test_a_square_weight_that_a_function_reads_turned_around_is_no_layer():
    def forward(net, x):
        h = F.linear(net.a(x).relu(), net.b.weight.t()).relu()
        return net.c(h + net.d.bias)

    plain, x = Net(forward, **linears((8, 12), (12, 12), (12, 3), (12, 12))), torch.randn(4, 8)
    net = nest(plain, x, strict=True, width_prior={"a": 0.5})
    units = {name: width.num_units for name, width in net.widths.items()}
    assert units == {"a": 12, "b": 12}
    assert "b" not in net.layers
    weights = narrow(net, {"a": 0.25, "b": 0.5})
    assert weights.b.weight.shape == (3, 6)
    torch.testing.assert_close(weights.b.weight, plain.b.weight[:3, :6])


class Magnified(nn.Module):
    """Norms over a batch whose rows are alike but for rounding: what they return is rounding, magnified."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 3)
        self.first, self.second = nn.LayerNorm(64), nn.BatchNorm1d(64, eps=1e-40)

    def forward(self, x):
        return self.o(self.second(self.b(self.first(self.a(x)))).relu())


def test_a_net_that_magnifies_rounding_can_be_nested():
    net = Magnified()
    x = 1 + 1e-15 * torch.randn(2, 8)
    nested = nest(net, x)
    assert nested.widths.keys() == {"a", "b"}
    with pytest.raises(AssertionError):  # or there is nothing to magnify
        torch.testing.assert_close(net.train()(x), net.train()(x * (1 + 1e-15)))


def test_experts_that_rows_choose_are_cut_with_one_mask_for_all():
    def forward(net, x):
        h = net.e(x)
        weights, chosen = net.gate(h).softmax(-1).topk(2)
        out = torch.zeros_like(h)
        for number, expert in enumerate(net.experts):
            row, place = torch.where(chosen == number)
            out = out.index_add(0, row, weights[row, place, None] * expert(h[row]))
        return net.o(out)

    experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3))
    plain = Net(forward, e=nn.Linear(5, 8), gate=nn.Linear(8, 3), experts=experts, o=nn.Linear(8, 3))
    x = torch.randn(32, 5)
    net = nest(plain, x, mask_per="batch")
    assert net.widths.keys() == {"e", *(f"experts.{number}.0" for number in range(3))}
    narrowed = narrow(net, {"e": 0.5, "experts.0.0": 0.25})
    width = {"e": 0.5, "experts.0.0": 0.25, "experts.1.0": 1.0, "experts.2.0": 1.0}
    with torch.no_grad(), net.cut(width), net._drawn("posterior", 32, weights=False):
        torch.testing.assert_close(net.net(x), narrowed(x))


def test_rows_that_a_mask_picks_are_no_longer_the_examples():
    def forward(net, x):
        return net.c(net.b(net.a(x).relu()[x[:, 0] > 0]).relu())

    plain, x, other = Net(forward, **linears((4, 8), (8, 6), (6, 3))), torch.randn(6, 4), torch.randn(7, 4)
    with pytest.raises(ValueError, match='`a`: rows of the input of `b` are not the examples; mask_per="batch" can'):
        nest(plain, x)
    net = nest(plain, x, mask_per="batch")
    assert {name: width.num_units for name, width in net.widths.items()} == {"a": 8, "b": 6}
    with torch.no_grad(), net.cut(0.5), net._drawn("posterior", 7, weights=False):
        torch.testing.assert_close(net.net(other), narrow(net, 0.5)(other))


def test_half_a_number_of_channels_is_not_this_number():
    """Channels of another layer, of which there happen to be as many, are left out of it: each is held by itself."""

    def forward(net, x):
        h = net.a(x.mean(-1)).relu()
        return net.o(net.b(x).relu()[:, :, : h.shape[1] // 2].mean(-1)) + net.p(h)

    layers = linears((3, 8)) | {"b": nn.Conv1d(3, 8, 1), "o": nn.Linear(8, 3), "p": nn.Linear(8, 3)}
    with pytest.raises(
        ValueError, match=r"- `a`: `getitem` .* has fixed sizes .*\n- `b`: `getitem` .* has fixed sizes"
    ):
        nest(Net(forward, **layers), torch.randn(2, 3, 16))


@pytest.mark.parametrize("hidden", ["nothing", "zeros", "small", "far", "noise"])
def test_what_hides_behind_the_last_layer_is_seen(hidden):
    def forward(net, x):
        h = net.a(x).tanh()
        mask = torch.zeros_like(h)
        mask[:, : mask.size(1) // 2] = 1  # half of all channels is not half of those that are left
        h = net.b(h * mask)
        h = h + 0.001 * torch.randn_like(h) if hidden == "noise" else h
        return net.o(net.c(h.tanh()).tanh())

    plain = Net(forward, **linears((5, 12), (12, 8), (8, 6)), o=nn.Linear(6, 3))
    with torch.no_grad():
        plain.o.weight.mul_({"zeros": 0.0, "small": 1e-4}.get(hidden, 1.0))
        plain.o.bias.fill_(1e3 if hidden == "far" else 0.0)
    with pytest.warns(UserWarning, match="cut net and the same net masked differ"):
        net = nest(plain, torch.randn(2, 5))
    assert list(net.widths) == ["c"]
    assert torch.equal(net.layers["o"].plain.weight, plain.o.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"net": nn.ReLU}, "`net` must be an ordinary module of torch; got the class ReLU"),
        ({"net": torch.relu}, "`net` must be an ordinary module of torch; got builtin_function_or_method"),
        ({"exclude": None}, "`exclude` must be a list of names"),
        ({"exclude": "0"}, "`exclude` must be a list of names"),
        ({"depth": "yes"}, "`depth` must be True or False; got 'yes'"),
        ({"strict": 1}, "`strict` must be True or False; got 1"),
        ({"gated": "x"}, "`gated` must be True or False; got 'x'"),
    ],
)
def test_arguments_of_other_types_are_said(arguments, message):
    given = {"net": nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)), "example_input": torch.zeros(1, 2)}
    with pytest.raises(ValueError, match=f"nest: argument {message}"):
        nest(**given | arguments)


def test_names_of_inputs_that_have_no_place_are_refused():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x, *, scale=None, **more):
            return self.b(self.a(x).relu())

    message = r"`example_input` names \['scale', 'other'\], which ByName takes by name only; give it a forward that"
    with pytest.raises(ValueError, match=f"nest: argument {message}"):
        nest(ByName(), {"x": torch.zeros(1, 2), "scale": torch.zeros(1), "other": torch.zeros(1)})
    assert [*nest(ByName(), {"x": torch.zeros(1, 2)}).widths] == ["a"]


def test_nets_that_are_nested_are_not_nested_again():
    net = nest(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="`net` must be an ordinary module of torch; got NestedNet"):
        nest(net, torch.zeros(1, 2))
