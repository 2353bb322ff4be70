"""What `fit` can be told beside model, guide and data: weights, schedules, where masks come from, validation."""

import math
from functools import cached_property

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import kl_divergence

from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import AutoNested, LengthCollapseWarning, MaskSchedule, cosine_to_zero, fit, linear
from pyro_vnd.infer._fit.handlers import ScaleToDataset
from pyro_vnd.infer._fit.held_out import mean_log_likelihood
from pyro_vnd.nn import NestedClassifier, NestedLayer, NestedNet, Width

N, K = 40, 4


def masked_mean(y):
    mask = pyro.sample("mask", OrderedMask.geometric(0.5, K))
    w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((mask * w).sum(-1).unsqueeze(-1), 1.0), obs=y)


class MaskedMeanGuide(PyroModule):
    """A guide with exact KLs."""

    def __init__(self):
        super().__init__()
        self.loc, self.logits = nn.Parameter(torch.ones(K)), nn.Parameter(torch.linspace(0, 1, K))

    def forward(self, y):
        pyro.sample("mask", OrderedMaskStraightThrough(0.2, logits=self.logits))
        pyro.sample("w", dist.Normal(self.loc, 0.3).to_event(1))


def make_net(mask_per="example", seed=0):
    torch.manual_seed(seed)
    hidden = Width("hidden", 8, num_blocks=4, init=OrderedMask(logits=torch.tensor([1.0, 0.0, -1.0, 0.5])))
    first = NestedLayer(nn.Linear(3, 8), outputs=hidden)
    last = NestedLayer(nn.Linear(8, 2), inputs=hidden)
    return NestedNet(nn.Sequential(first, nn.ReLU(), last), mask_per=mask_per)


@pytest.fixture
def y():
    return torch.randn(N) + 1


@pytest.fixture
def labelled():
    x = torch.randn(N, 3)
    return x, (x.sum(-1) > 0).long()


def still(parameters, lr):
    """An optimiser that does not move."""
    return torch.optim.SGD(parameters, lr=0.0)


# Parts and weights.


@pytest.mark.parametrize("batch_size", [None, 10])
def test_parts_are_exact_and_weights_are_in_the_objective_only(batch_size, y):
    guide = MaskedMeanGuide()
    arguments = {"batch_size": batch_size, "kl_weight": 0.25, "length_weight": 3.0, "optimizer": still}
    result = fit(masked_mean, guide, y, num_epochs=3, progress=False, **arguments)
    latents = kl_divergence(dist.Normal(guide.loc, 0.3), dist.Normal(0.0, 1.0)).sum().item() / N
    lengths = kl_divergence(OrderedMask(logits=guide.logits), OrderedMask.geometric(0.5, K)).item() / N
    assert result.kl_latents == pytest.approx([latents] * 3)
    assert result.kl_lengths == pytest.approx([lengths] * 3)
    assert result.kl == pytest.approx([0.25 * latents + 3 * lengths] * 3)
    assert [a - b for a, b in zip(result.log_likelihood, result.kl, strict=True)] == pytest.approx(result.elbo)
    assert f"KL of latents {latents:.4g}, of lengths {lengths:.4g}" in str(result)


def test_a_schedule_runs_from_the_first_step_to_the_last(y):
    result = fit(
        masked_mean, MaskedMeanGuide(), y, num_epochs=5, kl_weight=linear(0, 1), optimizer=still, progress=False
    )
    weights = [0, 0.25, 0.5, 0.75, 1]
    expected = [w * a + b for w, a, b in zip(weights, result.kl_latents, result.kl_lengths, strict=True)]
    assert result.kl == pytest.approx(expected)
    assert result.kl_latents[0] > 0  # also where its weight is zero


