"""Draws of a net that are kept: whatever is predicted with them is what the slow way gives, draw by draw."""

import copy
import itertools
import math
import pickle

import depth_nets
import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_vnd._state import module_mode
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.nn import (
    NarrowDraws,
    NestedModel,
    NestedNet,
    NormalTargets,
    narrow,
    nest,
    recalibrate_batchnorm,
)

NUM_DRAWS, NUM_ROWS = 3, 5
X = torch.randn(NUM_ROWS, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MASK_PER = pytest.mark.parametrize("mask_per", ["example", "batch"])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


class Texts(nn.Module):
    """Inputs by name, random tables, an output that is a dictionary, and parameters that functions read."""

    def __init__(self):
        super().__init__()
        self.table, self.scale = nn.Embedding(7, 8), nn.Parameter(torch.rand(8))
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids, seen):
        x = self.scale * self.body(self.table(ids)).relu() * seen[..., None]
        return {"states": x, "logits": self.head(x.mean(1))}


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.norm, self.head = (
            nn.Linear(4, 8),
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.Linear(8, 3),
        )

    def forward(self, left, right):
        return self.head(self.norm(self.left(left).tanh() + self.right(right).tanh()))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x).mean(1))


def perceptron():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def make(mask_per="example", **options):
    net = nest(perceptron(), X[:1], num_blocks=4, mask_per=mask_per, **options).eval()
    with torch.no_grad():
        for width in net.widths.values():
            width.logits.normal_()
    return net


TEXTS = {"ids": torch.arange(20).reshape(5, 4) % 7, "seen": (torch.rand(5, 4) < 0.7).double()}
CASES = {
    "perceptron": (perceptron, (X,), {}, {}),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Flatten(),
            nn.Linear(32, 2),
        ),
        (torch.randn(5, 1, 6, 6).double(),),
        {},
        {},
    ),
    "recurrent": (Recurrent, (torch.randn(5, 3, 4).double(),), {}, {}),
    "attention": (Attention, (torch.randn(5, 3, 8).double(),), {}, {}),
    "texts": (Texts, (), TEXTS, {"prior": {"": "normal", "table.weight": 0.8, "scale": 0.5}}),
    "pair": (Pair, (torch.randn(5, 4).double(), torch.randn(5, 6).double()), {}, {}),
    "depth": (lambda: depth_nets.a_residual_net()[0], (torch.randn(5, 3, 8, 8).double(),), {}, {"depth": True}),
    "depth called by place": (
        lambda: depth_nets.blocks_that_return_tuples_called_by_place()[0],
        (torch.randn(5, 6, 8).double(),),
        {},
        {"depth": True},
    ),
}


