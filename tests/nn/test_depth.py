"""Depth: residual blocks that are dropped, the last ones of a stage first."""

import copy
import itertools
import math
import pickle

import depth_nets
import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn
from torch.distributions import Normal, kl_divergence
from written_nets import FusedAttention, Net

from pyro_vnd.diagnostics import evaluate_widths, net_cost
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import KLWeights, MaskSchedule, NestedELBO, fit, module_local_params
from pyro_vnd.nn import CascadeNet, NestedClassifier, narrow, nest, widths_for
from pyro_vnd.nn.table import multiply_adds, num_parameters
from pyro_vnd.nn.tracing.tape import tensors_in


@pytest.fixture(params=depth_nets.NETS)
def case(request):
    build, stages, gone = depth_nets.NETS[request.param]
    plain, x = build()
    for part in plain.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            nn.init.normal_(part.running_mean)
    inputs = x if isinstance(x, tuple) else (x,)
    net = nest(plain.eval(), inputs, num_blocks=4, depth=True).eval()
    return plain, net, inputs, stages, gone


def flat(outputs):
    return torch.cat([x.flatten() for x in tensors_in(outputs)])


def run(net, inputs, width, sliced=False):
    drawn = net._drawn("posterior", len(inputs[0]), weights=False)
    with torch.no_grad(), net.cut(width, sliced=sliced, rounding="nearest"), drawn:
        return net.net(*inputs)


def shortened(plain, net, inputs, kept):
    """Outputs of the plain net whose dropped blocks are kept from doing anything, by hooks."""

    def first(module, args, kwargs, out):
        given = args[0] if args else kwargs["hidden"]
        return (before[module], *out[1:]) if isinstance(out, tuple) else before[module].reshape(given.shape)

    before, handles = {}, []
    for block in net.blocks:
        if block.place >= kept.get(block.width.name, 99):
            module = plain.get_submodule(block.path)

            def note(module, args, kwargs):
                before[module] = (args[0] if args else kwargs["hidden"]).clone()

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
            handles.append(module.register_forward_hook(first, with_kwargs=True))
    with torch.no_grad():
        out = plain(*(x.clone() for x in inputs))
    for handle in handles:
        handle.remove()
    return out


def assert_same(one, other):
    torch.testing.assert_close(flat(one), flat(other), rtol=1e-9, atol=1e-9)


def test_a_dropped_block_hands_on_its_input(case):
    plain, net, inputs, stages, gone = case
    found = {name: width.num_units for name, width in net.widths.items() if name not in nest_names(plain, inputs)}
    assert found == stages
    assert {block.can_go for block in net.blocks if block.place} == {gone}
    assert_same(run(net, inputs, 1.0), plain(*inputs))
    for name, size in stages.items():
        for kept in range(1, size):
            expected = shortened(plain, net, inputs, {name: kept})
            assert not torch.allclose(flat(expected), flat(plain(*inputs)))
            widths = {name: kept}
            assert_same(narrow(net, widths)(*inputs), expected)
            whole = dict.fromkeys(net.widths, 1.0) | widths
            for sliced in (False, True):
                assert_same(run(net, inputs, whole, sliced), expected)


def nest_names(plain, inputs):
    return nest(plain, inputs).widths


def test_depth_and_width_are_cut_together(case):
    _, net, inputs, _, _ = case
    for width in (0.25, 0.5):
        narrowed = narrow(net, width, rounding="nearest")
        for sliced in (False, True):
            assert_same(run(net, inputs, width, sliced), narrowed(*inputs))
        assert set(narrowed.narrowed_to) == set(net.widths)
        narrowed.train()(*inputs)


