"""What sites are in ArviZ: reparameterised ones deterministic, with any names, all of them or some."""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import Y, conjugate, posterior
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import AutoReparam, HaarReparam, LocScaleReparam, SplitReparam, TransformReparam
from pyro.nn import PyroModule

from pyro_vnd.diagnostics import compare, khat_by_row, loo, plot_keep_probs, plot_length_posterior, summary, to_arviz
from pyro_vnd.diagnostics import sbc as rank
from pyro_vnd.diagnostics.posterior._arviz import dataset, datasets
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested


def nested(y):
    """Latents outside of plates, in one and in two of them, scalars and vectors."""
    mask = pyro.sample("mask", OrderedMask.uniform(3))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    w = pyro.sample("w", dist.Normal(torch.zeros(4), scale).to_event(1))
    with pyro.plate("group", 2, dim=-2):
        shift = pyro.sample("shift", dist.Normal(0.0, scale))
        with pyro.plate("row", 3, dim=-1):
            local = pyro.sample("local", dist.Normal(shift, scale))
            pyro.sample("y", dist.Normal(local + mask.sum(-1) + w.sum(-1), 1.0), obs=y)


LOC_SCALE = {name: LocScaleReparam(0.0) for name in ("w", "shift", "local")}


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # of guides that were not trained
@pytest.mark.parametrize("predictive", [True, False])
@pytest.mark.parametrize("base", [None, AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize(
    ("config", "changed"),
    [
        (LOC_SCALE, {"w": "w_decentered", "shift": "shift_decentered", "local": "local_decentered"}),
        ({"scale": TransformReparam()}, {"scale": "scale_base"}),
        (AutoReparam(centered=0.5), {"w": "w_decentered", "shift": "shift_decentered", "local": "local_decentered"}),
    ],
    ids=["LocScale", "Transform", "Auto"],
)
def test_reparameterised_sites_are_deterministic(config, changed, base, predictive):
    model, y = poutine.reparam(nested, config), torch.randn(2, 3)
    data = to_arviz(model, AutoNested(model, base=base), y, num_samples=30, num_prior=10, predictive=predictive)
    latents = {"mask", "mask_length", "scale", "w", "shift", "local", *changed.values()}
    assert latents <= set(data.posterior.data_vars) == set(data.prior.data_vars)
    for group in ("observed_data", "log_likelihood", *(("posterior_predictive", "prior_predictive") * predictive)):
        assert set(dataset(data, group).data_vars) == {"y"}, group
    assert data.posterior["local"].dims == ("chain", "draw", "group", "row")
    assert data.posterior["w"].dims == ("chain", "draw", "w_dim_0")
    if "shift" in changed and isinstance(config, dict):  # it is the function that it is
        for draws in (data.posterior, data.prior):
            shift = draws["scale"].values[..., None, None] * draws["shift_decentered"].values
            np.testing.assert_allclose(draws["shift"].values, shift)
    assert loo(data, force=True).n_data_points == 6  # no name of a site is needed


class WithMask(PyroModule):
    """A Normal guide beside the prior of the mask, for improper laws, from which `AutoNested` cannot start."""

    def __init__(self, model):
        super().__init__()
        self.others = AutoNormal(poutine.block(model, hide=["mask"]))

    def forward(self, y):
        pyro.sample("mask", OrderedMask.uniform(3))
        self.others(y)


@pytest.mark.parametrize(
    ("reparam", "latents"),
    [(SplitReparam([1, 3], dim=-1), ["w_split_0", "w_split_1"]), (HaarReparam(dim=-1), ["w_haar"])],
)
def test_points_that_have_the_density_of_their_site_are_no_data(reparam, latents):
    model = poutine.reparam(nested, {"w": reparam})
    data = to_arviz(model, WithMask(model), torch.randn(2, 3), num_samples=30)
    assert {"w", *latents} <= set(data.posterior.data_vars)
    assert set(data.log_likelihood.data_vars) == {"y"}
    assert set(data.posterior_predictive.data_vars) == {"y"}
    draws = {name: torch.tensor(data.posterior[name].values[0]) for name in ("w", "scale", "shift", "local")}
    log_p = data.log_likelihood["y"].sum(["group", "row"]).values[0] - np.log(3.0)
    log_p += dist.LogNormal(0.0, 0.1).log_prob(draws["scale"]).numpy()
    scale = draws["scale"][:, None, None]
    for value, mean in ((draws["w"][:, None], 0.0), (draws["shift"], 0.0), (draws["local"], draws["shift"])):
        log_p += dist.Normal(mean, scale).log_prob(value).sum((-1, -2)).numpy()
    np.testing.assert_allclose(data.sample_stats["log_p"].values[0], log_p)


def test_comparison_of_a_model_with_its_reparameterisation():
    def centred(y=Y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    decentred = poutine.reparam(centred, {"z": LocScaleReparam(0.0)})

    def guide(y=Y):
        pyro.sample("z_decentered", dist.Normal(Y.sum() / 6, 6**-0.5))

    data = {"z": to_arviz(centred, posterior, Y, num_samples=200), "noise": to_arviz(decentred, guide, num_samples=200)}
    table = compare(data)
    assert table["elpd"]["z"] == pytest.approx(table["elpd"]["noise"], abs=0.1)


def scoped(y):
    with scope(prefix="block"):
        mask = pyro.sample("mask", OrderedMask.uniform(4))
        with pyro.plate("block/rows:all", len(y)):
            z = pyro.sample("z:local", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + mask.sum(-1), 1.0), obs=y)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_slashes_and_colons_become_dots(tmp_path):
    y = torch.randn(5)
    how = {"dims": {"block/mask": ["block/unit"], "x/y": ["block/rows:all"]}, "constant_data": {"x/y": y}}
    data = to_arviz(scoped, AutoNested(scoped), y, num_samples=50, coords={"block/rows:all": np.arange(10, 15)}, **how)
    assert set(data.posterior.data_vars) == {"block.mask", "block.mask_length", "block.z.local"}
    assert data.posterior["block.mask"].dims == ("chain", "draw", "block.unit")
    assert data.posterior["block.unit"].values.tolist() == [1, 2, 3, 4]
    assert data.log_likelihood["block.y"].dims == ("chain", "draw", "block.rows.all")
    assert data.log_likelihood["block.rows.all"].values.tolist() == [10, 11, 12, 13, 14]
    assert data.constant_data["x.y"].dims == ("block.rows.all",)
    data.to_netcdf(str(tmp_path / "data.nc"))
    back = az.from_netcdf(str(tmp_path / "data.nc"))
    for group, found in datasets(data).items():
        assert dataset(back, group).load().identical(found), group
    for name in ("block/mask_length", "block.mask_length"):
        assert summary(data, [name]).index.tolist() == ["block.mask_length"]
    with pytest.raises(ValueError, match=r"`var_names` names \['block.w'\]; variables: \['block.mask'"):
        summary(data, ["block/w"])
    assert loo(data, force=True).elpd == loo(data, var_name="block/y", force=True).elpd
    table = compare({"a": data, "b": loo(data, var_name="block.y", force=True)}, var_name="block/y", force=True)
    assert table["elpd_diff"].tolist() == [0, 0]
    plot_length_posterior(data, ["block/mask"])
    plot_keep_probs(data, ["block/mask"])


def test_slashes_in_results_by_row_and_ranks(tmp_path):
    by_row = khat_by_row(
        scoped, AutoNested(scoped, latents="mean_field"), torch.randn(3), plate="block/rows:all", num_samples=30
    )
    by_row.to_netcdf(str(tmp_path / "khat.nc"), engine="h5netcdf")
    assert by_row.dims == ("block.rows.all",)

    def model(y=None):
        with pyro.plate("a/b", 2):
            z = pyro.sample("z/c", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    ranks = rank(
        model, lambda data: {"z/c": torch.zeros(3, 2)}, observed="y", num_simulations=2, num_posterior=3, progress=False
    )
    assert ranks["z.c"].dims == ("simulation", "a.b")


@pytest.mark.parametrize(
    ("names", "plates", "message"),
    [
        (("a/b", "a.b"), ("p", "q"), r"'a/b' and 'a.b' would both make the variable 'a.b'"),
        (("a", "b"), ("p/q", "p:q"), r"'p/q' and 'p:q' would both make the dimension 'p.q'"),
        (("mask", "mask_length"), ("p", "q"), r"'mask' and 'mask_length' would both make the variable 'mask_length'"),
    ],
)
def test_names_that_become_one_are_named(names, plates, message):
    def model():
        law = OrderedMask.uniform(2) if names[0] == "mask" else dist.Normal(0.0, 1.0)
        for i, (name, plate) in enumerate(zip(names, plates, strict=True)):
            with pyro.plate(plate, 3 + i, dim=-1):
                pyro.sample(name, law if i == 0 else dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=message):
        to_arviz(model, model, num_samples=2)
    with pytest.raises(ValueError, match="'scale' must not name both a variable and a dimension"):
        to_arviz(nested, AutoNested(nested), torch.randn(2, 3), num_samples=2, dims={"w": ["scale"]})


def test_some_sites_only():
    y = torch.randn(5)
    guide = AutoNested(scoped)
    guide(y)
    whole = to_arviz(scoped, guide, y, num_samples=30)
    some = to_arviz(scoped, guide, y, num_samples=30, sites=["block/mask", "block.y"])
    assert set(some.posterior.data_vars) == set(some.prior.data_vars) == {"block.mask", "block.mask_length"}
    assert set(datasets(some)) == set(datasets(whole))
    assert dataset(some, "sample_stats").identical(dataset(whole, "sample_stats"))
    few = to_arviz(scoped, guide, y, num_samples=30, sites=["block/mask"])
    assert set(datasets(few)) == {"posterior", "prior", "sample_stats"}
    assert few.posterior.identical(some.posterior)
    with pytest.raises(
        ValueError, match=r"`sites` names \['w/x'\]; sites of the model: \['block/mask', 'block/z:local'"
    ):
        to_arviz(scoped, guide, y, num_samples=2, sites=["block/mask", "w/x"])
    with pytest.raises(ValueError, match="`sites` must be a sequence of names; got the string 'z'"):
        to_arviz(conjugate, posterior, num_samples=2, sites="z")