@pytest.fixture(params=itertools.product(CASES, ["example", "batch"]), ids="-".join)
def case(request):
    name, mask_per = request.param
    build, args, named, options = CASES[name]
    example = args[0][:2] if len(args) == 1 else tuple(x[:2] for x in args) or {key: x[:2] for key, x in named.items()}
    net = nest(build(), example, num_blocks=4, mask_per=mask_per, **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net, args, named


def logits(returned):
    return returned["logits"] if isinstance(returned, dict) else returned


def by_guide(net: NestedNet, num_draws, seed, args, named):
    """Draws by the guide, traced one after the other."""
    with torch.random.fork_rng(), torch.no_grad(), net.cut(1.0):
        torch.manual_seed(seed)
        return [net.guide(*args, **named) for _ in range(num_draws)]


def as_masked(net: NestedNet, draw, masks, args, named):
    """Outputs of the model whose latents are given: the program that defines them."""
    with torch.no_grad(), poutine.condition(data={**draw, **masks}):
        return logits(net(*args, **named))


def masks_of(net, uniform):
    """Masks 1[u < S_i], the first kept, by site; of one uniform number each."""
    laws = net.laws.items()
    return {
        site: (law.keep_probs > u * law.keep_probs[0]).double() for (site, law), u in zip(laws, uniform, strict=True)
    }


def test_draws_are_those_of_the_guide(case):
    net, args, named = case
    draws, expected = net.draws(NUM_DRAWS, seed=3), by_guide(net, NUM_DRAWS, 3, args, named)
    assert len(draws) == len([*draws]) == NUM_DRAWS
    for draw, other in zip(draws, expected, strict=True):
        assert draw.keys() == other.keys()
        for site, value in draw.items():
            torch.testing.assert_close(value, other[site])
            assert not value.requires_grad
    assert not all(torch.equal(draws[0][site], draws[1][site]) for site in draws[0])


@pytest.mark.parametrize("width", [1, 0.5, 1.0])
def test_a_width_is_that_of_nets_narrowed_one_by_one(case, width):
    net, args, named = case
    draws = net.draws(NUM_DRAWS, seed=0)
    with torch.no_grad():
        expected = torch.stack([logits(narrow(net, width, draw, rounding="nearest")(*args, **named)) for draw in draws])
    assert (expected[0] != expected[1]).any()
    for _ in range(2):  # the second time from nets that are kept
        torch.testing.assert_close(draws.predict(*args, width=width, rounding="nearest", **named), expected)
    narrowed = draws.narrow(width, "nearest")
    torch.testing.assert_close(narrowed.predict(*args, **named), expected)
    torch.testing.assert_close(narrowed(*args, **named), expected)
    assert len(narrowed) == NUM_DRAWS
    assert len(narrowed.nets) == (NUM_DRAWS if isinstance(net.net, Recurrent) else 1)


def test_learned_laws_are_the_program_given_its_latents(case):
    net, args, named = case
    draws = net.draws(NUM_DRAWS, seed=0)
    torch.manual_seed(1)
    found = draws.predict(*args, **named)
    if net.mask_per == "batch":
        torch.testing.assert_close(draws.predict(*args, **named), found)  # lengths are kept, too
        masks = []
        for number in range(NUM_DRAWS):
            blocks = {name: draws.lengths[name][number] for name in net.widths}
            masks.append(
                {
                    f"{name}.mask": net.widths[name].prefix(torch.tensor(kept / net.widths[name].num_blocks))
                    for name, kept in blocks.items()
                }
            )
            with torch.no_grad():
                torch.testing.assert_close(logits(narrow(net, blocks, draws[number])(*args, **named)), found[number])
    else:
        torch.manual_seed(1)
        uniform = [torch.rand(NUM_DRAWS, NUM_ROWS, 1) for _ in net.widths]
        masks = [masks_of(net, [each[number] for each in uniform]) for number in range(NUM_DRAWS)]
        assert (draws.predict(*args, **named) != found).any()  # masks belong to rows, and are new
    expected = [as_masked(net, draw, mask, args, named) for draw, mask in zip(draws, masks, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))
    assert all(width.mask is width.kept is None for width in net.widths.values())
    assert not any(layer.values for layer in net.layers.values())


@MASK_PER
def test_draws_that_are_not_kept_are_made_again_the_same(mask_per):
    net = make(mask_per)
    kept, torch_state = net.draws(NUM_DRAWS, seed=5), torch.get_rng_state()
    again = net.draws(NUM_DRAWS, seed=5, keep=False)
    assert again.lengths == kept.lengths
    assert again._kept == []
    with torch.no_grad():
        for layer in net.layers.values():  # they are those of the net as it was
            layer.plain.weight.add_(1)
            layer.log_scales["weight"].add_(1)
    for _ in range(2):
        for draw, other in zip(kept, again, strict=True):
            assert all(torch.equal(value, other[site]) for site, value in draw.items())
            torch.rand(1)  # what others draw meanwhile changes nothing
    assert torch.equal(again[-1]["2.weight"], kept[2]["2.weight"])
    torch.set_rng_state(torch_state)
    found = kept.predict(X), torch.rand(1)
    torch.set_rng_state(torch_state)
    torch.testing.assert_close((again.predict(X), torch.rand(1)), found)
    torch.testing.assert_close(again.predict(X, width=0.5), kept.predict(X, width=0.5))


def test_random_numbers_are_the_callers():
    net = make()
    torch.manual_seed(1)
    first = net.draws(2), net.draws(2)
    assert first[0].seed != first[1].seed
    torch.manual_seed(1)
    assert net.draws(2).seed == first[0].seed
    for keep, mask_per in itertools.product([True, False], ["example", "batch"]):
        net = make(mask_per)
        before = torch.get_rng_state()
        draws = net.draws(2, seed=0, keep=keep)
        assert len([*draws]) == 2
        draws.predict(X, width=0.5)
        assert torch.equal(torch.get_rng_state(), before)


def counting(mask_per, probs):
    """A net whose outputs are the numbers of units that masks keep."""
    plain = nn.Sequential(nn.Linear(1, len(probs)), nn.Linear(len(probs), 1))
    with torch.no_grad():
        for layer, weight, bias in ((plain[0], 0.0, 1.0), (plain[1], 1.0, 0.0)):
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)
    net = nest(plain, torch.zeros(1, 1), prior={"": None}, mask_per=mask_per)
    with torch.no_grad():
        next(iter(net.widths.values())).logits.copy_(probs.log())
    return net