def test_rows_have_depths_of_their_own(case):
    _, net, inputs, _, _ = case
    mixed = tensors_in(run(net, inputs, torch.tensor([0.5, 1.0])))
    half, whole = (tensors_in(run(net, inputs, width)) for width in (0.5, 1.0))
    for both, short_rows, long_rows in zip(mixed, half, whole, strict=True):
        torch.testing.assert_close(both[0], short_rows[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(both[1], long_rows[1], rtol=1e-9, atol=1e-9)


def test_blocks_that_are_dropped_are_not_run(case):
    _, net, inputs, stages, _ = case
    ran = []
    for name, layer in net.layers.items():
        layer.register_forward_hook(lambda *_, name=name: ran.append(name))
    run(net, inputs, dict.fromkeys(net.widths, 1.0) | dict.fromkeys(stages, 1), sliced=True)
    dropped = [f"{block.path}." for block in net.blocks if block.place > 0]
    assert ran
    assert not [name for name in ran if any(name.startswith(path) for path in dropped)]


def test_costs_are_those_of_the_narrowed_net(case):
    plain, net, inputs, _, _ = case
    has_attention = any(isinstance(part, FusedAttention | nn.TransformerEncoder) for part in plain.modules())
    for width in (0.25, 0.5, 1.0):
        narrowed = narrow(net, width, rounding="nearest")
        kept = {name: each.kept_units(width, "nearest") for name, each in net.widths.items()}
        assert num_parameters(net, kept) == sum(parameter.numel() for parameter in narrowed.parameters())
        if not has_attention:  # which multiplies without a layer
            assert multiply_adds(net, kept) == net_cost(narrowed, *inputs)["multiply_adds"]


def assert_plain(net):
    for module in net.modules():
        for kind in type(module).__mro__:
            assert not kind.__module__.startswith("pyro"), kind
        for value in vars(module).values():
            assert not type(value).__module__.startswith("pyro"), value


def test_narrowed_nets_are_plain_and_their_states_fit(case):
    _, net, inputs, _, _ = case
    narrowed, fresh = (narrow(net, 0.5, rounding="nearest") for _ in range(2))
    assert_plain(narrowed)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(narrowed.state_dict())
    assert_same(fresh(*inputs), narrowed(*inputs))


@pytest.mark.parametrize(
    "name", ["a_residual_net", "blocks_that_return_tuples_called_by_place", "blocks_called_by_place"]
)
def test_narrowed_nets_are_saved_and_exported(name):
    plain, x = depth_nets.NETS[name][0]()
    narrowed = narrow(nest(plain.eval(), x, num_blocks=4, depth=True), 0.5, rounding="nearest").eval()
    batch = torch.export.Dim("batch", min=2)
    shapes = ({0: batch},) if isinstance(narrowed, nn.Sequential) else (({0: batch},),)
    exported = torch.export.export(narrowed, (x,), dynamic_shapes=shapes).module()
    more = torch.cat([x, x, x])
    assert_same(exported(more), narrowed(more))


def test_what_stands_in_for_a_block_is_saved():
    plain, x = depth_nets.NETS["blocks_that_return_tuples_called_by_place"][0]()
    stand_in = narrow(nest(plain, x, depth=True), {"layers.depth": 1}).layers[3]
    again, hidden, bias = pickle.loads(pickle.dumps(stand_in)), torch.randn(2, 6, 12), torch.randn(12)
    for module in (stand_in, again):
        assert module(hidden, None, bias=bias, other=3)[0] is hidden
        assert module(hidden=hidden, mask=2.0, bias=bias)[1:] == (None, bias)
        assert module.kind == "full"
    plain, x = depth_nets.NETS["blocks_called_by_place"][0]()
    assert type(narrow(nest(plain, x, depth=True), {"layers.depth": 1}).layers[2]) is nn.Identity


def test_blocks_whose_rows_are_no_examples_have_one_mask_for_all():
    def forward(net, x):
        x = net.before(x)[torch.arange(x.shape[0]).flip(0)]
        for layer in net.layers:
            x = layer(x)
        return net.after(x.mean(1))

    plain, x = depth_nets.tokens(*(depth_nets.block() for _ in range(3)), loop=forward)
    plain.before = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12))
    with pytest.raises(ValueError, match=r'`layers\.0` cannot be dropped: rows .* mask_per="batch" can drop it'):
        nest(plain.eval(), x, depth=True)
    net = nest(plain, x, depth=True, mask_per="batch")
    assert_same(
        narrow(net, {"layers.depth": 2})(x), run(net, (x,), dict.fromkeys(net.widths, 1.0) | {"layers.depth": 2})
    )