@pytest.mark.parametrize(
    "elbo", [TraceMeanField_ELBO, lambda: Trace_ELBO(num_particles=300, vectorize_particles=True, max_plate_nesting=1)]
)
def test_other_elbos_have_the_same_weights(elbo, y):
    arguments = {"num_epochs": 5, "kl_weight": 0.25, "length_weight": 3.0, "optimizer": still, "progress": False}
    exact = fit(masked_mean, MaskedMeanGuide(), y, **arguments)
    other = fit(masked_mean, MaskedMeanGuide(), y, elbo=elbo(), **arguments)
    mean_kl = sum(other.kl) / 5
    if elbo is TraceMeanField_ELBO:
        assert other.elbo == pytest.approx(exact.elbo)
        assert other.log_likelihood == pytest.approx(exact.log_likelihood)
    assert mean_kl == pytest.approx(exact.kl[0], rel=0.05)
    assert math.isnan(other.kl_latents[-1])
    assert math.isnan(other.kl_lengths[-1])
    assert "KL of latents" not in str(other)


def test_length_weight_holds_for_masks_inside_the_plate_and_out_and_kl_weight_for_other_latents_outside(y):
    def model(rows):
        pyro.sample("global_mask", OrderedMask.uniform(K))
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(rows)):
            pyro.sample("mask", OrderedMask.uniform(K))
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=rows)

    with ScaleToDataset("data", 2 * N, N, kl_weight=0.5, length_weight=3.0):
        trace = pyro.poutine.trace(model).get_trace(y)
    scales = {name: trace.nodes[name]["scale"] for name in ("global_mask", "w", "mask", "z", "y")}
    assert scales == {"global_mask": 3.0, "w": 0.5, "mask": 6.0, "z": 2.0, "y": 2.0}


def test_the_weight_of_local_latents_is_one_of_its_own(y):
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.ones(K))

        def forward(self, rows):
            with pyro.plate("data", len(rows)):
                pyro.sample("code", NestedNormal(self.loc, torch.full((K,), 0.5), torch.arange(1.0, K + 1)))

    def model(rows):
        with pyro.plate("data", len(rows)):
            code = pyro.sample("code", NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)))
            pyro.sample("y", dist.Normal(code.sum(-1), 1.0), obs=rows)

    arguments = {"num_epochs": 5, "optimizer": still, "progress": False}
    rising = fit(model, Guide(), y, local_kl_weight=linear(0, 1), length_weight=3.0, **arguments)
    weights = [0, 0.25, 0.5, 0.75, 1]
    expected = [w * a + 3 * b for w, a, b in zip(weights, rising.kl_latents, rising.kl_lengths, strict=True)]
    assert rising.kl == pytest.approx(expected)
    assert min(rising.kl_latents[0], rising.kl_lengths[0]) > 0.1
    assert fit(model, Guide(), y, kl_weight=0.0, **arguments).kl == pytest.approx(
        [a + b for a, b in zip(rising.kl_latents, rising.kl_lengths, strict=True)]
    )


def test_a_large_length_weight_holds_the_law_at_the_prior(y):
    distances = []
    for weight in (1.0, 100.0):
        guide = AutoNested(masked_mean)
        fit(masked_mean, guide, y + 3, num_epochs=80, lr=0.1, length_weight=weight, progress=False)
        distances.append((guide.laws["mask"].probs - OrderedMask.geometric(0.5, K).probs).abs().max().item())
    assert distances[1] < 0.1 < distances[0]


def test_a_law_that_is_given_does_not_collapse(y):
    """Warnings are errors here: a length that is prescribed is none that was learned."""

    class Guide(PyroModule):
        def __init__(self, probs):
            super().__init__()
            self.probs, self.loc = probs, torch.nn.Parameter(torch.zeros(K))

        def forward(self, rows):
            with pyro.plate("data", len(rows)):
                pyro.sample("code", NestedNormal(self.loc, torch.ones(K), probs=self.probs))

    def model(rows):
        with pyro.plate("data", len(rows)):
            code = pyro.sample("code", NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)))
            pyro.sample("y", dist.Normal(code.sum(-1), 1.0), obs=rows)

    last = (torch.arange(K) == K - 1).to(y)
    fit(model, Guide(last), y, num_epochs=1, progress=False)
    with pytest.warns(LengthCollapseWarning, match="site 'code' has collapsed"):
        fit(model, Guide(torch.nn.Parameter(last)), y, num_epochs=1, progress=False)


