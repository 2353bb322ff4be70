"""What happens to an error or a number that is not finite: whose it is, and what is said."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from masked_mean import N
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import (
    AutoNested,
    Callback,
    KLWeights,
    NonFiniteLossError,
    OptimizerSettings,
    Validation,
    fit,
    module_local_params,
)


class Breaks(PyroModule):
    """A model of a mean in which something happens from a call on."""

    def __init__(self, break_mean=lambda mu: mu, scale=lambda calls: 1.0, start=2):
        super().__init__()
        self.break_mean, self.scale, self.start, self.calls = break_mean, scale, start, 0

    def forward(self, y):
        self.calls += 1
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        if self.calls > self.start:
            mu = self.break_mean(mu)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Laplace(mu, self.scale(self.calls - self.start)), obs=y)


def infinite(mu):
    return mu * torch.inf


def steep(mu):
    """A root has an infinite slope at zero: a finite value whose gradient is 0 * inf."""
    return mu + 0 * (0 * mu).abs().sqrt()


@pytest.mark.parametrize(
    ("how", "message"),
    [(infinite, "the log-probability of site 'y' of the model is not finite"), (steep, r"gradient of .*mu")],
    ids=["loss", "gradient"],
)
def test_non_finite_loss_stops_and_names_the_culprit(how, message, y):
    model = Breaks(how)
    guide = AutoNormal(model)
    with pyro.validation_enabled(False), pytest.raises(NonFiniteLossError, match=message):
        fit(model, guide, y, num_epochs=10, progress=False)
    with module_local_params(guide):
        assert all(torch.isfinite(p).all() for p in guide.parameters())


@pytest.mark.parametrize(
    ("how", "scale"),
    [(lambda mu: mu * torch.nan, lambda calls: 1.0), (lambda mu: mu, lambda calls: torch.nan if calls > 0 else 1.0)],
    ids=["location", "scale"],
)
def test_a_law_that_pyro_refuses_as_it_is_not_finite_is_a_loss_that_is_not(how, scale, y):
    model = Breaks(how, lambda calls: torch.tensor(scale(calls)))
    with pytest.raises(NonFiniteLossError, match=r"evaluating the ELBO failed after site 'mu': .*Laplace") as raised:
        fit(model, AutoNormal(model), y, num_epochs=10, progress=False)
    assert isinstance(raised.value.__cause__, ValueError)


def test_logits_that_are_not_finite_are_a_loss_that_is_not(y):
    """Laws of this library that refuse their parameters count as Pyro's."""

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.logits, self.calls = nn.Parameter(torch.zeros(3)), 0

        def forward(self, rows):
            self.calls += 1
            pyro.sample("mask", OrderedMask(logits=self.logits * (torch.nan if self.calls > 2 else 1.0)))

    def model(rows):
        mask = pyro.sample("mask", OrderedMask.uniform(3))
        with pyro.plate("data", len(rows)):
            pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=rows)

    elbo = pyro.infer.Trace_ELBO()
    with pytest.raises(NonFiniteLossError, match="evaluating the ELBO failed before the first site"):
        fit(model, Guide(), y, elbo=elbo, num_epochs=10, progress=False)


def test_an_invalid_distribution_names_the_site(y):
    def model(rows):
        scale = pyro.sample("scale", dist.Normal(-5.0, 0.1))
        with pyro.plate("data", len(rows)):
            pyro.sample("y", dist.Normal(0.0, scale.detach() + 5.5 if model.ok else scale), obs=rows)

    model.ok = True
    guide = AutoNormal(model)
    with module_local_params(guide):
        guide(y)
    calls = iter(range(100))

    def breaking(rows):
        model.ok = next(calls) < 2
        return model(rows)

    # A negative scale is finite: the model is wrong, and the error is Pyro's.
    with pytest.raises(ValueError, match="after site 'scale'"):
        fit(breaking, guide, y, num_epochs=10, progress=False)