@pytest.mark.parametrize("name", depth_nets.DECOYS)
def test_what_is_no_residual_block_is_left_alone(name):
    build, why = depth_nets.DECOYS[name]
    plain, x = build()
    with pytest.raises(ValueError, match=f"(?s)`depth` needs residual blocks.*{why}") as error:
        nest(plain, x, depth=True)
    assert ("cannot be dropped" in str(error.value)) is bool(why)
    nest(plain, x)  # its widths are as ever


def small(mask_per="batch", **options):
    """A net of three residual blocks of four channels, whose hidden units can be cut, too."""

    def block():
        return Net(lambda net, x: x + net.two(torch.tanh(net.one(x))), one=nn.Linear(4, 3), two=nn.Linear(3, 4))

    plain = nn.Sequential(nn.Linear(2, 4), nn.Sequential(block(), block(), block()), nn.Linear(4, 1))
    net = nest(plain, torch.zeros(1, 2), depth=True, mask_per=mask_per, init_scale=0.3, **options)
    for width in net.widths.values():
        nn.init.normal_(width.logits)
    return net


def weight_kls(net):
    """KL of the weights of each layer if all of them count, entry by entry."""
    return {
        f"{name}.{key}": kl_divergence(layer.law(key, "posterior").base, layer.prior_of(key)).detach()
        for name, layer in net.layers.items()
        for key in ("weight", "bias")
    }


def lengths_of(net):
    """Yield each combination of lengths, and its probability under the learned laws."""
    laws = {name: width.law.probs for name, width in net.widths.items()}
    for lengths in itertools.product(*(range(1, len(probs) + 1) for probs in laws.values())):
        probability = math.prod(probs[length - 1].item() for probs, length in zip(laws.values(), lengths, strict=True))
        yield dict(zip(laws, lengths, strict=True)), probability


def model_of(net):
    def model(x, y):
        rows = pyro.plate("data", len(x), dim=-1)
        mean = net(x, plate=rows).squeeze(-1)
        with rows:
            pyro.sample("y", dist.Normal(mean, 0.7), obs=y)

    return model


def test_weights_count_as_often_as_their_block_and_their_units_are_kept():
    net, x = small(), torch.randn(5, 2)
    elbo = NestedELBO()
    elbo.loss(model_of(net), net.guide, x, torch.randn(5))
    entries, expected = weight_kls(net), dict.fromkeys(weight_kls(net), 0.0)
    for lengths, probability in lengths_of(net):
        for site, costs in entries.items():
            name, _, key = site.rpartition(".")
            layer = net.layers[name]
            if name.startswith("1.") and int(name[2]) >= lengths["1.depth"]:
                continue
            sizes = [
                next((lengths[width.name] for width in axis.widths), axis.size)
                for axis in (layer.output_axis, layer.input_axis)
            ]
            kept = costs[: sizes[0]] if key == "bias" else costs[: sizes[0], : sizes[1]]
            expected[site] += probability * kept.sum().item()
    assert {site: elbo.kl[site].item() for site in expected} == pytest.approx(expected, rel=1e-9)
    whole = {site: costs.sum().item() for site, costs in entries.items()}
    assert elbo.kl["1.2.one.bias"] < 0.9 * whole["1.2.one.bias"] * net.widths["1.2.one"].law.keep_probs[0]


def test_by_default_all_weights_count_under_masks_by_example():
    net, x = small("example"), torch.randn(5, 2)
    elbo = NestedELBO()
    elbo.loss(model_of(net), net.guide, x, torch.randn(5))
    for site, costs in weight_kls(net).items():
        assert elbo.kl[site].item() == pytest.approx(costs.sum().item())