def z_scores(lengths, probs):
    """How far off the frequencies of lengths are, in standard errors."""
    counts = torch.stack([(lengths == k + 1).double().sum() for k in range(len(probs))])
    return (counts - lengths.numel() * probs) / (lengths.numel() * probs * (1 - probs)).sqrt()


@MASK_PER
def test_masks_have_their_law(mask_per):
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4])
    net = counting(mask_per, probs)
    num_draws, num_rows = (40, 500) if mask_per == "example" else (20_000, 1)
    draws = net.draws(num_draws, seed=0)
    if mask_per == "batch":
        lengths = torch.tensor(next(iter(draws.lengths.values()))).double()
        few = net.draws(30, seed=0)
        assert torch.equal(
            few.predict(torch.zeros(7, 1))[..., 0],
            torch.tensor(next(iter(few.lengths.values()))).double()[:, None].expand(-1, 7),
        )
    else:
        lengths, other = (draws.predict(torch.zeros(num_rows, 1))[..., 0] for _ in range(2))
        # Rows, draws and calls are independent.
        for one, two in ((lengths[:-1], lengths[1:]), (lengths[:, :-1], lengths[:, 1:]), (lengths, other)):
            correlation = torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]
            assert abs(correlation) < 4 / one.numel() ** 0.5
    assert z_scores(lengths, probs).abs().max() < 4
    wrong = (1.05 * probs.log()).softmax(-1)  # a temperature that is 5 % off
    assert z_scores(OrderedMask(probs=wrong).sample((200_000,)).sum(-1), probs).abs().max() > 4


def test_weights_have_their_law():
    net = make()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    draws, num_draws = net.draws(4000, seed=0), 4000

    def misfit(scale):
        """Largest errors of mean and variance of all weights, in standard errors."""
        worst = []
        for name, layer in net.layers.items():
            for key, log_scale in layer.log_scales.items():
                mean, sd = layer.plain.get_parameter(key).detach(), scale * log_scale.detach().exp()
                values = torch.stack([draw[f"{name}.{key}"] for draw in draws])
                worst.append(((values.mean(0) - mean) / sd * math.sqrt(num_draws)).abs().max())
                ratio = (values - mean).square().mean(0) / sd.square()
                worst.append(((ratio - 1) * math.sqrt(num_draws / 2)).abs().max())
        return max(worst)

    assert misfit(1.0) < 5  # of some 300
    assert misfit(1.05) > 5


def test_batches_are_of_the_same_nets():
    net = make()
    draws = net.draws(NUM_DRAWS)
    for width in (0.5, 1.0):
        by_batch = torch.cat([draws.predict(rows, width=width) for rows in X.split(2)], 1)
        torch.testing.assert_close(by_batch, draws.predict(X, width=width))
    # Half of the rows at their own widths, and the rest random.
    fractions = torch.tensor([0.25, 0.0, 1.0, 0.0, 0.5])
    found = draws.predict(X, width=fractions)
    for row, width in ((0, 0.25), (2, 1.0), (4, 0.5)):
        torch.testing.assert_close(found[:, row], draws.predict(X[row : row + 1], width=width)[:, 0])
    assert not torch.equal(found[:, [1, 3]], draws.predict(X, width=fractions)[:, [1, 3]])
    with pytest.raises(ValueError, match="one fraction for each of 5 rows; the batch has 2"):
        draws.predict(X[:2], width=fractions)