@pytest.mark.parametrize("kind", [ValueError, KeyError, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_an_error_of_the_model_itself_stays_what_it_is(kind, value, y):
    """Also where the model has found something that is not finite, and has a name of its own for it."""

    def refuse(mu):
        mu = mu * value
        raise kind("column 3 of the table is missing")

    model = Breaks(refuse)
    with pytest.raises(kind, match="column 3 of the table is missing") as raised:
        fit(model, AutoNormal(model), y, num_epochs=10, progress=False)
    assert type(raised.value) is kind
    (note,) = raised.value.__notes__
    assert note == "fit: raised while the ELBO was evaluated, after site 'mu', on a batch of 40 rows"


def test_a_plate_of_another_size_in_a_later_step_is_no_infinite_loss(y):
    class Shrinks(Breaks):
        def forward(self, rows):
            super().forward(rows if self.calls < 3 else rows[:-1])

    model = Shrinks()
    with pytest.raises(ValueError, match="plate 'data' at site 'y' has size 39, but the batch has 40 rows"):
        fit(model, AutoNormal(model), y, num_epochs=10, progress=False)


@pytest.mark.parametrize("error", [None, RuntimeError("the table is gone")], ids=["refused", "raised"])
def test_what_looking_for_the_site_raises_is_no_answer(error, y):
    """A scale that is so small that the loss is infinite, and one that Pyro refuses in the evaluation after it."""

    def scale(calls):
        if calls > 1 and error is not None:
            raise error
        return torch.tensor({1: 1e-320}.get(calls, 1.0 if calls < 1 else torch.nan))

    model = Breaks(scale=scale)
    expected = "ValueError: .*Laplace" if error is None else "RuntimeError: the table is gone"
    message = rf"the loss is inf; evaluating the model once more, to find the site, raised {expected}.*; last site 'y'"
    with pytest.raises(NonFiniteLossError, match=message):
        fit(model, AutoNormal(model), y, num_epochs=10, progress=False)


def test_what_a_step_made_of_a_law_in_closed_form_is_named():
    x = torch.full((N, 4), 1e37, dtype=torch.float32)

    def model(x):
        mask = pyro.sample("mask", OrderedMask.uniform(4))
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ (mask * w).float(), 1.0), obs=x[:, 0])

    with pytest.raises(NonFiniteLossError, match=r"it made \['guide\..*logits.*'\] not finite; last site 'y'"):
        fit(model, AutoNested(model), x, num_epochs=1, progress=False)


def test_states_from_before_the_loss_was_infinite_are_named(y, tmp_path):
    model, path = Breaks(infinite, start=5), tmp_path / "fit.pt"
    with pyro.validation_enabled(False), pytest.raises(NonFiniteLossError) as raised:
        fit(model, AutoNormal(model), y, num_epochs=10, checkpoint=path, progress=False)
    before = f"states from before this step, the newest first: {path}, {tmp_path / 'fit.previous.pt'};"
    assert [before[:-1] in note for note in raised.value.__notes__] == [True]
    model = Breaks(infinite)
    with pyro.validation_enabled(False), pytest.raises(NonFiniteLossError) as raised:
        fit(model, AutoNormal(model), y, num_epochs=10, checkpoint=path, progress=False)
    assert not hasattr(raised.value, "__notes__")  # these files are of another fit, which this one does not go on from
    model = Breaks(infinite)
    with pyro.validation_enabled(False), pytest.raises(NonFiniteLossError) as raised:
        fit(model, AutoNormal(model), y, num_epochs=10, progress=False)
    assert not hasattr(raised.value, "__notes__")


def test_global_parameters_are_refused(y):
    def guide(rows):
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    def model(rows):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=rows)

    with pytest.raises(ValueError, match="'loc' belongs to no nn"):
        fit(model, guide, y, progress=False)


