"""What rows are worth at the lengths that they had, and what value heads and objectives make of it."""

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from scipy.stats import chisquare
from shaken import shaken
from torch import nn
from torch.distributions import Normal, kl_divergence

from pyro_vnd.autoencoders import GaussianLikelihood, OrderedVAE, OrderedVQVAE, OrderedWAE, mlp_bodies
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import MaskSchedule, NestedELBO, PriceSchedule, fit
from pyro_vnd.infer._fit.handlers import EvaluationRecord, ScaleToDataset
from pyro_vnd.infer._fit.mask_sources import MaskCuts
from pyro_vnd.infer._fit.values import ValueSites, _divergence
from pyro_vnd.infer.schedules import KLWeights
from pyro_vnd.nn import ValueHead

D, K, B, N = 5, 4, 12, 36
PRIOR = OrderedMask(probs=torch.tensor([0.4, 0.3, 0.2, 0.1]))
OPTIONS = {"prior_lengths": PRIOR, "posterior_lengths": "priced", "tail": "mask"}


def make(name: str):
    """A model whose parameters, noise by length and value head are not where they start."""
    bodies, noise = mlp_bodies((D,), hidden=(8,)), GaussianLikelihood(K, "by_length")
    options = OPTIONS | {"bodies": bodies, "likelihood": noise}
    torch.manual_seed(3)
    model = {
        "independent": lambda: OrderedVAE((D,), K, **options),
        "autoregressive": lambda: OrderedVAE((D,), K, prior_latents="autoregressive", **options),
        "tokens": lambda: OrderedVQVAE((D,), K, 2, 7, **options),
        "dims": lambda: OrderedVQVAE((D,), 3, K, 7, ordered="dims", **options),
        "wae": lambda: OrderedWAE((D,), K, **options),
    }[name]()
    shaken(model, 0.2)
    return model.double()


def objective_of(model, **options):
    return model.objective(**options) if isinstance(model, OrderedWAE) else NestedELBO(**options)


def evaluate(model, x, schedule=None, num_particles=1, outer=None):
    """Return the handler of values after an evaluation, its loss, and for each particle what the guide drew."""
    elbo = objective_of(model, num_particles=num_particles)
    guides = []
    values = ValueSites("data", N / B, not isinstance(model, OrderedWAE), schedule)
    scale = ScaleToDataset("data", N, B, KLWeights(local=0.5, lengths=2.0), mark=isinstance(elbo, NestedELBO))

    def guide(x):
        with poutine.trace() as trace:
            model.guide(x)
        guides.append(trace.trace)

    with outer or nullcontext(), values, scale:
        loss = elbo.differentiable_loss(model, guide, x)
    return values, loss, guides


def found_worth(now) -> torch.Tensor:
    (site,) = now.lengths
    return now.worth(site)


def worth_of(model, x, guide, length_of_row) -> torch.Tensor:
    """Values of rows by hand: the law of x under the noise of whole codes, less what the kept latents cost."""
    found = []
    for n in range(len(x)):
        length = int(length_of_row[n])
        mask = (torch.arange(K) < length).to(x)
        code = guide.nodes["code"]["value"][n]
        likelihood = model.likelihood.law(model.decoder(code[None], mask[None]), torch.ones(1, K).to(x), 1)
        value = likelihood.log_prob(x[n : n + 1])[0]
        if isinstance(model, OrderedVQVAE):
            tokens = length if model.blocks.by_token else 3
            value = value - tokens * torch.tensor(7.0).log()
        elif not isinstance(model, OrderedWAE):
            law = guide.nodes["code"]["fn"]
            loc, scale = law.loc[n], law.scale[n]
            prior = model.prior().given(code)
            for i in range(length):
                near = Normal(prior.loc.expand(K)[i], prior.scale.expand(K)[i])
                value = value - kl_divergence(Normal(loc[i], scale[i]), near)
                value = value - near.log_prob(code[i]) + prior.densities(code).expand(K)[i]  # from a mixture
        found.append(value)
    return torch.stack(found).detach()


def lengths_of(trace) -> torch.Tensor:
    site = trace.nodes["mask" if "mask" in trace.nodes else "code"]
    value = site["value"]
    return (value if "mask" in trace.nodes else value != 0).sum(-1).round()


