"""Steps of the optimiser: clipped, scheduled, with local noise, and all together."""

import math

import pytest
import torch
from masked_mean import MaskedMeanGuide, make_net, masked_mean, still

from pyro_vnd.infer import KLWeights, MaskSchedule, NestedELBO, OptimizerSettings, cosine_to_zero, fit, linear
from pyro_vnd.nn import NestedClassifier


@pytest.mark.filterwarnings("ignore:the law of lengths")  # so long a step collapses it
def test_clip_norm_bounds_the_step(y):
    def step_length(clip_norm):
        guide = MaskedMeanGuide()
        before = torch.cat([p.detach().clone() for p in guide.parameters()])
        fit(
            masked_mean,
            guide,
            y,
            num_epochs=1,
            lr=1.0,
            optimizer=OptimizerSettings(torch.optim.SGD, clip_norm=clip_norm),
            progress=False,
        )
        return (torch.cat([p.detach() for p in guide.parameters()]) - before).norm().item()

    assert step_length(None) > 1
    assert step_length(0.25) == pytest.approx(0.25, rel=1e-4)


def test_the_learning_rate_is_scheduled_over_all_steps(y):
    seen = []

    def optimizer(parameters, lr):
        made = torch.optim.SGD(parameters, lr=lr)
        made.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
        return made

    arguments = {
        "lr": 1e-3,
        "optimizer": OptimizerSettings(optimizer, lr_schedule=cosine_to_zero(0.25)),
        "progress": False,
    }
    fit(masked_mean, MaskedMeanGuide(), y, num_epochs=4, batch_size=10, **arguments)
    assert len(seen) == 16
    assert seen[:5] == pytest.approx([1e-3 * (0.01 + 0.99 * i / 4) for i in range(5)])
    assert seen[-1] == pytest.approx(5e-4 * (1 + math.cos(math.pi * 11 / 12)))


def test_local_reparam_trains_with_the_same_kl(labelled):
    results = []
    for local_reparam in (False, True):
        net = make_net()
        arguments = {"elbo": NestedELBO(local_reparam=local_reparam), "optimizer": still, "progress": False}
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
        optimizer=OptimizerSettings(lr_schedule=cosine_to_zero(), clip_norm=100.0),
        weights=KLWeights(latents=linear(0.0, 0.1, warmup=0.5)),
        schedule=MaskSchedule(temperature=linear(0.5, 0.2)),
        elbo=NestedELBO(local_reparam=True),
        validation=labelled,
        progress=False,
    )
    assert result.validation_log_likelihood[0] < -0.6 < -0.35 < result.validation_log_likelihood[-1]