# Optimiser and masks.


def test_clip_norm_bounds_the_step(y):
    def step_length(clip_norm):
        guide = MaskedMeanGuide()
        before = torch.cat([p.detach().clone() for p in guide.parameters()])
        fit(masked_mean, guide, y, num_epochs=1, lr=1.0, optimizer=torch.optim.SGD, clip_norm=clip_norm, progress=False)
        return (torch.cat([p.detach() for p in guide.parameters()]) - before).norm().item()

    assert step_length(None) > 1
    assert step_length(0.25) == pytest.approx(0.25, rel=1e-4)


def test_the_learning_rate_is_scheduled_over_all_steps(y):
    seen = []

    def optimizer(parameters, lr):
        made = torch.optim.SGD(parameters, lr=lr)
        made.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
        return made

    arguments = {"lr": 1e-3, "optimizer": optimizer, "lr_schedule": cosine_to_zero(0.25), "progress": False}
    fit(masked_mean, MaskedMeanGuide(), y, num_epochs=4, batch_size=10, **arguments)
    assert len(seen) == 16
    assert seen[:5] == pytest.approx([1e-3 * (0.01 + 0.99 * i / 4) for i in range(5)])
    assert seen[-1] == pytest.approx(5e-4 * (1 + math.cos(math.pi * 11 / 12)))


def test_temperature_reaches_every_mask_and_stays(y, labelled):
    guide = AutoNested(masked_mean)
    fit(masked_mean, guide, y, num_epochs=5, temperature=linear(1.0, 0.5), progress=False)
    assert guide[0].temperature == 0.5
    net = make_net()
    fit(NestedClassifier(net), net.guide, labelled, num_epochs=5, temperature=0.7, progress=False)
    assert net.widths["hidden"].temperature == 0.7


# Where masks come from.


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("masks", ["example", "batch"])
def test_lengths_are_paid_for_where_masks_are_learned_only(masks, num_particles, labelled):
    net = make_net(masks)
    schedule = MaskSchedule(learned=0.25, budget=0.5, full=0.25, num_particles=num_particles)
    arguments = {"schedule": schedule, "optimizer": still, "progress": False}
    epochs = 20 if masks == "example" else 200
    result = fit(NestedClassifier(net), net.guide, labelled, num_epochs=epochs, **arguments)
    width = net.widths["hidden"]
    kl = kl_divergence(width.law, width.prior).item() / (1 if masks == "example" else N)
    shares = torch.tensor(result.kl_lengths) / kl
    assert abs(shares.mean().item() - 0.25) < 3 * (0.25 * 0.75 / (20 * N if masks == "example" else 400)) ** 0.5
    assert list(result.lengths) == ["hidden.mask"]