@MASK_PER
def test_some_groups_fixed_and_others_random(mask_per):
    net = make(mask_per)
    draws = net.draws(NUM_DRAWS, seed=0)
    torch.manual_seed(1)
    found = draws.predict(X, width={"0": 2})
    given = {"0.mask": net.widths["0"].prefix(torch.tensor(0.5))}
    torch.manual_seed(1)
    uniform = torch.rand(NUM_DRAWS, NUM_ROWS, 1)
    for number, draw in enumerate(draws):
        if mask_per == "batch":
            given["2.mask"] = net.widths["2"].prefix(torch.tensor(draws.lengths["2"][number] / 4))
        else:
            given |= {"0.mask": given["0.mask"].expand(NUM_ROWS, -1)}
            law = net.laws["2.mask"]
            given["2.mask"] = (law.keep_probs > uniform[number]).double()
        torch.testing.assert_close(found[number], as_masked(net, draw, given, (X,), {}))
    torch.manual_seed(1)
    with net.cut({"0": 2}):
        torch.testing.assert_close(draws.predict(X), found)  # in a cut, as all passes are
    if mask_per == "batch":
        torch.testing.assert_close(draws.predict(X, width=torch.tensor(0.5)), draws.predict(X, width=0.5))
        torch.testing.assert_close(draws.predict(X, width=torch.tensor(0.0)), draws.predict(X))


def test_narrowed_draws_do_not_change_with_the_net():
    net = make()
    draws = net.draws(NUM_DRAWS, seed=0)
    half = draws.narrow(0.5)
    before, mean = half.predict(X), narrow(net, 0.5)
    assert draws.narrow(0.5) is half
    assert draws.narrow(1) is not draws.narrow(1.0)
    other = NarrowDraws(net, net.kept_blocks(0.5), [None], lambda outputs: outputs)
    with torch.no_grad():
        expected = mean(X)
        for parameter in net.parameters():
            parameter.zero_()
    torch.testing.assert_close(half.predict(X), before)
    torch.testing.assert_close(other.predict(X), expected[None])


def test_statistics_of_batchnorm_are_of_each_draw():
    plain = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    net = nest(plain, X[:2], num_blocks=4).eval()
    draws, data = net.draws(NUM_DRAWS, seed=0), torch.randn(50, 6)
    expected = []
    for draw in draws:
        own = recalibrate_batchnorm(narrow(net, 0.5, draw), data, batch_size=20)
        with torch.no_grad():
            expected.append(own(X))
    found = draws.narrow(0.5, recalibrate=data, batch_size=20).predict(X)
    torch.testing.assert_close(found, torch.stack(expected))
    assert not torch.allclose(draws.narrow(0.5).predict(X), found)
    recurrent = nest(Recurrent(), torch.randn(2, 3, 4), num_blocks=4).eval()
    assert recurrent.draws(2).narrow(0.5, recalibrate=torch.randn(4, 3, 4)).predict(torch.randn(1, 3, 4)).shape[0] == 2


def test_copies_and_pickles():
    net = make("batch")
    draws = net.draws(NUM_DRAWS, seed=0)
    half, all_widths = draws.predict(X, width=0.5), draws.predict(X)
    for twin in (copy.deepcopy(draws), pickle.loads(pickle.dumps(draws))):
        torch.testing.assert_close(twin.predict(X, width=0.5), half)
        torch.testing.assert_close(twin.narrow(0.5).predict(X), half)
        torch.testing.assert_close(twin.predict(X), all_widths)


def test_outputs_are_those_that_a_model_takes():
    net = nest(Texts(), {key: x[:2] for key, x in TEXTS.items()}, num_blocks=4)
    model = NestedModel(net, NormalTargets(), output=lambda returned: returned["logits"][:, :1])
    torch.manual_seed(0)
    found = model.draws(2, seed=0).predict(**TEXTS)
    torch.manual_seed(0)
    torch.testing.assert_close(found, net.draws(2, seed=0).predict(**TEXTS)[..., :1])