@pytest.mark.parametrize("num_particles", [1, 2])
@pytest.mark.parametrize("name", ["independent", "autoregressive", "tokens", "dims", "wae"])
def test_what_rows_are_worth(name: str, num_particles: int):
    model, x = make(name), torch.rand(B, D)
    values, _, guides = evaluate(model, x, num_particles=num_particles)
    assert len(values.rounds) == len(guides) == num_particles
    for now, guide in zip(values.rounds, guides, strict=True):
        (site,) = now.lengths
        lengths = lengths_of(guide)
        assert torch.equal(now.lengths[site], lengths.long())
        assert len(set(lengths.tolist())) > 1
        expected = worth_of(model, x, guide, lengths)
        torch.testing.assert_close(found_worth(now).detach(), expected)
        # Power: another length of each row, or the noise of its own length, is worth something else.
        assert (found_worth(now) - worth_of(model, x, guide, K + 1 - lengths)).abs().max() > 0.1
        site = guide.nodes["code"]["value"], (torch.arange(K) < lengths[:, None]).to(x)
        other = model.likelihood_given(*site).log_prob(x) - model.likelihood.law(
            model.decoder(*site), torch.ones(B, K).to(x), 1
        ).log_prob(x)
        assert other.abs().max() > 0.1
        assert not found_worth(now).requires_grad


@pytest.mark.parametrize("name", ["independent", "tokens"])
def test_worth_does_not_depend_on_prices_and_cuts(name: str):
    model, x = make(name), torch.rand(B, D)
    schedule = PriceSchedule(1.0, 10.0, temperature=2.0)
    given = torch.arange(B) % (K + 1)  # 0 is random
    record = EvaluationRecord()
    with record:
        poutine.trace(model.guide).get_trace(x)
    cuts = MaskCuts(schedule, (model, model.guide), record, "data")
    values, _, (guide,) = evaluate(model, x, schedule, outer=cuts._cut(given / K, 0))
    lengths = lengths_of(guide)
    assert torch.equal(lengths[given > 0].long(), given[given > 0])
    torch.testing.assert_close(found_worth(values.rounds[0]), worth_of(model, x, guide, lengths))


def test_hidden_rows_are_worth_nothing_and_teach_nothing():
    model, x = make("independent"), torch.rand(B, D)
    seen = torch.arange(B) % 3 > 0
    heads = []
    for hidden in (True, False):
        torch.manual_seed(0)
        values, _, (guide,) = evaluate(model, x, outer=poutine.mask(mask=seen) if hidden else None)
        (now,) = values.rounds
        if hidden:
            assert torch.equal(found_worth(now)[~seen], torch.zeros(4).double())
            expected = worth_of(model, x, guide, lengths_of(guide))
            torch.testing.assert_close(found_worth(now)[seen], expected[seen])
        head = model.encoder.value_head
        before = {name: value.clone() for name, value in head.state_dict().items()}
        values.loss().backward()
        heads.append([head.seen.sum().item(), head.curve.clone(), *(p.grad.clone() for p in head.parameters())])
        head.load_state_dict(before)
        head.zero_grad()
    assert (heads[0][0], heads[1][0]) == (seen.sum(), B)
    assert not torch.allclose(heads[0][-1], heads[1][-1])


def of_prices(schedule: PriceSchedule, num_rows: int):
    """Lengths of equal images under a schedule, all at nearly one price, and the law that they should have."""
    model = make("independent")
    x = torch.rand(1, D).expand(num_rows, D)
    head = model.encoder.value_head
    with torch.no_grad():
        head.net[-1].bias.copy_(torch.tensor([0.0, 9.0, 9.0, 14.0]))
    with ValueSites("data", 1.0, True, schedule), poutine.trace() as trace:
        model.guide(x)
    model.eval()
    with torch.no_grad():
        curve = head(model.value_inputs(x[:1]))[0]
    return lengths_of(trace.trace), curve


def test_lengths_have_the_law_of_their_price_and_temperature():
    num_rows, price, temperature = 20_000, 3.0, 2.0
    lengths, values = of_prices(PriceSchedule(price, price * (1 + 1e-9), temperature=temperature), num_rows)
    counts = torch.bincount(lengths.long(), minlength=K + 1)[1:].double().numpy()
    log_prior, units = PRIOR.logits.double(), torch.arange(1, K + 1)

    def p_value(scores):
        return chisquare(counts, num_rows * scores.softmax(-1).detach().numpy()).pvalue

    assert p_value((values + log_prior - price * units) / temperature) > 0.001
    assert p_value(values + log_prior - price * units) < 1e-4  # without the temperature
    assert p_value((values + log_prior) / temperature) < 1e-4  # without the price
    assert p_value((values - price * units) / temperature) < 1e-4  # without the prior
    assert p_value((values + log_prior - price * units) / (1.05 * temperature)) < 1e-4