@pytest.mark.parametrize("sliced", [False, True])
def test_every_width_is_trained_and_a_batch_has_one(sliced, labelled):
    net = make_net("batch")
    seen = []

    def note(layer, args):
        width = net.widths["hidden"]
        seen.append(width.kept if width.mask is None else int(width.mask.sum()))

    net.net[-1].register_forward_pre_hook(note)
    schedule = MaskSchedule(learned=0.0, budget=0.75, full=0.25, sliced=sliced)
    arguments = {"schedule": schedule, "progress": False}
    result = fit(NestedClassifier(net), net.guide, labelled, num_epochs=100, **arguments)
    seen = seen[1:]  # the first call, before the first step, is free
    assert set(seen) == {2, 4, 6, 8}
    assert 25 <= seen.count(8) <= 65  # 0.25 + 0.75 / 4 of 100
    assert sum(result.kl_lengths) == 0


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("masks", ["example", "batch"])
def test_sliced_particles_estimate_the_elbo_averaged_over_widths(masks, num_particles, labelled):
    net = make_net(masks)
    model, guide, probs = NestedClassifier(net), net.guide, torch.tensor([0.4, 0.3, 0.2, 0.1])
    schedule = MaskSchedule(0.0, 1.0, 0.0, OrderedMask(probs=probs), num_particles, sliced=True)
    arguments = {"schedule": schedule, "optimizer": still, "local_reparam": True, "progress": False}
    result = fit(model, guide, labelled, num_epochs=400, **arguments)
    expected = {"elbo": 0.0, "kl_latents": 0.0}
    for width, prob in zip((0.25, 0.5, 0.75, 1.0), probs, strict=True):
        with net.cut(width, sliced=True):
            law = OrderedMask(probs=(torch.arange(1, 5) == 4 * width).double())
            only = MaskSchedule(0.0, 1.0, 0.0, law, sliced=True)
            at_width = fit(model, guide, labelled, num_epochs=100, **arguments | {"schedule": only})
        for name in expected:
            expected[name] += prob.item() * sum(getattr(at_width, name)) / 100
    for name, value in expected.items():
        values = torch.tensor(getattr(result, name))
        error = (values.std() / 20).item()
        assert abs(values.mean().item() - value) < 4 * error + 0.003
        assert abs(values.mean().item() - 1.2 * value) > 4 * error + 0.003  # the check would see a wrong weight


def test_systematic_particles_have_less_variance(labelled):
    net, variances = make_net(), {}
    for num_particles in (1, 4):
        schedule = MaskSchedule(0.0, 1.0, 0.0, num_particles=num_particles, sliced=True)
        arguments = {"schedule": schedule, "optimizer": still, "local_reparam": True, "progress": False}
        result = fit(NestedClassifier(net), net.guide, labelled, num_epochs=100, **arguments)
        variances[num_particles] = torch.tensor(result.kl_latents).var().item()
    assert variances[4] < 1e-3 * variances[1]  # each step has every width once; independent draws would give a quarter


def test_a_mask_schedule_makes_narrow_widths_useful(labelled):
    # One mask for the whole data set: left alone, its law ends at one length, and the narrowest net is never trained.
    narrow = {}
    for masks in (None, MaskSchedule()):
        net = make_net("batch")
        with torch.no_grad():
            net.widths["hidden"].logits.copy_(torch.tensor([-6.0, -6.0, -6.0, 0.0]))
        model = NestedClassifier(net)
        fit(model, net.guide, labelled, num_epochs=100, lr=0.05, kl_weight=0.1, schedule=masks, progress=False)
        with net.cut(0.25):
            narrow[masks] = mean_log_likelihood(model, net.guide, list(labelled), N)
    assert narrow[MaskSchedule()] > narrow[None] + 0.1


class MaskedRows(PyroModule):
    """A model with a mask of its own for each row, perhaps beside a nested net, and its guide."""

    def __init__(self, net=None, wrap=lambda law: law):
        super().__init__()
        self.net, self.wrap, self.seen = net, wrap, []
        self.logits = nn.Parameter(torch.tensor([1.0, 0.0, -1.0, 0.5]))

    def forward(self, x, y):
        rows = pyro.plate("data", len(x), dim=-1)
        if self.net is not None:
            self.net(x, plate=rows)
        with rows:
            mask = pyro.sample("code", self.wrap(OrderedMask.uniform(K)))
            self.seen.append(mask.detach().sum(-1))
            pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=y.double())

    @cached_property
    def guide(self):
        return RowsGuide(self)