def test_the_mode_is_that_of_the_net():
    net = nest(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.9), nn.Linear(8, 2)), X[:1], num_blocks=4)
    draws = net.draws(2)
    for width in (None, 0.5, {"0": 2}):
        net.train()
        assert not torch.equal(draws.predict(X, width=width), draws.predict(X, width=width))
        with module_mode([net], training=False):
            fixed = 1.0 if width is None else width
            assert torch.equal(draws.predict(X, width=fixed), draws.predict(X, width=fixed))


def test_a_pass_that_fails_leaves_the_net_as_it_was():
    net = make()
    draws = net.draws(2)
    before = draws.predict(X, width=torch.ones(NUM_ROWS))
    for width in (None, 0.5):
        with pytest.raises(ValueError, match=r"Draws: inputs must be like the example .*of shape \(1, 6\)"):
            draws.predict(torch.zeros(5, 4), width=width)
        with pytest.raises(ValueError, match="Draws: inputs must be of the type of the net's parameters"):
            draws.predict(X.float(), width=width)
        with pytest.raises(ValueError, match="Draws: inputs must be the arguments of Sequential"):
            draws.predict(X, X, width=width)
        with pytest.raises(ValueError, match=r"Draws.predict: argument `inputs` has 1 numbers that are NaN"):
            draws.predict(torch.full((1, 1), torch.nan), width=width)
    assert all(width.mask is None for width in net.widths.values())
    torch.testing.assert_close(draws.predict(X, width=torch.ones(NUM_ROWS)), before)


def test_pyro_hears_nothing():
    net = make()
    with poutine.trace() as trace:
        draws = net.draws(2)
        outputs = draws.predict(X), draws.predict(X, width=0.5)
    assert not trace.trace.nodes
    assert not any(each.requires_grad for each in outputs)
    with pyro.plate("data", 7, dim=-1):
        assert draws.predict(X).shape == (2, NUM_ROWS, 2)


def test_draws_of_other_devices_are_kept():
    net = make().to("meta")
    with pytest.raises(ValueError, match="NetDraws: argument `keep` must be True for a net on meta"):
        net.draws(2, keep=False)


def test_they_say_what_they_are():
    net = nest(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), torch.zeros(2, 3), num_blocks=3)
    draws = net.draws(4, seed=7)
    assert repr(draws) == "NetDraws(4 draws of Sequential, kept, one mask for each example, seed 7)"
    assert "drawn anew at each use" in repr(net.draws(4, keep=False))
    assert repr(draws.narrow(2)) == "NarrowDraws(4 draws of Sequential, 2 of 3 blocks of 0)"


@pytest.mark.parametrize("num_draws", [0, -1, 1.5, True])
def test_numbers_of_draws(num_draws):
    with pytest.raises(ValueError, match="argument `num_samples` must be an integer, at least 1; got"):
        make().draws(num_draws)
    with pytest.raises(IndexError):
        make().draws(2)[2]


@pytest.mark.gpu
@MASK_PER
def test_on_the_gpu(mask_per):
    net, x = make(mask_per).cuda(), X.cuda()
    kept, again = net.draws(NUM_DRAWS, seed=5), net.draws(NUM_DRAWS, seed=5, keep=False)
    for _ in range(2):
        for draw, other in zip(kept, again, strict=True):
            assert all(torch.equal(value, other[site]) for site, value in draw.items())
            torch.rand(1, device="cuda")
    expected = torch.stack([narrow(net, 0.5, draw)(x) for draw in kept])
    torch.testing.assert_close(again.predict(x, width=0.5), expected.detach())
    assert kept.predict(x).device.type == "cuda"


def test_a_net_that_is_trained_further_is_narrowed_anew():
    """The draws stay; what the net has of its own, statistics and points, is that of the net as it is."""
    net = nest(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), X, num_blocks=4).eval()
    draws = net.draws(NUM_DRAWS, seed=0)
    before = draws.predict(X, width=0.5)
    assert torch.equal(before, draws.predict(X, width=0.5))
    net.train()
    with torch.no_grad():
        for each in net.modules():
            if isinstance(each, nn.BatchNorm1d):
                each.running_mean += 1
    net.eval()
    expected = torch.stack([narrow(net, 0.5, draw)(X) for draw in draws])
    torch.testing.assert_close(draws.predict(X, width=0.5), expected)
    assert not torch.allclose(before, expected)  # power
