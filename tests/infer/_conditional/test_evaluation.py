"""All lengths at once are what the guide, drawn length by length, says of each; and what Pyro's own objective says."""

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, KLWeights, NestedELBO, fit, module_local_params
from pyro_vnd.infer._conditional.evaluation import evaluate
from pyro_vnd.infer._conditional.guide import AutoConditional

from .programs import PROGRAMS, Program

NUM_DRAWS = 1500


@pytest.fixture(params=PROGRAMS.values(), ids=PROGRAMS)
def program(request) -> Program:
    return request.param


def shaken(program: Program, **kwargs: Any) -> AutoNested:
    """A guide whose tables are at random places, so that no two lengths have one law."""
    torch.manual_seed(0)
    guide = AutoNested(program.model, latents="conditional", **kwargs)
    with module_local_params(guide):
        guide(*program.data)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            size = 0.5 if "logits" in name or "scale" in name else 0.3
            parameter += size * torch.randn(parameter.shape, generator=generator)
    for name in ("logits", "logits_by_row"):
        part = conditional(guide)
        if hasattr(part, name):
            getattr(part, f"{name}_unconstrained").data = getattr(part, f"{name}_unconstrained").data.log_softmax(-1)
    return guide


def conditional(guide: AutoNested) -> AutoConditional:
    assert guide.conditional is not None
    return guide.conditional


def drawn_log_weights(program: Program, guide: AutoNested, num_draws: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """log p - log q of single draws of the guide, with Pyro's own traces, and these draws."""
    ratios, draws = [], []
    for _ in range(num_draws):
        q = poutine.trace(guide).get_trace(*program.data)
        p = poutine.trace(poutine.replay(program.model, trace=q)).get_trace(*program.data)
        ratios.append(p.log_prob_sum() - q.log_prob_sum())
        draws.append({name: site["value"] for name, site in p.iter_stochastic_nodes()})
    return torch.stack(ratios), draws


@torch.no_grad()
def test_the_bound_of_the_guide_is_that_of_its_draws(program: Program):
    """sum_k q_k (ELBO_k + log p_k - log q_k) at the laws as they are, from 1,500 draws each; z-score at most 4."""
    guide = shaken(program)
    with module_local_params(guide):
        guide.eval()
        ratios, _ = drawn_log_weights(program, guide, NUM_DRAWS)
        found = [evaluate(conditional(guide), program.model, program.data, {}, 40) for _ in range(100)]
    bounds = torch.stack(
        [each.log_likelihood - sum(each.kl.values()) - sum(each.kl_lengths.values()) for each in found]
    )
    error = (ratios.var() / len(ratios) + bounds.var() / len(bounds)).sqrt()
    assert abs(ratios.mean() - bounds.mean()) < 4 * error
    # Power: that is much less than what one length has over another.
    assert 4 * error < 0.5 * (found[0].logits.max() - found[0].logits.min() + found[0].elbo.abs())


@torch.no_grad()
@pytest.mark.parametrize("name", ["regression", "features", "nested", "autoregressive", "local"])
def test_each_length_has_the_elbo_of_its_draws(name: str):
    """For one length outside plates: log p_k + ELBO_k of 1,500 draws of the guide that have it; z-scores at most 4."""
    program = PROGRAMS[name]
    guide = shaken(program)
    part = conditional(guide)
    site = part.plan.shared[0].name
    with module_local_params(guide):
        guide.eval()
        ratios, draws = drawn_log_weights(program, guide, NUM_DRAWS)
        logits = torch.stack([evaluate(part, program.model, program.data, {}, 40).logits for _ in range(50)])
    lengths = torch.stack([(draw[site] != 0).sum(-1) for draw in draws]) - 1
    ratios = ratios + part.logits[lengths]  # without - log q_k
    for k in range(logits.shape[1]):
        mine = ratios[lengths == k]
        error = (mine.var() / len(mine) + logits[:, k].var() / len(logits)).sqrt()
        assert abs(mine.mean() - logits[:, k].mean()) < 4 * error


@pytest.mark.parametrize("name", ["two_masks", "nested", "autoregressive", "by_row", "nested_by_row", "hidden"])
def test_pyros_enumeration_learns_the_same_laws(name: str):
    """`TraceEnum_ELBO` has the same bound, and its backward pass the same best laws; z-scores over 30 evaluations."""
    program = PROGRAMS[name]
    guide = shaken(program)
    part = conditional(guide)
    part.horizon = 1
    before = {key: value.clone() for key, value in guide.state_dict().items()}
    results: dict[str, list[Tensor]] = {"theirs": [], "ours": []}
    laws: dict[str, list[Tensor]] = {"theirs": [], "ours": []}
    with module_local_params(guide):
        for _ in range(30):
            for whose in results:
                guide.load_state_dict(before)
                if whose == "theirs":
                    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=8, vectorize_particles=True)
                    loss = elbo.differentiable_loss(program.model, guide, *program.data)
                    loss.backward()
                    bound = -loss.detach()
                else:
                    with torch.no_grad():
                        each = evaluate(part, program.model, program.data, {}, 8)
                    bound = each.log_likelihood - sum(each.kl.values()) - sum(each.kl_lengths.values())
                    part.learn(each.logits, each.logits_by_row)
                results[whose].append(bound)
                law = part.logits if not part.plan.by_row else part.logits_by_row
                law = law.detach().clone()
                laws[whose].append((law[..., ::2, :] if name == "hidden" else law).flatten())  # the others stay put
    for found, count in ((results, 1), (laws, 2)):
        theirs, ours = torch.stack(found["theirs"]), torch.stack(found["ours"])
        error = (theirs.var(0) / 30 + ours.var(0) / 30).sqrt() + 1e-4
        assert ((theirs.mean(0) - ours.mean(0)).abs() < (3.5 + count) * error).all()


