"""Where values have their rows, and which models a conditional guide takes."""

import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyro_vnd.distributions import OrderedMask, RelaxedOrderedMask
from pyro_vnd.infer import AutoNested
from pyro_vnd.infer._conditional.layout import Latent

ROWS, UNITS, INNER = 5, 3, 2


def frames(*named: tuple[str, int, int]) -> list[SimpleNamespace]:
    return [SimpleNamespace(name=name, dim=dim, size=size) for name, dim, size in named]


@pytest.mark.parametrize(
    ("batch", "event", "plates", "rows"),
    [
        ((), (), [], []),
        ((), (4, 2), [], []),
        ((UNITS,), (), [("units", -1, UNITS)], []),
        ((ROWS,), (4,), [("data", -1, ROWS)], ["data"]),
        ((ROWS, UNITS), (4,), [("data", -2, ROWS), ("units", -1, UNITS)], ["data"]),
        ((UNITS, ROWS), (), [("data", -1, ROWS), ("units", -2, UNITS)], ["data"]),
        ((UNITS, ROWS, INNER), (2,), [("units", -3, UNITS), ("data", -2, ROWS), ("inner", -1, INNER)], ["data"]),
        ((ROWS, UNITS), (), [("data", -2, ROWS), ("more", -1, UNITS)], ["data", "more"]),
    ],
)
@pytest.mark.parametrize("lead", [(), (7,), (7, 6)])
def test_a_value_is_made_of_its_coordinates_and_back(batch, event, plates, rows, lead):
    fn = dist.Normal(torch.zeros(batch + event), 1.0).to_event(len(event))
    latent = Latent("w", fn, frames(*plates), frozenset(rows))
    assert latent.size * math.prod(f.size for f in frames(*plates) if f.name in rows) == math.prod(batch + event)
    value = torch.randn(lead + batch + event)
    coordinates = latent.collect(value)
    assert coordinates.shape[-1] == latent.size
    assert torch.equal(latent.place(coordinates).reshape(value.shape), value)
    # A row has its own entries, and no other: mark one.
    if rows == ["data"]:
        marked = torch.zeros(batch + event)
        marked.select(len(batch) + {name: dim for name, dim, _ in plates}["data"], 2).fill_(1)
        found = latent.collect(marked)
        assert found.sum() == latent.size
        assert (found.reshape(-1, latent.size).sum(-1) > 0).sum() == 1


def plain(y: Tensor) -> None:
    mask = pyro.sample("mask", OrderedMask.uniform(3))
    pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=y)


def many(y: Tensor) -> None:
    for i in range(3):
        pyro.sample(f"mask{i}", OrderedMask.uniform(100))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def counts(y: Tensor) -> None:
    pyro.sample("mask", OrderedMask.uniform(3))
    pyro.sample("n", dist.Poisson(3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def layers(y: Tensor) -> None:
    with pyro.plate("layers", 2):
        mask = pyro.sample("mask", OrderedMask.uniform(3))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mask.sum(), 1.0), obs=y)


def together(y: Tensor) -> None:
    mask = pyro.sample("mask", OrderedMask.uniform(3).expand([2]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mask.sum(), 1.0), obs=y)


def some_rows(y: Tensor) -> None:
    with pyro.plate("data", len(y), subsample_size=2) as i:
        mask = pyro.sample("mask", OrderedMask.uniform(3))
        pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=y[i])


def soft(y: Tensor) -> None:
    mask = pyro.sample("mask", RelaxedOrderedMask(0.5, logits=torch.zeros(3)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=y)


def two_plates(y: Tensor) -> None:
    for name in "ab":
        with pyro.plate(name, len(y)):
            mask = pyro.sample(f"mask_{name}", OrderedMask.uniform(3))
            pyro.sample(f"y_{name}", dist.Normal(mask.sum(-1), 1.0), obs=y)


def outside(y: Tensor) -> None:
    mask = pyro.sample("mask", OrderedMask.uniform(3).expand([2]))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mask.sum(), 1.0), obs=y)


def large(y: Tensor) -> None:
    mask = pyro.sample("mask", OrderedMask.uniform(256))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mask.sum(-1), 1.0).expand([2**12]).to_event(1), obs=y[:, None].expand(-1, 2**12))


@pytest.mark.parametrize(
    ("model", "arguments", "reason"),
    [
        (many, {}, r"1e\+06 combinations of lengths are more than 256"),
        (layers, {}, "site 'mask' has several masks, in a plate without data"),
        (together, {}, "site 'mask' has several masks, of shape"),
        (some_rows, {}, "plate 'data' of site 'mask' subsamples"),
        (soft, {}, "there is no mask"),
        (two_plates, {}, "masks are in several plates"),
        (outside, {}, "site 'mask' has several masks outside plates"),
        (large, {"num_draws": 5}, r"2\.1e\+07 observed numbers in a step, over all lengths, are more than 1\.7e\+07"),
        (plain, {"temperature": 0.5}, "argument `temperature` is for mean field"),
        (plain, {"noise": "gumbel"}, "argument `noise` is for mean field"),
    ],
)
def test_what_does_not_fit_is_mean_field_and_says_why_if_it_may_not_be(model, arguments, reason):
    y = torch.zeros(4)
    guide = AutoNested(model, **arguments)
    guide(y)  # there is no other latent, or it is asked for: no warning
    assert guide.conditional is None
    with pytest.raises(ValueError, match=rf"AutoNested: argument `latents` must be 'mean_field' here.*{reason}"):
        AutoNested(model, latents="conditional", **arguments)(y)


def test_mean_field_that_nobody_asked_for_is_a_warning():
    def model(y: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        many(y)

    y = torch.zeros(4)
    with pytest.warns(UserWarning, match=r"AutoNested: w and the lengths are independent here, mean field, as 1e\+06"):
        AutoNested(model)(y)
    AutoNested(model, latents="mean_field")(y)


def test_starts_are_those_that_were_given_in_both_families():
    y = torch.zeros(4)
    starts = {}
    for latents in ("conditional", "mean_field"):
        start = init_to_value(values={"w": torch.tensor(2.5)})
        guide = AutoNested(plain, latents=latents, init_loc_fn=start)
        guide(y)
        torch.manual_seed(0)
        starts[latents] = guide.median(y)["w"]
    assert starts["conditional"] == pytest.approx(2.5, abs=0.02)
    assert starts["mean_field"] == 2.5


def test_a_discrete_latent_is_for_enumeration():
    with pytest.raises(ValueError, match="site 'n' is discrete"):
        AutoNested(counts, latents="conditional")(torch.zeros(4))


def test_the_choice_is_in_print_and_mean_field_can_be_had():
    y = torch.zeros(4)
    guide, chosen = AutoNested(plain), AutoNested(plain, latents="mean_field")
    guide(y)
    chosen(y)
    assert repr(guide).endswith("w: a Normal for each of 3 lengths)")
    assert "w: AutoNormal" in repr(chosen)


@pytest.mark.parametrize("latents", ["diagonal", True])
def test_other_families_are_refused(latents):
    with pytest.raises(ValueError, match="AutoNested: argument `latents` must be 'conditional', 'mean_field' or None"):
        AutoNested(plain, latents=latents)


@pytest.mark.parametrize("num_draws", [0, 2.5, True])
def test_the_number_of_draws_is_checked(num_draws):
    with pytest.raises(ValueError, match="AutoNested: argument `num_draws` must be an integer >= 1"):
        AutoNested(plain, num_draws=num_draws)