def test_the_first_evaluation_tells_errors_apart_as_later_ones_do():
    y = torch.randn(N)
    broken = Breaks(lambda mu: mu, scale=lambda calls: torch.tensor(torch.nan), start=0)
    guide = AutoNormal(lambda y: Breaks()(y))
    guide(y)  # sets itself up with a model that is whole
    with pytest.raises(NonFiniteLossError, match="after site 'mu'"):
        fit(broken, guide, y, num_epochs=2, progress=False)

    def refuse(mu):
        raise ValueError("the user's own")

    mine = Breaks(refuse, start=1)
    with pytest.raises(ValueError, match="the user's own") as caught:
        fit(mine, AutoNormal(mine), y, num_epochs=2, progress=False)
    assert any("after site 'mu'" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("start", [0, 1, 4])
def test_a_mistake_beside_an_infinity_is_a_mistake(start, y):
    """The library's own functions have it before them, too, and speak of something else."""

    def both(mu):
        return mu + OrderedMask(logits=torch.zeros(3), probs=torch.full((3,), torch.inf)).mean.sum()

    model = Breaks(both, start=start)
    with pytest.raises(ValueError, match="give exactly one of `probs` and `logits`"):
        fit(model, AutoNormal(model), y, num_epochs=10, progress=False)


@pytest.mark.parametrize("start", [0, 1, 4])
def test_an_error_of_a_law_after_an_infinite_site_is_its_own(start, y):
    """Pyro has the score of the site before at hand when it passes the error on."""
    calls = iter(range(100))

    class Own(dist.Normal):
        def log_prob(self, value):
            if next(calls) >= start:
                raise ValueError("the user's own")
            return super().log_prob(value)

    class Model(PyroModule):
        def forward(self, y):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.factor("impossible", torch.tensor(-torch.inf if start == 0 else 0.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", Own(mu, 1.0), obs=y)

    with pytest.raises(ValueError, match="the user's own"):
        fit(model := Model(), AutoNormal(model), y, num_epochs=10, progress=False)


def raises(*args, **kwargs):
    raise ValueError("the user's own")


class Raises(Callback):
    """Raises where it is told to."""

    def __init__(self, where):
        setattr(self, where, raises)


class RaisesInStep(torch.optim.Adam):
    step = raises


def of_the_second_step(number):
    return raises() if number == 2 else 1.0


OWN = {
    **{where: {"callbacks": [Raises(where)]} for where in ("on_fit_start", "on_step", "on_epoch", "on_fit_end")},
    "metric": {"callbacks": [Validation(torch.zeros(3, dtype=torch.float64), {"own": raises})]},
    "weights": {"weights": KLWeights(lambda t: raises() if t > 0.5 else 1.0)},
    "optimizer": {"optimizer": RaisesInStep},
    "rate": {"optimizer": OptimizerSettings(lr_schedule=lambda o, _: LambdaLR(o, of_the_second_step))},
}


@pytest.mark.parametrize("arguments", OWN.values(), ids=OWN)
def test_what_is_given_to_a_fit_may_raise_its_own(arguments, y):
    model = Breaks()
    with pytest.raises(ValueError, match=r"^the user's own$"):
        fit(model, AutoNormal(model), y, num_epochs=4, progress=False, **arguments)


def test_a_model_that_raises_in_validation_raises_its_own(y):
    class Model(PyroModule):
        def forward(self, y):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mu if self.training else raises(), 1.0), obs=y)

    with pytest.raises(ValueError, match=r"^the user's own"):
        fit(model := Model(), AutoNormal(model), y, num_epochs=4, progress=False, validation=y)


def test_a_complex_elbo_is_refused(y):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("score", -(y - mu).square().sum())

    with pytest.raises(
        ValueError, match=r"^fit: the ELBO must be a real number; got torch\.complex128, .*view_as_real"
    ):
        fit(model, AutoNormal(model), y * torch.tensor(1j), num_epochs=1, progress=False)