@pytest.mark.parametrize("sliced", [False, True])
def test_weights_of_dropped_blocks_cost_nothing(sliced):
    net, x = small(), torch.randn(5, 2)
    elbo = NestedELBO()
    with net.cut(dict.fromkeys(net.widths, 1.0) | {"1.depth": 2}, sliced=sliced):
        elbo.loss(model_of(net), net.guide, x, torch.randn(5))
        draws = net.guide(x)
    for site, costs in weight_kls(net).items():
        expected = 0.0 if site.startswith("1.2.") else costs.sum().item()
        assert elbo.kl.get(site, torch.tensor(0.0)).item() == pytest.approx(expected)
        assert (site in draws) is not (sliced and site.startswith("1.2."))
    assert "1.depth.mask" not in elbo.kl


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.one = nn.Parameter(torch.randn(4)), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.scale * torch.tanh(self.one(x))


def test_parameters_in_a_block_count_as_often_as_it_and_their_units_are_kept():
    plain = nn.Sequential(nn.Linear(2, 4), nn.Sequential(*(Scaled() for _ in range(3))), nn.Linear(4, 1))
    sites = [f"1.{number}.scale" for number in range(3)]
    net = nest(plain, torch.zeros(1, 2), depth=True, mask_per="batch", prior={"": None, **dict.fromkeys(sites, 0.5)})
    for width in net.widths.values():
        nn.init.normal_(width.logits)
    elbo, x = NestedELBO(), torch.randn(5, 2)
    elbo.loss(model_of(net), net.guide, x, torch.randn(5))
    expected = dict.fromkeys(sites, 0.0)
    for lengths, probability in lengths_of(net):
        for site in sites[: lengths["1.depth"]]:
            law = Normal(plain.get_parameter(site), 0.05)
            costs = kl_divergence(law, Normal(0.0, 0.5))[: lengths["0"]]
            expected[site] += probability * costs.sum().item()
    assert {site: elbo.kl[site].item() for site in sites} == pytest.approx(expected, rel=1e-6)
    with net.cut(dict.fromkeys(net.widths, 1.0) | {"1.depth": 1}, sliced=True):
        assert {*net.guide(x)} & {*sites} == {sites[0]}
    left = dict(narrow(net, {"1.depth": 1}, net.guide(x)).named_parameters())
    assert [name for name in left if name.endswith("scale")] == sites[:1]


def exact_gradient(net, logits, x, y):
    """Gradient of the mean over depths of the squared error at the mean of the weights, with respect to the logits."""
    whole, logits = dict.fromkeys(net.widths, 1.0), logits.detach().clone().requires_grad_()
    losses = [(run(net, (x,), whole | {"1.depth": depth}) - y).square().mean() for depth in (1, 2, 3)]
    probs = OrderedMask(logits=logits).probs
    return torch.autograd.grad(sum(p * loss for p, loss in zip(probs, losses, strict=True)), logits)[0]


@pytest.mark.parametrize("mask_per", ["example", "batch"])
def test_the_gradient_of_the_law_of_depth_is_that_by_enumeration(mask_per):
    """The mean of 2,000 straight-through gradients, within four standard errors; another law's is beyond eight.

    The straight-through gradient is biased where the loss is not quadratic in the masks, but by less than that here.
    """
    net, count = small(mask_per), 2000
    x, y, law = torch.randn(6, 2), 2 * torch.randn(6, 1), net.widths["1.depth"]
    others = {name: 1.0 for name in net.widths if name != "1.depth"}
    found = []
    for _ in range(count):
        with net.cut(others), net._drawn("posterior", len(x), weights=False):
            found += torch.autograd.grad((net.net(x) - y).square().mean(), law.logits)
    gradients = torch.stack(found)
    error = gradients.std(0) / math.sqrt(count)
    exact = exact_gradient(net, law.logits, x, y)
    assert ((gradients.mean(0) - exact) / error).abs().max() < 4
    assert torch.cosine_similarity(gradients.mean(0), exact, 0) > 0.99
    wrong = exact_gradient(net, law.law.probs, x, y)  # probabilities taken for logits
    assert ((gradients.mean(0) - wrong) / error).abs().max() > 8


