"""Ranks are uniform where the posterior is right, whatever its ties, and are not where it is broken."""

import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from odd import NO_NUMBERS
from pyro.infer import TraceEnum_ELBO
from scipy import stats

from pyro_vnd.diagnostics import plot_ranks
from pyro_vnd.diagnostics.posterior.sbc import rank_uniformity, sbc
from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.infer import OptimizerSettings, cosine_to_zero, fit

D, N, L = 2, 3, 39
UNIFORM, BROKEN = 0.01, 1e-4


def means(num_rows, y=None):
    """Conjugate: means ~ N(0, 1), rows ~ N(means, 1), so means | y ~ N(sum y / (N + 1), 1 / (N + 1))."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    with pyro.plate("data", num_rows):
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


def posterior_of_means(shift=0.0, scale=1.0):
    """Infer the means exactly, or off by so many standard deviations and so many times as wide."""

    def infer(data):
        sd = (N + 1) ** -0.5
        law = dist.Normal(data["y"].sum(0) / (N + 1) + shift * sd, scale * sd).to_event(1)
        return lambda num_rows, y: pyro.sample("mu", law)

    return infer


def ranks_of_means(infer, **arguments):
    arguments = {"num_posterior": L, "progress": False, "log_likelihood": False, **arguments}
    return sbc(means, infer, (N,), observed="y", **arguments)


def p_values(ranks):
    return rank_uniformity(ranks).to_array()


def test_the_exact_posterior_is_calibrated():
    ranks = ranks_of_means(posterior_of_means(), log_likelihood=True)
    assert set(ranks.data_vars) == {"mu", "log_likelihood"}
    assert ranks["mu"].dims == ("simulation", "mu_dim_0")
    assert (ranks["mu"] >= 0).all()
    assert (ranks["mu"] <= L).all()
    assert {ranks["mu"].min().item(), ranks["mu"].max().item()} == {0, L}
    assert (p_values(ranks) > UNIFORM).all()


@pytest.mark.parametrize("error", [{"scale": 0.5}, {"scale": 2.0}, {"shift": 0.5}], ids=str)
def test_power_a_broken_posterior_is_not(error):
    assert (p_values(ranks_of_means(posterior_of_means(**error))) < BROKEN).all()


def test_a_posterior_that_ignores_the_data_fails_for_the_likelihood_only():
    def infer(data):
        return {"mu": torch.randn(L, D)}

    tests = rank_uniformity(ranks_of_means(infer, log_likelihood=True))
    assert (tests["mu"] > UNIFORM).all()
    assert tests["log_likelihood"] < BROKEN


K = 3
NOISE = 2.0
LENGTHS = torch.arange(1.0, K + 1, dtype=torch.float64)


def lengths(y=None):
    mask = pyro.sample("mask", OrderedMask(logits=torch.tensor([0.5, 0.2, 0.0])))
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(mask.sum(-1), NOISE), obs=y)


class FreeLaw(pyro.nn.PyroModule):
    """A guide whose family has the posterior, which enumeration finds without noise."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(K))

    def forward(self, y):
        return pyro.sample("mask", OrderedMask(logits=self.logits), infer={"enumerate": "parallel"})


def fitted_law(data):
    guide = FreeLaw()
    fit(
        lengths,
        guide,
        data["y"],
        num_epochs=12,
        lr=4.0,
        optimizer=OptimizerSettings(torch.optim.SGD, lr_schedule=cosine_to_zero()),
        elbo=TraceEnum_ELBO(max_plate_nesting=1),
        progress=False,
    )
    return guide


def enumerated(data):
    """The posterior of the length: its prior times its evidence."""
    prior = torch.tensor([0.5, 0.2, 0.0]).log_softmax(-1)
    return (prior + dist.Normal(LENGTHS, NOISE).log_prob(data["y"][:, None]).sum(0)).softmax(-1)


