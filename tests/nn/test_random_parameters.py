"""Laws of parameters that no layer has: class tokens, position embeddings, scales of layers, tables of embeddings."""

import copy
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import Laplace, Normal, kl_divergence
from torch.nn import functional as F

from pyro_vnd.infer import NestedELBO, OptimizerSettings, cosine_to_zero, fit, module_local_params
from pyro_vnd.nn import narrow, nest

IDS = torch.arange(15).reshape(3, 5) * 4 % 7
RAW = {
    "pos": 0.5,
    "token": Normal(torch.tensor(0.1).double(), torch.tensor(2.0).double()),
    "scale": "normal",
    "embedding": 0.8,
    "read": "normal",
}
SITES = {"pos": (5, 8), "token": (8,), "scale": (8,), "embedding.weight": (7, 8), "read": (6, 8)}


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        for name in ("pos", "token", "scale", "read"):
            self.register_parameter(name, nn.Parameter(torch.randn(SITES[name])))
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(6, 3)

    def forward(self, ids):
        x = self.embedding(ids) + self.pos
        x = x + self.scale * self.down(self.up(x).relu())
        x = torch.cat([self.token.expand(len(x), 1, -1), x], 1)
        return self.head(F.linear(x, self.read).tanh().mean(1))


def nested(**options):
    return nest(Tokens(), IDS, **{"num_blocks": 4, "prior": RAW, **options})


def test_what_is_named_has_a_site_and_nothing_else():
    net = nested(prior=RAW | {"": None})
    assert {name: tuple(each.mean.shape) for name, each in net.random_parameters.items()} == SITES
    with torch.no_grad():
        drawn = poutine.trace(net.guide).get_trace(IDS)
    assert {name for name in drawn.stochastic_nodes if not name.endswith(".mask") and name != "data"} == {*SITES}
    assert not nested(prior="normal").random_parameters
    assert list(nested(prior={"": None, "embedding.weight": 1.0}, prefix="a.").guide(IDS))[-1] == "a.embedding.weight"


def test_posteriors_start_at_the_net_given_and_priors_are_those_named():
    plain = Tokens()
    net = nest(plain, IDS, prior=RAW, init_scale=0.2)
    spreads = {"pos": 0.5, "token": 2.0, "scale": 1.0, "embedding.weight": 0.8, "read": 1.0}
    for name, each in net.random_parameters.items():
        law, prior = each.law("posterior"), each.law("prior")
        assert torch.equal(law.mean, plain.get_parameter(name))
        torch.testing.assert_close(law.variance.sqrt(), torch.full_like(law.mean, 0.2 * spreads[name]))
        torch.testing.assert_close(prior.variance.sqrt(), torch.full_like(law.mean, spreads[name]))
        assert prior.mean.flatten()[0].item() == pytest.approx(0.1 if name == "token" else 0.0)


def enumerated_kl(net, name) -> float:
    """KL of the entries whose units are kept, averaged over all lengths of all widths."""
    each, total = net.random_parameters[name], 0.0
    entries = kl_divergence(
        Normal(each.mean, each.log_scale.exp()),
        each.prior(each.key, each._holder[0]) if callable(each.prior) else each.prior,
    )
    widths = list(net.widths.values())
    for lengths in itertools.product(*[range(width.law.num_units) for width in widths]):
        probability = math.prod(width.law.probs[k].item() for width, k in zip(widths, lengths, strict=True))
        kept = torch.ones_like(entries)
        for dim, axis in each.axes.items():
            (width,) = axis.widths
            units = width.spread(torch.ones(2, 2).tril()[lengths[widths.index(width)]])
            kept = kept * units.reshape(-1, *[1] * (entries.dim() - 1 - dim))
        total += probability * (kept * entries).sum().item()
    return total