@pytest.mark.parametrize("name", ["independent", "autoregressive", "tokens"])
def test_the_kl_of_lengths_is_that_of_the_laws_at_their_prices(name: str):
    model, x = make(name), torch.rand(B, D)
    temperature = 3.0
    elbo = NestedELBO()
    with ValueSites("data", 1.0, True, PriceSchedule(0.5, 20.0, temperature=temperature)) as values:
        total = elbo.differentiable_loss(model, model.guide, x)
    (now,) = values.rounds
    (site,) = now.prices
    price = now.prices[site][:, None]
    assert len(set(price.flatten().tolist())) == B
    units, log_prior = torch.arange(1, K + 1), PRIOR.logits.double()
    log_q = ((now.values[site] + log_prior - price * units) / temperature).log_softmax(-1)
    log_p = (log_prior - price * units).log_softmax(-1)
    exact = (log_q.exp() * (log_q - log_p)).sum().detach()
    torch.testing.assert_close(elbo.kl_lengths[site], exact)
    torch.testing.assert_close(total.detach(), sum(elbo.kl.values()) - elbo.log_likelihood)
    plain = (log_q.exp() * (log_q - log_prior)).sum().detach()
    assert abs(plain - exact) > 0.1  # power: against the prior at no price it is another one


@pytest.mark.parametrize("schedule", [None, PriceSchedule(1.0, 10.0)], ids=["no price", "prices"])
@pytest.mark.parametrize("name", ["independent", "tokens", "wae"])
def test_heads_learn_from_regression_alone_and_nothing_else_does(name: str, schedule):
    model, x = make(name), torch.rand(B, D)
    head = dict(model.encoder.value_head.named_parameters())
    rest = {name: p for name, p in model.named_parameters() if "value_head" not in name}
    torch.manual_seed(1)
    values, loss, _ = evaluate(model, x, schedule)
    model.zero_grad()
    loss.backward(retain_graph=True)
    without = {name: None if p.grad is None else p.grad.clone() for name, p in rest.items()}
    assert all(p.grad is None or not p.grad.any() for p in head.values())
    assert sum(gradient is not None and bool(gradient.any()) for gradient in without.values()) > 4
    error = values.loss()
    model.zero_grad()
    with_error = loss + (error - error.detach())
    assert torch.equal(with_error, loss)
    with_error.backward()
    for name, p in rest.items():
        assert (p.grad is None) == (without[name] is None)
        assert p.grad is None or torch.equal(p.grad, without[name]), name
    assert all(p.grad is not None and p.grad.any() for p in head.values())


def test_two_particles_teach_as_much_as_each():
    model, x = make("independent"), torch.rand(B, D)
    values, _, _ = evaluate(model, x, num_particles=2)
    head, rounds = model.encoder.value_head, list(values.rounds)
    state = {name: value.clone() for name, value in head.state_dict().items()}
    total = values.loss().item()
    head.load_state_dict(state)
    by_hand = sum(
        head.regression(now.values["code"], now.lengths["code"], found_worth(now), torch.ones(B)).item()
        for now in rounds
    )
    assert total == pytest.approx(by_hand)
    assert values.rounds == []
    assert head.seen.sum() == 2 * B


