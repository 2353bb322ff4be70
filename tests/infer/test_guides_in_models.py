"""The automatic guide in models of groups, where each has an order of its own, and with masks that are enumerated."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor

from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import AutoNested, OptimizerSettings, cosine_to_zero, fit

K, NUM_GROUPS, NUM_ROWS = 6, 5, 40
ORDERS = [1, 4, 2, 6, 3]
NOISE = 0.3
COLLAPSE = "ignore:the law of lengths at site 'mask' has collapsed"  # that is what is inferred


def simulate(orders: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs, shape (groups, rows, K), and targets of a regression in each group on its first inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(NUM_GROUPS, NUM_ROWS, K, generator=generator)
    kept = (torch.arange(K) < torch.tensor(orders).unsqueeze(-1)).double()
    signs = 1.0 - 2.0 * (torch.arange(K) % 2)
    y = (x * (kept * signs).unsqueeze(-2)).sum(-1)
    return x, y + NOISE * torch.randn(NUM_GROUPS, NUM_ROWS, generator=generator)


def a_mask_for_each_group(x: Tensor, y: Tensor) -> None:
    """Regressions with coefficients and an order of their own."""
    with pyro.plate("groups", len(x), dim=-2):
        mask = pyro.sample("mask", OrderedMask.geometric(0.5, K))
        w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        with pyro.plate("rows", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal((x * (mask * w)).sum(-1), NOISE), obs=y)


def a_mask_for_each_row(x: Tensor, y: Tensor) -> None:
    """Regressions in which each row draws an order from the law of its group."""
    with pyro.plate("groups", len(x), dim=-2):
        w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        with pyro.plate("rows", x.shape[1], dim=-1):
            mask = pyro.sample("mask", OrderedMask.geometric(0.5, K))
            pyro.sample("y", dist.Normal((x * (mask * w)).sum(-1), NOISE), obs=y)


def lengths(guide: AutoNested) -> list[int]:
    return guide.laws["mask"].mode.sum(-1).flatten().int().tolist()


@pytest.mark.filterwarnings(COLLAPSE)
@pytest.mark.parametrize("orders", [ORDERS, ORDERS[::-1]])
@pytest.mark.parametrize(
    ("model", "shared"), [(a_mask_for_each_group, []), (a_mask_for_each_row, ["rows"])], ids=["group", "row"]
)
def test_each_group_has_its_order(model, shared: list[str], orders: list[int]):
    guide = AutoNested(model, shared_plates=shared)
    fit(
        model,
        guide,
        simulate(orders),
        num_epochs=400,
        lr=0.05,
        optimizer=OptimizerSettings(lr_schedule=cosine_to_zero()),
        progress=False,
    )
    assert guide.laws["mask"].batch_shape == (NUM_GROUPS, 1)
    assert lengths(guide) == orders


@pytest.mark.filterwarnings(COLLAPSE)
@pytest.mark.parametrize("orders", [ORDERS, ORDERS[::-1]])
def test_enumerated_in_a_plate(orders: list[int]):
    """All lengths of all groups at once, without noise."""
    model = config_enumerate(a_mask_for_each_group)
    guide = AutoNested(model)
    elbo = TraceEnum_ELBO(max_plate_nesting=2)
    fit(
        model,
        guide,
        simulate(orders),
        num_epochs=250,
        lr=0.05,
        optimizer=OptimizerSettings(lr_schedule=cosine_to_zero()),
        elbo=elbo,
        progress=False,
    )
    assert lengths(guide) == orders


def one_order_for_all_groups(x: Tensor, y: Tensor) -> None:
    """Known coefficients, so that the posterior of the one order is exact."""
    mask = pyro.sample("mask", OrderedMask.geometric(0.7, K))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((0.3 * x * mask).sum(-1), 1.0), obs=y)


def exact_law(x: Tensor, y: Tensor) -> Tensor:
    scores = [dist.Normal(0.3 * x[:, :k].sum(-1), 1.0).log_prob(y).sum() for k in range(1, K + 1)]
    return (OrderedMask.geometric(0.7, K).logits + torch.stack(scores)).softmax(-1)


@pytest.mark.parametrize("mark", ["parallel", "sequential"])
def test_an_enumerated_law_is_exact(mark: str):
    """To .01 in total variation, from which the prior, where it starts, is far."""
    x = torch.randn(25, K)
    y = 0.3 * x[:, :3].sum(-1) + torch.randn(25)
    exact = exact_law(x, y)
    assert (exact > 0.05).sum() >= 3
    settings = {
        "num_epochs": 100,
        "lr": 0.1,
        "optimizer": OptimizerSettings(lr_schedule=cosine_to_zero()),
        "progress": False,
    }
    model = config_enumerate(one_order_for_all_groups, mark)
    guide = AutoNested(model)
    fit(model, guide, [x, y], elbo=TraceEnum_ELBO(max_plate_nesting=1), **settings)
    assert (guide.laws["mask"].probs - exact).abs().sum() / 2 < 0.01
    assert (OrderedMask.geometric(0.7, K).probs - exact).abs().sum() / 2 > 0.1


@pytest.mark.parametrize(
    ("mark", "law", "kept"),
    [(lambda model: model, OrderedMaskStraightThrough, None), (config_enumerate, OrderedMask, "parallel")],
)
def test_the_mark_of_a_site_decides(mark, law: type, kept: str | None):
    guide = AutoNested(mark(one_order_for_all_groups), latents="mean_field")
    node = poutine.trace(guide).get_trace(torch.randn(4, K), torch.randn(4)).nodes["mask"]
    assert type(node["fn"]) is law
    assert node["infer"].get("enumerate") == kept


def test_an_enumerated_mask_wants_an_elbo_that_enumerates():
    x, y = torch.randn(4, K), torch.randn(4)
    model = config_enumerate(one_order_for_all_groups)
    with pytest.raises(NotImplementedError, match="site 'mask' of the guide must be reparameterised"):
        fit(model, AutoNested(model, latents="mean_field"), [x, y], num_epochs=1, progress=False)