def gradients(guide: AutoNested, loss: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in guide.named_parameters() if "tables" in name}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


@pytest.mark.parametrize("name", ["features", "two_masks", "local"])
def test_every_length_trains_its_table_with_the_same_weight(name: str):
    """The gradient of a table is that of -ELBO_k / K whatever the law is: by comparison with the uniform law."""
    program = PROGRAMS[name]
    guide = shaken(program)
    part = conditional(guide)
    found = []
    with module_local_params(guide):
        for law in (torch.zeros_like(part.logits), torch.linspace(0, -12, len(part.logits))):
            part.logits_unconstrained.data = law.log_softmax(-1)
            torch.manual_seed(0)
            found.append(gradients(guide, evaluate(part, program.model, program.data, {}, 4).loss))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-4)
    assert all(value.abs().sum() > 0 for value in found[0].values())


class Shifted(nn.Module):
    """A model with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.3))

    def forward(self, y: Tensor) -> None:
        mask = pyro.sample("mask", OrderedMask.uniform(3))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(w + self.shift * mask.sum(-1), 1.0), obs=y)


def test_a_parameter_of_the_model_follows_the_law_of_the_lengths():
    """d/ds sum_k q_k ELBO_k = sum_k q_k k sum_n (y_n - w - s k), at w of the guide; one evaluation of 1,500 draws."""
    model, y = Shifted(), torch.tensor([4.0, 6.0, 5.0])
    guide = AutoNested(model)
    with module_local_params(model, guide):
        guide(y)
        part = conditional(guide)
        part.logits_unconstrained.data = torch.tensor([0.1, 0.2, 0.7]).log()
        loss = evaluate(part, model, (y,), {}, NUM_DRAWS).loss
        (gradient,) = torch.autograd.grad(loss, [model.shift])
        table = part.tables[0]
        mean = (table.center + table.spread * table.loc).squeeze(-1).detach()
    lengths = torch.arange(1.0, 4.0)
    expected = -(part.logits.exp() * lengths * (y.sum() - 3 * (mean + model.shift * lengths))).sum()
    assert gradient == pytest.approx(expected.item(), abs=0.1)
    uniform = -(lengths * (y.sum() - 3 * (mean + model.shift * lengths))).mean()
    assert abs(gradient - uniform) > 1  # power


def test_rows_have_the_posterior_of_their_length():
    y = torch.tensor([1.2, 2.0, 3.7])

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            mask = pyro.sample("mask", OrderedMask(probs=torch.tensor([0.5, 0.25, 0.25, 0.0])))
            pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=y)

    log_joint = torch.tensor([0.5, 0.25, 0.25, 0.0]).log() + dist.Normal(torch.arange(1.0, 5.0), 1.0).log_prob(
        y[:, None]
    )
    guide = AutoNested(model)
    result = fit(model, guide, y, num_epochs=1, progress=False)
    torch.testing.assert_close(guide.laws["mask"].probs, log_joint.softmax(-1))
    assert result.elbo[-1] == pytest.approx(log_joint.logsumexp(-1).mean().item(), rel=1e-5)
    shared = AutoNested(model, shared_plates=["data"])
    fit(model, shared, y, num_epochs=1, progress=False)
    assert shared.laws["mask"].batch_shape == (1,)
    torch.testing.assert_close(shared.laws["mask"].probs[0], log_joint.mean(0).softmax(-1))


def test_hidden_rows_have_their_prior_and_pull_no_shared_law():
    program = PROGRAMS["hidden"]
    visible = torch.arange(len(program.data[1])) % 2 == 0
    guide = AutoNested(program.model)
    fit(program.model, guide, program.data, num_epochs=5, progress=False)
    torch.testing.assert_close(guide.laws["mask"].probs[~visible], torch.full((4, 3), 1 / 3))
    assert (guide.laws["mask"].probs[visible] - 1 / 3).abs().max() > 0.2


@pytest.mark.parametrize("length_weight", [0.5, 4.0])
def test_a_weight_of_the_lengths_is_a_temperature_of_their_law(length_weight: float):
    y = torch.tensor([1.2, 2.0, 3.7])

    def model(y: Tensor) -> None:
        mask = pyro.sample("mask", OrderedMask(probs=torch.tensor([0.5, 0.25, 0.25])))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=y)

    guide = AutoNested(model)
    fit(model, guide, y, num_epochs=1, weights=KLWeights(lengths=length_weight), progress=False)
    values = dist.Normal(torch.arange(1.0, 4.0).unsqueeze(-1), 1.0).log_prob(y).sum(-1)
    expected = (torch.tensor([0.5, 0.25, 0.25]).log() + values / length_weight).softmax(-1)
    torch.testing.assert_close(guide.laws["mask"].probs, expected)


def test_lengths_of_a_joint_law_have_one_weight():
    def model(y: Tensor) -> None:
        for name, infer in (("a", {}), ("b", {"length_weight": 2.0})):
            pyro.sample(name, OrderedMask.uniform(3), infer=infer)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    message = r"sites \['a', 'b'\] have a joint law, so that they must have one `length_weight`; got \[1.0, 2.0\]"
    with pytest.raises(ValueError, match=message):
        fit(model, AutoNested(model), torch.zeros(4), num_epochs=1, progress=False)


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_weights_of_kls_are_those_of_the_objective(kl_weight: float):
    """The objective is E log-likelihood - w KL(w) - KL(L), at each length."""
    program = PROGRAMS["regression"]
    torch.manual_seed(0)
    guide = AutoNested(program.model)
    weighted = poutine.infer_config(
        program.model, lambda site: {"kl_weight": kl_weight} if site["name"] != "mask" else {}
    )
    with module_local_params(guide):
        guide(*program.data)
        torch.manual_seed(1)
        elbo = NestedELBO()
        loss = elbo.differentiable_loss(weighted, guide, *program.data)
        torch.manual_seed(1)
        plain = evaluate(conditional(guide), program.model, program.data, {}, 4)
    assert loss.requires_grad
    kl = sum(elbo.kl[name] for name in ("w", "sigma"))
    assert kl == pytest.approx(sum(plain.kl[name] for name in ("w", "sigma")).item(), rel=1e-4)
    # Higher than the bound by what the weight leaves out, but for the law of lengths, which follows.
    assert -loss > plain.elbo + 0.5 * (1 - kl_weight) * plain.kl["w"]


def test_a_model_that_cannot_be_mapped_is_evaluated_one_length_after_another():
    program = PROGRAMS["two_masks"]

    def stubborn(x: Tensor, y: Tensor) -> None:
        trace = poutine.trace(program.model).get_trace(x, y)
        assert trace.nodes["w"]["value"].item() < 1e9  # a number, which a batch has not

    found = []
    for model in (program.model, stubborn):
        torch.manual_seed(0)
        guide = AutoNested(program.model)
        with module_local_params(guide):
            guide(*program.data)
            torch.manual_seed(1)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found.append(evaluate(conditional(guide), model, program.data, {}, 4))
        assert [
            str(each.message).startswith("the model is evaluated for one length after another") for each in caught
        ] == [True] * (model is stubborn)
    torch.testing.assert_close(found[1].logits, found[0].logits)
    torch.testing.assert_close(found[1].loss, found[0].loss)