@pytest.mark.parametrize("name", SITES)
def test_a_kl_counts_as_far_as_units_are_kept(name):
    net = nested(mask_per="batch", num_blocks=2)
    for width in net.widths.values():
        nn.init.normal_(width.logits)
    for each in net.random_parameters.values():
        nn.init.normal_(each.log_scale)
    for width in net.widths.values():
        width.hold(keep_probs=width.posterior.keep_probs)
    each = net.random_parameters[name]
    found = kl_divergence(each.law("posterior"), each.law("prior")).item()
    assert found == pytest.approx(enumerated_kl(net, name), rel=1e-10)
    for width in net.widths.values():
        width.release()
    assert found < kl_divergence(each.law("posterior"), each.law("prior")).item()


def model_of(net):
    def model(ids, y):
        rows = pyro.plate("data", len(ids), dim=-1)
        outputs = net(ids, plate=rows)
        with rows:
            pyro.sample("y", dist.Normal(outputs, 1.0).to_event(1), obs=y)

    return model


@pytest.mark.parametrize("mask_per", ["example", "batch"])
def test_objectives_agree_and_reach_mean_and_scale(mask_per):
    net = nested(mask_per=mask_per, gated=False)  # a gated density is an expectation, which one draw is not
    y = torch.randn(3, 3)
    losses = {}
    for kind, draws in ((NestedELBO, 60), (Trace_ELBO, 300)):
        with module_local_params(model_of(net), net.guide), torch.no_grad():
            found = torch.tensor([kind().differentiable_loss(model_of(net), net.guide, IDS, y) for _ in range(draws)])
        losses[kind] = found.mean(), found.std() / draws**0.5
    (exact, error), (sampled, other) = losses.values()
    assert (exact - sampled).abs() < 4 * (error**2 + other**2).sqrt()  # z-score, of 60 and 300 draws
    with module_local_params(model_of(net), net.guide):
        NestedELBO().differentiable_loss(model_of(net), net.guide, IDS, y).backward()
    for each in net.random_parameters.values():
        assert each.mean.grad.abs().max() > 0
        assert each.log_scale.grad.abs().max() > 0


@pytest.mark.parametrize("mask_per", ["example", "batch"])
def test_a_draw_is_masked_sliced_and_narrowed_alike(mask_per):
    net = nested(mask_per=mask_per)
    with torch.no_grad():
        for width in (0.25, 0.5, 1.0):
            with net.cut(width), net._drawn("posterior", len(IDS)) as draw:
                masked = net.net(IDS)
            torch.testing.assert_close(narrow(net, width, draw)(IDS), masked, rtol=1e-10, atol=1e-10)
            assert not torch.allclose(narrow(net, width)(IDS), masked)
            with net.cut(width, sliced=True), net._drawn("posterior", len(IDS), weights=False):
                torch.testing.assert_close(net.net(IDS), narrow(net, width)(IDS), rtol=1e-10, atol=1e-10)
        with net.cut(0.5, sliced=True):
            assert net.guide(IDS)["pos"].shape == (5, 4)
    for name in SITES:
        with pytest.raises(ValueError, match=f"`draw` has no value for site '{name}'"):
            narrow(net, 0.5, {site: value for site, value in draw.items() if site != name})


def test_draws_have_the_law():
    net = nested(mask_per="batch")
    with torch.no_grad():
        for each in net.random_parameters.values():
            each.log_scale.fill_(-0.5)
        draws = [net.guide(IDS) for _ in range(500)]
    for name, each in net.random_parameters.items():
        noise = (torch.stack([draw[name] for draw in draws]) - each.mean.detach()) / math.exp(-0.5)
        count = noise.numel()
        assert abs(noise.mean().item()) < 4 / count**0.5
        assert abs(noise.var().item() - 1) < 4 * (2 / count) ** 0.5  # of 500 draws of each entry
        assert abs((1.1 * noise).var().item() - 1) > 4 * (2 / count) ** 0.5


def test_priors_with_entries_of_their_own_are_cut():
    loc = torch.randn(5, 8)
    net = nested(prior={"": None, "pos": Laplace(loc, 1.0)}, mask_per="batch")
    with net.cut(0.5, sliced=True), torch.no_grad():
        trace = poutine.trace(net).get_trace(IDS)
    torch.testing.assert_close(trace.nodes["pos"]["fn"].base.mean, loc[:, :4])