def ranks_of_lengths(infer, num_simulations=200):
    return sbc(
        lengths,
        infer,
        observed=["y"],
        num_simulations=num_simulations,
        num_posterior=L,
        log_likelihood=False,
        progress=False,
    )


def drawn_from(law):
    """Infer by draws of the posterior, of whose lengths the probabilities go through a function."""
    return lambda data: {"mask": OrderedMask(probs=law(enumerated(data))).sample((L,))}


def test_svi_of_an_ordered_mask_is_calibrated():
    guides = []

    def infer(data):
        guides.append((fitted_law(data), enumerated(data)))
        return guides[-1][0]

    ranks = ranks_of_lengths(infer, num_simulations=150)
    assert list(ranks.data_vars) == ["mask_length"]
    errors = [(guide.logits.softmax(-1) - exact).abs().sum().item() / 2 for guide, exact in guides]
    assert max(errors) < 0.05  # it is SVI that is tested, and it has found the posterior
    assert rank_uniformity(ranks)["mask_length"] > UNIFORM


@pytest.mark.parametrize("name", ["reversed", "narrow"])
def test_power_a_broken_law_of_lengths_is_not(name):
    law = {"reversed": lambda p: p.flip(-1), "narrow": lambda p: (8 * p.log()).softmax(-1)}[name]
    assert rank_uniformity(ranks_of_lengths(drawn_from(law)))["mask_length"] < BROKEN


def test_ties_are_broken_at_random(monkeypatch):
    ranks = ranks_of_lengths(drawn_from(lambda p: p))
    assert rank_uniformity(ranks)["mask_length"] > UNIFORM
    module = sys.modules[sbc.__module__]
    for ties_above in (lambda truth, draws: (draws < truth).sum(0), lambda truth, draws: (draws <= truth).sum(0)):
        monkeypatch.setattr(module, "_ranks", ties_above)
        assert rank_uniformity(ranks_of_lengths(drawn_from(lambda p: p)))["mask_length"] < BROKEN


def test_nested_normals_and_plates_have_ranks_of_all_that_they_draw():
    def model(num_rows, y=None):
        with pyro.plate("data", num_rows):
            code = pyro.sample("code", NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)))
            pyro.sample("y", dist.Normal(code.sum(-1), 100.0), obs=y)

    def infer(data):  # next to nothing is learned from the data
        return lambda num_rows, y: model(num_rows, y)

    options = {"num_simulations": 100, "num_posterior": 19, "log_likelihood": False, "progress": False}
    ranks = sbc(model, infer, (2,), observed="y", **options)
    assert ranks["code"].dims == ("simulation", "data", "code_dim_1")
    assert ranks["code_length"].dims == ("simulation", "data")
    assert ranks.sizes == {"simulation": 100, "data": 2, "code_dim_1": K}
    assert ranks.attrs == {"num_posterior": 19}
    assert float(p_values(ranks).min()) > UNIFORM / 8  # of eight numbers


def test_seeds_of_the_inference_do_not_repeat_simulations():
    seen = []

    def infer(data):
        torch.manual_seed(0)
        seen.append(data["y"])
        return posterior_of_means()(data)

    torch.manual_seed(7)
    state = torch.get_rng_state()
    ranks = ranks_of_means(infer)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({y[0, 0].item() for y in seen}) == 200
    assert (p_values(ranks) > UNIFORM).all()
    few, again, others = (ranks_of_means(infer, num_simulations=10, seed=seed) for seed in (0, 0, 1))
    xr.testing.assert_identical(few, again)
    assert not few.equals(others)


def test_covariates_are_a_tensor_a_tuple_or_a_mapping():
    """Those of a fit: what a mapping has for the observed sites is simulated in its place."""

    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    def infer(data):
        precision = 1 + x @ x
        return lambda x, y: pyro.sample("slope", dist.Normal(x @ y / precision, precision**-0.5))

    x, y = torch.linspace(-1, 1, 5), torch.zeros(5)
    options = {"observed": "y", "num_simulations": 5, "num_posterior": 9, "progress": False}
    first = sbc(model, infer, x, **options)
    assert set(first.data_vars) == {"slope", "log_likelihood"}
    for data in ((x,), [x], {"x": x}, {"x": x, "y": y}):
        xr.testing.assert_identical(first, sbc(model, infer, data, **options))