def test_a_step_of_training_reaches_the_law_of_depth_and_all_that_is_used(case):
    _, net, inputs, stages, _ = case

    def model(*inputs):
        outputs = flat([x for x in tensors_in(net(*inputs)) if x.is_floating_point()])
        pyro.sample("y", dist.Normal(outputs, 1.0).to_event(1), obs=torch.ones_like(outputs))

    net.train()
    with module_local_params(model, net.guide):
        elbo = pyro.infer.Trace_ELBO(num_particles=5)(model, net.guide)
        loss = elbo(*inputs)
        loss.backward()
    assert loss.isfinite()
    for name in stages:
        assert net.widths[name].logits.grad.abs().max() > 0
    means = [layer.plain.weight.grad for layer in net.layers.values() if layer.output_axis.widths]
    assert all(grad is not None and grad.abs().max() > 0 for grad in means)


def residual_perceptron(depth):
    def block():
        layers = nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        return Net(lambda net, x: x + net.part(x), part=nn.Sequential(*layers))

    blocks = nn.Sequential(*(block() for _ in range(depth)))
    return nn.Sequential(nn.Linear(64, 16), blocks, nn.LayerNorm(16), nn.Linear(16, 10))


def test_every_depth_of_a_trained_net_is_of_use(digits):
    x, y = digits.train.images[:600].double(), digits.train.labels[:600]
    net = nest(residual_perceptron(3), x[:1], num_blocks=4, depth=True)
    fit(
        NestedClassifier(net),
        net.guide,
        (x, y),
        num_epochs=12,
        batch_size=100,
        lr=0.02,
        weights=KLWeights(latents=0.02),
        schedule=MaskSchedule(),
        elbo=NestedELBO(local_reparam=True),
        progress=False,
    )
    held_out = digits.validation.images.double(), digits.validation.labels
    whole = dict.fromkeys(net.widths, 1.0)
    scores = evaluate_widths(
        net, held_out, [whole | {"1.depth": depth} for depth in (1, 2, 3)], num_samples=None, progress=False
    )
    assert (scores["accuracy"] > 0.8).all()
    mixed = evaluate_widths(net, held_out, [0.5, 1.0], num_samples=None, rounding="nearest", progress=False)
    assert (mixed["accuracy"] > 0.8).all()
    costs = scores["multiply_adds"].values.ravel()
    block = 16 * 32 * 2
    assert (costs[1:] - costs[:-1] == block).all()


def test_depth_is_a_width_like_any_other():
    plain, x = depth_nets.NETS["blocks_with_a_norm_before"][0]()
    net = nest(plain, x, depth=True, num_blocks={"layers.depth": 2}, frozen={"layers.depth": 1})
    assert net.widths["layers.depth"].sizes == (2, 2)
    assert narrow(net, {"layers.depth": 0.5}).layers[1].fc1.out_features == 24
    assert len(narrow(net, {"layers.depth": 1}).layers) == 2
    assert len(narrow(net, {"before": 1}).layers) == 4  # a mapping leaves the others whole
    with pytest.raises(ValueError, match=r"'layers\.depth' can keep"):
        narrow(net, 0.25)
    row = next(line for line in repr(net).splitlines() if line.startswith("  layers.depth"))
    assert row.split()[:6] == ["layers.depth", "4", "2", "(1", "frozen)", "1.5"]
    assert row.endswith("layers.0, layers.1, layers.2, layers.3")
    with pytest.raises(ValueError, match=r"names \['layers\.depth'\]"):
        nest(plain, x, num_blocks={"layers.depth": 2})