def test_a_posterior_that_is_known_is_found():
    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 3)
            self.offset = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return self.last(self.first(x).tanh()) + self.offset

    plain = Offset().requires_grad_(False)
    x, noise = torch.randn(20, 2), 0.5
    y = plain(x) + torch.tensor([1.0, -0.5, 0.2]) + noise * torch.randn(20, 3)
    net = nest(plain, x, frozen=4, prior={"": None, "offset": 0.7})
    assert net.random_parameters["offset"].axes == {}
    net.random_parameters["offset"].mean.requires_grad_(True)

    def model(x, y):
        rows = pyro.plate("data", len(x), dim=-1)
        outputs = net(x, plate=rows)
        with rows:
            pyro.sample("y", dist.Normal(outputs, noise).to_event(1), obs=y)

    fit(
        model,
        net.guide,
        (x, y),
        num_epochs=600,
        lr=0.02,
        optimizer=OptimizerSettings(lr_schedule=cosine_to_zero()),
        progress=False,
    )
    precision = 1 / 0.7**2 + len(x) / noise**2
    mean = (y - plain(x)).sum(0) / noise**2 / precision
    law = net.random_parameters["offset"].law("posterior")
    assert ((law.mean - mean).abs() < 0.25 * precision**-0.5).all()
    torch.testing.assert_close(law.variance.sqrt(), torch.full((3,), precision**-0.5), rtol=0.15, atol=0)


def test_states_and_copies_have_the_laws():
    net = nested()
    nn.init.normal_(net.random_parameters["pos"].log_scale)
    other = nested()
    other.load_state_dict(net.state_dict())
    copied = copy.deepcopy(net)
    nn.init.zeros_(net.random_parameters["pos"].mean)
    for each in (other, copied):
        torch.testing.assert_close(each.random_parameters["pos"].log_scale, net.random_parameters["pos"].log_scale)
        assert each.random_parameters["pos"].mean is each.net.pos
        assert each.net.pos.abs().max() > 0


def test_parts_that_are_left_alone_may_be_random():
    net = nested(exclude=["embedding"])
    assert net.random_parameters["embedding.weight"].axes == {}
    with torch.no_grad(), net.cut(0.5), net._drawn("posterior", 3) as draw:
        outputs = net.net(IDS)
    torch.testing.assert_close(narrow(net, 0.5, draw)(IDS), outputs)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.body(self.embedding(ids)).relu())


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.a, self.b = nn.LSTM(3, 4, proj_size=2), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x).relu()) + self.rnn(x)[0]


def test_what_cannot_be_random_is_refused_by_name():
    with pytest.raises(ValueError, match=r"`prior` names 'embedding.weight', which several modules share"):
        nest(Tied(), IDS, prior={"embedding": "normal"})
    with pytest.raises(ValueError, match=r"`prior` names \['posn'\]; layers .*'up', 'down', 'head'.*others?.*'pos'"):
        nested(prior={"posn": 1.0})
    for number in (0, -1.0, math.inf, True):
        with pytest.raises(ValueError, match="`prior` must have a finite scale > 0"):
            nested(prior={"pos": number})
    with pytest.raises(ValueError, match=r"the prior of 'pos' must have one entry, or those of the array \(5, 8\)"):
        nested(prior={"pos": Normal(torch.zeros(3), 1.0)})
    with pytest.raises(ValueError, match=r"the prior of 'pos' must be a law, or a function .* got 'laplace'"):
        nested(prior={"pos": "laplace"})
    padded = nn.Sequential(nn.Embedding(7, 8, padding_idx=0), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"`prior` names '0\.weight', of which row 0 stands for padding"):
        nest(padded, IDS, prior={"0": "normal"})
    with pytest.raises(ValueError, match=r"'rnn\.weight_ih_l0', which a LSTM keeps a copy of"):
        nest(Projected(), torch.zeros(2, 3), prior={"rnn": 1.0})


def test_a_number_is_the_scale_of_all_weights():
    net = nested(prior=0.3)
    assert not net.random_parameters
    assert {layer.prior_of("weight").stddev.item() for layer in net.layers.values()} == {0.3}