def test_uniformity_is_pearsons_test():
    values = np.random.default_rng(0).integers(0, 100, size=(300, 2))
    ranks = xr.Dataset({"a": (("simulation", "d"), values)}, attrs={"num_posterior": 99})
    for num_bins in (10, 7):  # the second has bins of 14 and 15 ranks
        bins = np.arange(100) * num_bins // 100
        for column, p in enumerate(rank_uniformity(ranks, num_bins)["a"].values):
            counts = np.bincount(bins[values[:, column]], minlength=num_bins)
            assert p == pytest.approx(stats.chisquare(counts, 3 * np.bincount(bins)).pvalue, rel=1e-10)
    assert rank_uniformity(ranks)["a"].dims == ("d",)
    # Its p-values are uniform themselves.
    many = np.random.default_rng(1).integers(0, 100, size=(200, 1000))
    p = rank_uniformity(xr.Dataset({"a": (("simulation", "d"), many)}, attrs={"num_posterior": 99}))["a"]
    assert stats.kstest(p, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_simulations": 0}, "`num_simulations` must be an integer >= 1; got 0"),
        ({"num_posterior": 0}, "`num_posterior` must be an integer >= 1; got 0"),
        ({"observed": "x"}, r"`observed` must be of what the model draws, \['mu', 'y'\]; got \['x'\]"),
        ({"infer": lambda data: {}}, r"`infer` must give 39 draws of sites among \['mu'\]; got \{\}"),
        ({"infer": lambda data: {"mu": torch.zeros(5, D)}}, r"must give 39 draws .*got \{'mu': \(5, 2\)\}"),
    ],
)
def test_bad_arguments(arguments, message):
    infer = arguments.pop("infer", posterior_of_means())
    arguments = {"observed": "y", "num_posterior": L, "progress": False, **arguments}
    with pytest.raises(ValueError, match=message):
        sbc(means, infer, (N,), **arguments)


ODD = {
    "num_simulations": [*NO_NUMBERS.values(), True, 1.5, [], torch.ones(2)],
    "num_posterior": [*NO_NUMBERS.values(), True, 2.0, [1, 2], None],
    "seed": [*NO_NUMBERS.values(), None, True, [1, 2], np.zeros(2), torch.tensor(1)],
    "observed": [None, 1, [], {}, [None], ["y", 1], object(), torch.ones(2), torch.tensor(1.0)],
    "model": [None, "y", 1, {}, torch.ones(2), dict],
    "infer": [None, "mu", {"mu": torch.zeros(L, D)}, torch.ones(2), lambda: {}, lambda data, more: {}],
}


@pytest.mark.parametrize("argument", ODD)
def test_odd_arguments(argument):
    usual = {"model": means, "infer": posterior_of_means(), "observed": "y", "num_simulations": 1, "num_posterior": L}
    for odd in ODD[argument]:
        with pytest.raises(ValueError, match=f"^sbc: argument `{argument}` must be "):
            sbc(**usual | {argument: odd}, data=(N,), progress=False)


@pytest.mark.parametrize("data", [(), (1, 2, 3), {"rows": N}, {1: N}, torch.ones(3).to_sparse()])
def test_data_that_the_model_does_not_take(data):
    with pytest.raises(ValueError, match=r"^sbc: argument `data(\[0\])?` must be "):
        sbc(means, posterior_of_means(), data, observed="y", progress=False)