class RowsGuide(PyroModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        rows = pyro.plate("data", len(x), dim=-1)
        if self.model.net is not None:
            self.model.net.guide(x, plate=rows)
        with rows:
            pyro.sample("code", self.model.wrap(OrderedMaskStraightThrough(0.2, logits=self.model.logits)))


def test_masks_of_a_model_in_the_plate_of_the_data_are_cut(labelled):
    model = MaskedRows()
    schedule = MaskSchedule(learned=0.25, budget=0.5, full=0.25)
    result = fit(model, model.guide, labelled, num_epochs=50, schedule=schedule, optimizer=still, progress=False)
    law = OrderedMask(logits=model.logits.detach())
    share = sum(result.kl_lengths) / 50 / kl_divergence(law, OrderedMask.uniform(K)).item()
    assert abs(share - 0.25) < 3.5 * (0.25 * 0.75 / (50 * N)) ** 0.5
    # The lengths that the model sees are the mixture, those on record the law itself.
    seen = torch.bincount(torch.cat(model.seen[1:]).long(), minlength=K + 1)[1:]
    mixture = 0.25 * law.probs + 0.125 + torch.tensor([0.0, 0, 0, 0.25])
    z = (seen - 50 * N * mixture) / (50 * N * mixture * (1 - mixture)).sqrt()
    assert z.abs().max() < 3.5
    assert (seen - 50 * N * law.probs).abs().max() > 3.5 * (50 * N) ** 0.5
    assert result.lengths["code"].mean == pytest.approx(law.mean_length.item())


def test_masks_of_nets_are_cut_once_beside_those_of_the_model(labelled):
    net = make_net()
    model = MaskedRows(net)
    schedule = MaskSchedule(learned=0.25, budget=0.5, full=0.25)
    arguments = {"schedule": schedule, "optimizer": still, "progress": False}
    result = fit(model, model.guide, labelled, num_epochs=50, **arguments)
    width = net.widths["hidden"]
    kl = kl_divergence(width.law, width.prior).item()
    kl += kl_divergence(OrderedMask(logits=model.logits.detach()), OrderedMask.uniform(K)).item()
    share = sum(result.kl_lengths) / 50 / kl
    assert abs(share - 0.25) < 3.5 * (0.25 * 0.75 / (50 * N)) ** 0.5
    assert set(result.lengths) == {"hidden.mask", "code"}


def test_masks_that_are_wrapped_are_not_cut(labelled):
    model = MaskedRows(wrap=lambda law: law.mask(torch.tensor(True)))
    with pytest.raises(ValueError, match="`schedule` needs a NestedNet in model or guide"):
        fit(model, model.guide, labelled, num_epochs=1, schedule=MaskSchedule(), progress=False)


def test_local_reparam_trains_with_the_same_kl(labelled):
    results = []
    for local_reparam in (False, True):
        net = make_net()
        arguments = {"local_reparam": local_reparam, "optimizer": still, "progress": False}
        results.append(fit(NestedClassifier(net), net.guide, labelled, num_epochs=50, **arguments))
    plain, local = results
    assert local.kl_latents == pytest.approx(plain.kl_latents)
    mean = [torch.tensor(result.log_likelihood) for result in results]
    z = (mean[0].mean() - mean[1].mean()) / ((mean[0].var() + mean[1].var()) / 50).sqrt()
    assert abs(z) < 3.5


def test_all_options_together_learn(labelled):
    net = make_net()
    result = fit(
        NestedClassifier(net),
        net.guide,
        labelled,
        num_epochs=60,
        batch_size=20,
        lr=0.03,
        lr_schedule=cosine_to_zero(),
        clip_norm=100.0,
        kl_weight=linear(0.0, 0.1, warmup=0.5),
        temperature=linear(0.5, 0.2),
        schedule=MaskSchedule(),
        local_reparam=True,
        validation=labelled,
        progress=False,
    )
    assert result.validation_log_likelihood[0] < -0.6 < -0.35 < result.validation_log_likelihood[-1]


# Validation.


def test_validation_is_the_log_likelihood_a_row(y):
    guide = MaskedMeanGuide()
    with torch.no_grad():
        guide.logits.copy_(torch.tensor([-1e3, 1e3, -1e3, -1e3]))
    value = mean_log_likelihood(masked_mean, guide, [y], 7)
    # w_1 + w_2 ~ N(2, 2 * 0.3^2): six draws of it, one a batch.
    expected = dist.Normal(2.0, 1.0).log_prob(y).mean().item() - 0.09
    assert value == pytest.approx(expected, abs=0.5)
    assert value != mean_log_likelihood(masked_mean, MaskedMeanGuide(), [y], 7)


def test_validation_ignores_the_scale_of_a_plate_for_more_rows(y):
    def model(rows):
        mu = pyro.sample("mu", dist.Delta(torch.tensor(0.5)))
        with pyro.plate("data", 10 * N, subsample_size=len(rows)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=rows)
        pyro.factor("elsewhere", torch.tensor(-100.0))

    expected = dist.Normal(0.5, 1.0).log_prob(y).mean().item()
    assert mean_log_likelihood(model, lambda rows: None, [y], 7) == pytest.approx(expected)


class Normalised(PyroModule):
    """A model with buffers that change in training, and random numbers of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.linear = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1)
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        loc = self.linear(self.dropout(self.norm(x[:, :3]))).squeeze(-1)
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, scale), obs=x[:, 3])


def test_validation_disturbs_nothing():
    x, states = torch.randn(N, 4), []
    for validation in (None, torch.randn(17, 4)):
        torch.manual_seed(1)
        model = Normalised()
        guide = AutoNormal(model)
        arguments = {"num_epochs": 4, "batch_size": 10, "validation": validation, "progress": False}
        result = fit(model, guide, x, **arguments)
        states.append({**model.state_dict(), **guide.state_dict()})
        assert len(result.validation_log_likelihood) == (0 if validation is None else 4)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] | states[1])
    # Four steps in training mode, then the validation data in two batches, in evaluation mode.
    assert model.modes[-6:] == [True] * 4 + [False] * 2


def test_modes_are_those_of_before_after_a_fit():
    model = Normalised()
    model.norm.eval()
    fit(model, AutoNormal(model), torch.randn(N, 4), num_epochs=1, progress=False)
    assert all(model.modes[1:])
    assert model.training
    assert not model.norm.training
    assert model.dropout.training


def test_progress_shows_validation(y, capsys):
    fit(masked_mean, MaskedMeanGuide(), y, num_epochs=1, validation=y)
    assert "validation=" in capsys.readouterr().err


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length_weight": math.nan}, "`length_weight` must be finite and >= 0; got nan"),
        ({"kl_weight": lambda t: -t}, "`kl_weight` must be finite and >= 0; got -0.1"),
        ({"temperature": 0.0}, "`temperature` must be finite and > 0"),
        ({"clip_norm": 0.0}, "`clip_norm` must be finite and > 0, or None; got 0.0"),
        (
            {"schedule": MaskSchedule()},
            r"`schedule` needs a NestedNet in model or guide, or a NestedNormal or an OrderedMask in the plate .data.",
        ),
        ({"temperature": 0.5}, "`temperature` is for masks of AutoNested or a nested net; there are none"),
        ({"local_reparam": True, "elbo": Trace_ELBO()}, "needs a NestedELBO; Trace_ELBO scores weights"),
        ({"validation": torch.ones(3, 2)}, r"must be like `data` of shapes \[\(40,\)\]; got \[\(3, 2\)\]"),
        ({"validation": torch.tensor([math.nan])}, r"`validation\[0\]` of shape \(1,\) must be finite"),
        ({"resume": True}, "`resume` needs the `checkpoint`"),
        ({"checkpoint": "/nowhere/at/all.pt"}, "`checkpoint` is '/nowhere/at/all.pt', whose folder does not exist"),
    ],
)
def test_bad_arguments(arguments, message, y):
    with pytest.raises(ValueError, match=message):
        fit(masked_mean, MaskedMeanGuide(), y, num_epochs=11, progress=False, **arguments)
