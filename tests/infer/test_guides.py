"""The automatic guide: which law each mask site gets, how plates share it, and that SVI trains it."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import AutoNested, OptimizerSettings, cosine_to_zero, fit, module_local_params

K = 4


def two_masks(x, y):
    """Masks and Normal sites interleaved."""
    first = pyro.sample("first", OrderedMask.uniform(K))
    w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
    second = pyro.sample("second", OrderedMask.geometric(0.5, K))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ (first * w) + b * second.sum(-1), 1.0), obs=y)


def groups(y, subsample_size=None):
    """A mask for each row of a plate."""
    with pyro.plate("groups", len(y), subsample_size=subsample_size) as rows:
        mask = pyro.sample("mask", OrderedMask.uniform(K))
        pyro.sample("y", dist.Normal(mask.sum(-1), 0.5), obs=y[rows])


@pytest.fixture
def regression():
    return torch.randn(20, K), torch.randn(20)


def test_starts_at_the_law_of_the_model(regression):
    guide = AutoNested(two_masks)
    guide(*regression)
    torch.testing.assert_close(guide.laws["first"].probs, OrderedMask.uniform(K).probs)
    torch.testing.assert_close(guide.laws["second"].probs, OrderedMask.geometric(0.5, K).probs)


def test_noise_and_temperature_by_site(regression):
    guide = AutoNested(two_masks, noise={"first": "gumbel"}, temperature={"second": 0.7})
    nodes = poutine.trace(guide).get_trace(*regression).nodes
    assert type(nodes["first"]["fn"]) is OrderedMaskStraightThrough
    assert (nodes["first"]["fn"].noise, nodes["first"]["fn"].temperature) == ("gumbel", 0.2)
    assert (nodes["second"]["fn"].noise, nodes["second"]["fn"].temperature) == ("logistic", 0.7)


def test_sites_keep_the_order_of_the_model(regression):
    # TraceMeanField_ELBO warns, which is an error here, where the order differs.
    guide = AutoNested(two_masks, latents="mean_field")
    TraceMeanField_ELBO().differentiable_loss(two_masks, guide, *regression)
    nodes = [
        name for name in poutine.trace(guide).get_trace(*regression).nodes if name in {"first", "w", "second", "b"}
    ]
    assert nodes == ["first", "w", "second", "b"]


@pytest.mark.parametrize("base", [AutoMultivariateNormal, partial(AutoNormal, init_scale=0.01)])
def test_other_sites_go_to_the_autoguide_of_choice(base, regression):
    guide = AutoNested(two_masks, base=base)
    draw = guide(*regression)
    assert set(draw) == {"first", "w", "second", "b"}
    wanted = getattr(base, "func", base)
    assert [type(part) for part in guide].count(wanted) == 1


def test_weights_of_sites_cannot_go_to_an_autoguide_of_choice(regression):
    def model(x, y):
        pyro.sample("first", OrderedMask.uniform(3))
        pyro.sample("w", dist.Normal(0.0, 1.0), infer={"kl_weight": 0.5})

    with pytest.raises(
        ValueError, match=r"sites \['w'\] have weights of KLs in `infer`, which cannot be told apart in"
    ):
        AutoNested(model, base=AutoNormal)(*regression)


@pytest.mark.parametrize("noise", ["logistic", "gumbel"])
def test_every_parameter_gets_a_gradient(noise, regression):
    guide = AutoNested(two_masks, noise=noise, latents="mean_field")
    with module_local_params(guide):
        TraceMeanField_ELBO()(two_masks, guide)(*regression).backward()
    gradients = {name: p.grad for name, p in guide.named_parameters()}
    assert len(gradients) == 6
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


def test_a_law_for_each_row_of_a_plate():
    y = torch.tensor([1.0, 2.0, 3.0, 4.0])
    guide = AutoNested(groups, latents="mean_field")
    fit(
        groups,
        guide,
        y,
        plate="groups",
        num_epochs=500,
        lr=0.05,
        optimizer=OptimizerSettings(lr_schedule=cosine_to_zero()),
        progress=False,
    )
    law = guide.laws["mask"]
    assert law.batch_shape == (4,)
    # Exact posterior of each row: p_k proportional to N(y; k, .5).
    exact = dist.Normal(torch.arange(1.0, K + 1), 0.5).log_prob(y.unsqueeze(-1)).softmax(-1)
    assert (law.probs - exact).abs().sum(-1).max() / 2 < 0.15


def test_rows_of_a_shared_plate_have_one_law_and_a_mask_each():
    y = torch.full((200,), 2.4)
    guide = AutoNested(groups, shared_plates=["groups"])
    masks = guide(y)["mask"]
    assert guide.laws["mask"].batch_shape == (1,)
    assert masks.shape == (200, K)
    assert masks.sum(-1).unique().tolist() == [1, 2, 3, 4]


def test_subsampled_plate_keeps_a_law_for_every_row():
    y = torch.arange(6.0)
    guide = AutoNested(groups)
    assert guide(y, subsample_size=2)["mask"].shape == (2, K)
    assert guide.laws["mask"].batch_shape == (6,)


def test_a_length_the_prior_rules_out_stays_ruled_out():
    def model():
        mask = pyro.sample("mask", OrderedMask(probs=torch.tensor([0.5, 0.0, 0.5])))
        pyro.sample("y", dist.Normal(mask.sum(-1), 0.1), obs=torch.tensor(2.0))

    guide = AutoNested(model, latents="mean_field")
    with module_local_params(guide):
        elbo = TraceMeanField_ELBO()(model, guide)
        elbo()
        optimizer = torch.optim.Adam(elbo.parameters(), lr=0.1)
        for _ in range(50):
            optimizer.zero_grad()
            loss = elbo()
            loss.backward()
            optimizer.step()
    assert torch.isfinite(loss)
    assert guide.laws["mask"].probs[1] == 0


def test_a_mask_with_more_event_dimensions():
    def model():
        pyro.sample("mask", OrderedMask.uniform(K).expand([3]).to_event(1))

    guide = AutoNested(model)
    assert guide()["mask"].shape == (3, K)
    assert torch.isfinite(TraceMeanField_ELBO().differentiable_loss(model, guide))


def test_quantiles_are_those_of_the_length():
    def model():
        pyro.sample("mask", OrderedMask(probs=torch.tensor([0.1, 0.3, 0.4, 0.2])))

    guide = AutoNested(model)
    guide()
    # P(L <= k) = .1 .4 .8 1
    masks = guide.quantiles([0.05, 0.3, 0.5, 0.9])["mask"]
    assert masks.sum(-1).tolist() == [1, 2, 3, 4]
    assert guide.median()["mask"].sum() == 3


def test_svi_with_the_global_store_trains_the_same_guide():
    y = torch.tensor([1.0, 2.0, 3.0, 4.0])
    guide = AutoNested(groups, latents="mean_field")
    svi = SVI(groups, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(300):
        svi.step(y)
    assert guide.laws["mask"].mode.sum(-1).tolist() == [1, 2, 3, 4]


def test_state_dict_round_trip(regression):
    guide, copy = AutoNested(two_masks), AutoNested(two_masks)
    with module_local_params(guide, copy):
        guide(*regression), copy(*regression)
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.normal_()
        copy.load_state_dict(guide.state_dict())
    torch.testing.assert_close(copy.laws["first"].probs, guide.laws["first"].probs)
    assert not torch.allclose(copy.laws["first"].probs, OrderedMask.uniform(K).probs)


def test_guides_of_one_name_do_not_share_values_under_local_parameters(regression):
    first, second = AutoNested(two_masks), AutoNested(two_masks)
    fit(two_masks, first, regression, num_epochs=20, lr=0.1, progress=False)
    with module_local_params(first, second):
        first(*regression), second(*regression)
    assert not torch.allclose(first.laws["first"].probs, second.laws["first"].probs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": {"frist": "gumbel"}}, r"`noise` names \['frist'\]; mask sites of the model: \['first', 'second'\]"),
        ({"temperature": {"w": 0.1}}, r"`temperature` names \['w'\]"),
        ({"shared_plates": ["rows"]}, r"`shared_plates` names \['rows'\]; plates of the model: \[\]"),
    ],
)
def test_unknown_names_are_errors(arguments, message, regression):
    with pytest.raises(ValueError, match=message):
        AutoNested(two_masks, **arguments)(*regression)


def test_a_kind_of_latents_that_there_is_not_is_an_error():
    with pytest.raises(ValueError, match="`latents` must be 'conditional', 'mean_field' or None; got 'meanfield'"):
        AutoNested(two_masks, latents="meanfield")


def test_a_guide_is_true_and_says_what_it_has(regression):
    guide = AutoNested(two_masks, latents="mean_field")
    assert guide
    assert len(guide) == 0
    assert repr(guide) == "AutoNested(not called yet)"
    guide(*regression)
    assert guide
    first = "first: E[L] = 2.5, sd[L] = 1.1, modes 1-4 of 4; entropy 1.39 nats"
    assert repr(guide).startswith(f"AutoNested({first}; w: AutoNormal; second: E[L] = 1.9")
    assert repr(guide).endswith("; b: AutoNormal; mean field)")


def test_a_guide_of_many_masks_is_still_short_in_print():
    def model():
        for i in range(40):
            pyro.sample(f"mask{i}", OrderedMask.uniform(K))

    guide = AutoNested(model)
    guide()
    ninth = "; mask9: E[L] = 2.5, sd[L] = 1.1, modes 1-4 of 4; entropy 1.39 nats; and 30 more"
    assert repr(guide).endswith(f"{ninth})")
    mean_field = AutoNested(model, latents="mean_field")
    mean_field()
    assert repr(mean_field).endswith(f"{ninth}; mean field)")


def test_a_model_without_masks_is_an_error():
    with pytest.raises(ValueError, match="no latent OrderedMask"):
        AutoNested(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))()