class Depths(PyroModule):
    """A user's own model: a mask for each row, other latents in the plate, observed sites, one in a further plate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.head, self.encode = ValueHead(D, K, prior=PRIOR), nn.Linear(D, 2)
        shaken(self, 0.5).double()

    def forward(self, x):
        shift = pyro.sample("shift", dist.Normal(torch.tensor(0.0), 1.0))
        rows = pyro.plate("data", len(x), dim=-1)
        with rows:
            mask = pyro.sample("mask", OrderedMask(probs=PRIOR.probs.to(x)))
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(mask.sum(-1) + z + shift, 0.5), obs=x.sum(-1))
            pyro.sample("first", dist.Normal(z, 2.0), obs=x[:, 0])
        with pyro.plate("pixels", 3, dim=-2), rows:
            pyro.sample("rest", dist.Normal(z, 3.0), obs=x[:, 1:4].T)


class DepthsGuide(PyroModule):
    def __init__(self, model: Depths) -> None:
        super().__init__()
        self.head, self.encode = model.head, model.encode
        self.shift = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x):
        pyro.sample("shift", dist.Normal(self.shift, 0.1))
        loc, scale = self.encode(x).unbind(-1)
        logits = self.head(x) + self.head.log_probs
        with pyro.plate("data", len(x)):
            law = OrderedMaskStraightThrough(0.2, logits=logits)
            pyro.sample("mask", law, infer={"value_head": self.head})
            pyro.sample("z", dist.Normal(loc, scale.exp()))


def test_latents_beside_a_mask_are_paid_and_those_of_all_rows_are_not():
    model, x = Depths(), torch.rand(B, D)
    model.guide = DepthsGuide(model)
    values, _, (guide,) = evaluate(model, x)
    z, shift, mask = (guide.nodes[name]["value"] for name in ("z", "shift", "mask"))
    expected = Normal(mask.sum(-1) + z + shift, 0.5).log_prob(x.sum(-1)) + Normal(z, 2.0).log_prob(x[:, 0])
    expected = expected + Normal(z[:, None], 3.0).log_prob(x[:, 1:4]).sum(-1)
    expected = expected - kl_divergence(guide.nodes["z"]["fn"], Normal(torch.tensor(0.0), 1.0))
    torch.testing.assert_close(found_worth(values.rounds[0]), expected.detach())


def test_a_head_of_a_fit_learns_what_lengths_are_worth_and_which_price_leads_where():
    """Rows of two kinds: one unit explains some, three the others."""
    torch.manual_seed(0)
    kind = torch.arange(200) % 2
    x = torch.cat([1.0 + 2 * kind[:, None] + 0.1 * torch.randn(200, 1), torch.randn(200, D - 1)], -1)
    model = Kinds()
    guide = KindsGuide(model)
    schedule = PriceSchedule(0.1, 20.0, full=0.1, explore=0.2, temperature=2.0)
    fit(model, guide, x, num_epochs=150, batch_size=50, lr=0.01, schedule=schedule, progress=False)
    model.eval()
    with torch.no_grad():
        law = OrderedMask(logits=model.head(x) + model.head.log_probs).tilt(model.head.price_at(2.0))
    assert law.mean_length.mean().item() == pytest.approx(2.0, rel=0.02)
    means = [law.mean_length[kind == k].mean().item() for k in (0, 1)]
    assert means[0] == pytest.approx(1, abs=0.2)
    assert means[1] == pytest.approx(3, abs=0.2)
    one_length = -0.5 * ((x[:, :1] - torch.arange(1, K + 1)) / 0.5) ** 2
    values = model.head(x).detach()
    gap = (values[:, 2] - values[:, 0]) - (one_length[:, 2] - one_length[:, 0])
    assert gap.abs().mean() < 1.5  # of 16 nats between the kinds


class Kinds(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.head = ValueHead(D, K).double()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            mask = pyro.sample("mask", OrderedMask.uniform(K))
            pyro.sample("x", dist.Normal(mask.sum(-1), 0.5), obs=x[:, 0])


class KindsGuide(PyroModule):
    def __init__(self, model: Kinds) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        law = OrderedMaskStraightThrough(0.2, logits=self.model.head(x) + self.model.head.log_probs)
        with pyro.plate("data", len(x)):
            pyro.sample("mask", law, infer={"value_head": self.model.head})


def test_a_fit_teaches_heads_under_a_mask_schedule_and_none():
    x = torch.rand(N, D)
    of_schedule, of_elbo = {"schedule": MaskSchedule(num_particles=2)}, {"elbo": NestedELBO(num_particles=2)}
    for options in ({}, {"schedule": MaskSchedule()}, {"schedule": PriceSchedule()}, of_schedule, of_elbo):
        model = make("independent")
        fit(model, model.guide, x, num_epochs=4, batch_size=B, **options, progress=False)
        head = model.encoder.value_head
        assert head.seen.sum() == 4 * N * (2 if options in (of_schedule, of_elbo) else 1)
        assert head.mean_lengths.isfinite().all()
        model.eval()
        law = model.lengths(x, mean_length=2.0)  # the rows of the calibration are all of them
        assert law.mean_length.mean().item() == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(
    ("q", "p"), [(dist.Cauchy(0.5, 2.0), dist.Normal(0.0, 1.0)), (dist.Delta(torch.tensor(0.7)), dist.Normal(0.0, 1.0))]
)
def test_without_a_kl_the_densities_at_the_draw_are_compared(q, p):
    value = torch.tensor(0.7)
    assert torch.equal(_divergence(q, p, value), q.log_prob(value) - p.log_prob(value))


def test_a_kl_that_is_known_is_exact():
    q, p = Normal(0.5, 2.0), Normal(0.0, 1.0)
    assert torch.equal(_divergence(q, p, torch.tensor(0.7)), kl_divergence(q, p))