WRONG_DRAWS = {
    "nothing": None,
    "a number": 1.0,
    "a class": dict,
    "a guide of other arguments": lambda x: None,
    "a guide without the site": lambda num_rows, y: None,
    "words": {"mu": "abc"},
    "sparse": {"mu": torch.zeros(L, D).to_sparse()},
    "one for all dimensions": {"mu": torch.zeros(L, 1)},
    "no dimension": {"mu": torch.zeros(L)},
    "too many": {"mu": torch.zeros(L + 1, D)},
    "complex": {"mu": torch.zeros(L, D) + 0j},
    "nan": {"mu": torch.full((L, D), torch.nan)},
}


@pytest.mark.parametrize("wrong", WRONG_DRAWS)
def test_what_has_no_ranks(wrong):
    """Draws that are NaN would all be above the truth."""
    with pytest.raises(ValueError, match=r"^sbc: argument `infer` must (give|return) "):
        ranks_of_means(lambda data: WRONG_DRAWS[wrong], num_simulations=1)


def test_a_model_that_draws_no_numbers():
    def broken(num_rows, y=None):
        pyro.sample("mu", dist.Delta(torch.full((D,), torch.nan), event_dim=1))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    message = r"^sbc: argument `model` must draw numbers, which have ranks; of \['mu'\] some are NaN"
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        sbc(broken, lambda data: {"mu": torch.zeros(L, D)}, (N,), observed="y", num_posterior=L, progress=False)


def test_what_is_not_ranked_may_be_nan():
    def model(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("unknown", dist.Delta(torch.tensor(torch.nan)))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    draws = {"mu": torch.zeros(9)}
    with pyro.validation_enabled(False):
        ranks = sbc(
            model,
            lambda data: draws,
            observed="y",
            num_posterior=9,
            num_simulations=2,
            log_likelihood=False,
            progress=False,
        )
    assert list(ranks) == ["mu"]


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
def test_a_likelihood_that_is_nan():
    def model(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu.masked_fill(mu == 0, torch.nan), 1.0, validate_args=False), obs=y)

    with pytest.raises(ValueError, match=r"^sbc: argument `model` must give data a likelihood .* it is NaN"):
        sbc(model, lambda data: {"mu": torch.zeros(9)}, observed="y", num_posterior=9, progress=False)


def test_a_seed_of_any_kind_of_integer():
    same = [ranks_of_means(posterior_of_means(), num_simulations=2, seed=seed)["mu"] for seed in (3, np.int64(3))]
    assert same[0].equals(same[1])
    assert ranks_of_means(posterior_of_means(), num_simulations=2, seed=-1).sizes["simulation"] == 2


@pytest.mark.parametrize("function", [rank_uniformity, plot_ranks])
@pytest.mark.parametrize("ranks", [None, 1, {}, torch.ones(3), xr.Dataset(), xr.Dataset(attrs={"num_posterior": 3})])
def test_what_are_no_ranks(function, ranks):
    with pytest.raises(ValueError, match=f"^{function.__name__}: argument `ranks` must be what sbc returned"):
        function(ranks)


def test_what_is_summed_out_has_no_rank():
    def model(y=None):
        mask = pyro.sample("mask", OrderedMask.uniform(K))
        mu = pyro.sample("mu", dist.Normal(mask.sum(-1), 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    arguments = {"observed": "y", "num_simulations": 2, "num_posterior": L, "progress": False}
    assert list(sbc(model, lambda data: {"mu": torch.zeros(L)}, log_likelihood=False, **arguments)) == ["mu"]
    with pytest.raises(ValueError, match=r"`log_likelihood` must be False .*\['mask'\] are not"):
        sbc(model, lambda data: {"mu": torch.zeros(L)}, **arguments)


def test_bins_are_checked():
    ranks = ranks_of_means(posterior_of_means(), num_simulations=5)
    with pytest.raises(ValueError, match=r"`num_bins` must be from 2 to 40; got 41"):
        rank_uniformity(ranks, 41)
    for odd in (*NO_NUMBERS.values(), True, 2.5, [2]):
        with pytest.raises(ValueError, match=r"^rank_uniformity: argument `num_bins` must be from 2 to 40"):
            rank_uniformity(ranks, odd)