def test_depth_of_a_net_without_channels_to_cut():
    plain, x = depth_nets.NETS["blocks_with_a_norm_before"][0]()
    parts = [f"layers.{i}.{part}" for i in range(4) for part in ("norm1", "norm2", "attn", "fc1", "fc2")]
    net = nest(plain.eval(), x, depth=True, exclude=["before", "after", *parts])
    assert list(net.widths) == ["layers.depth"]
    assert_same(narrow(net, 0.5)(x), run(net, (x,), 0.5))


def test_budgets_drop_blocks():
    plain, x = depth_nets.NETS["blocks_called_by_place"][0]()
    net = nest(plain.eval(), x, num_blocks=3, depth=True)
    for cost in ("macs", "parameters"):
        widths = widths_for(net, 0.5, cost)
        assert 1 <= widths["layers.depth"] < 3
        spent, whole = (net_cost(narrow(net, width), x) for width in (widths, 1.0))
        key = "multiply_adds" if cost == "macs" else "parameters"
        assert spent[key] <= 0.5 * whole[key]


def test_a_cascade_of_depths():
    plain = residual_perceptron(3)
    net, x = nest(plain, torch.zeros(1, 64), num_blocks=4, depth=True), torch.randn(20, 64)
    cascade = CascadeNet(net, [0.25, 0.5, 1.0], 0.0, rounding="nearest")
    torch.testing.assert_close(cascade(x), narrow(net, 1.0)(x))
    first = CascadeNet(net, [0.25, 0.5, 1.0], math.inf, rounding="nearest")
    torch.testing.assert_close(first(x), narrow(net, 0.25, rounding="nearest")(x))


def test_a_stage_that_fails_the_check_is_left_alone():
    """A net that counts how often its blocks ran: nothing on the tape says so."""

    class Counting(depth_nets.Residual):
        def forward(self, x):
            counts.append(None)
            return super().forward(x)

    def forward(net, x):
        counts.clear()
        x = net.before(x)
        for layer in net.layers:
            x = layer(x)
        return net.after(x.mean(1)) * len(counts)

    counts = []
    plain, x = depth_nets.tokens(*(Counting(nn.Linear(12, 12), 12) for _ in range(3)), loop=forward)
    with pytest.warns(UserWarning, match="`layers.depth`: the net without its last blocks"):
        net = nest(plain.eval(), x, depth=True)
    assert list(net.widths) == ["before"]
    assert_same(run(net, (x,), 0.5), narrow(net, 0.5)(x))


def test_copies_have_blocks_of_their_own():
    plain, x = depth_nets.NETS["blocks_with_a_norm_before"][0]()
    net = nest(plain.eval(), x, num_blocks=4, depth=True).eval()
    other, before = copy.deepcopy(net), run(net, (x,), 0.25)
    with torch.no_grad():
        for parameter in other.net.parameters():
            parameter.add_(0.1)
    assert all(block.module is other.net.get_submodule(block.path) for block in other.blocks)
    assert len({*net.blocks, *other.blocks}) == len(net.blocks) + len(other.blocks)
    assert_same(run(other, (x,), 0.25), narrow(other, 0.25, rounding="nearest")(x))
    assert_same(run(net, (x,), 0.25), before)


@pytest.mark.parametrize("end", ["mean", "middle"])
def test_blocks_whose_states_are_collected_are_passed_over(end):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x):
            return x + torch.tanh(self.f(x))

    def collected(net, x):
        x, states = net.i(x), []
        for each in net.blocks:
            x = each(x)
            states.append(x)
        return net.o(torch.stack(states).mean(0) if end == "mean" else states[len(states) // 2])

    parts = {"i": nn.Linear(5, 8), "blocks": nn.ModuleList(Residual() for _ in range(4)), "o": nn.Linear(8, 3)}
    net, x = nest(Net(collected, **parts), torch.randn(2, 5), depth=True), torch.randn(6, 5)
    for depth in (1, 2, 3, 4):
        kept = {"i": 1.0, "blocks.depth": depth}
        torch.testing.assert_close(flat(run(net, (x,), kept)), flat(narrow(net, kept)(x)))
