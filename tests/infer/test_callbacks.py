"""Callbacks are called when they say, measure what is true, and go on from a checkpoint as if nothing had happened."""

import base64
import csv
import math
import sys

import nbclient
import nbformat
import pytest
import torch
from masked_mean import N, lengths, make_net, normal_mean, still
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from pyro.nn import PyroModule
from torch import nn

from pyro_vnd.infer import (
    AutoNested,
    BestEpoch,
    Callback,
    Checkpoint,
    CSVLogger,
    EarlyStopping,
    KLWeights,
    LivePlot,
    MaskSchedule,
    OptimizerSettings,
    Plateau,
    ProgressBar,
    TensorBoardLogger,
    Validation,
    cosine_to_zero,
    fit,
    linear,
)
from pyro_vnd.nn import NestedClassifier

QUICK = {"num_epochs": 5, "batch_size": 16, "lr": 0.05, "progress": False}


class Record(Callback):
    """What was called, with the numbers of epochs and steps."""

    def __init__(self):
        self.calls = []

    def on_fit_start(self, run):
        self.calls.append(("start", run.epoch, run.step))

    def on_step(self, run):
        self.calls.append(("step", run.epoch, run.step))

    def on_epoch(self, run):
        self.calls.append(("epoch", run.epoch, run.step))

    def on_fit_end(self, run):
        self.calls.append(("end", run.epoch, run.step))

    def close(self):
        self.calls.append("close")


class Interrupt(Callback):
    """Stops the machine after some steps."""

    def __init__(self, step):
        self.step = step

    def on_step(self, run):
        if run.step == self.step:
            raise KeyboardInterrupt


class Late(Callback):
    """Measures the first epoch alone."""

    def on_epoch(self, run):
        if run.epoch == 1:
            run.log("score", 1.0)


def train(y, callbacks=(), **changes):
    guide = AutoNormal(normal_mean)
    result = fit(normal_mean, guide, y, callbacks=callbacks, **QUICK | changes)
    return result, guide


def test_each_is_called_at_its_time(y):
    record = Record()
    train(y, [record], num_epochs=2)  # 40 rows in batches of 16
    steps = [("step", epoch, 3 * epoch + i) for epoch in range(2) for i in (1, 2, 3)]
    epochs = [*steps[:3], ("epoch", 1, 3), *steps[3:], ("epoch", 2, 6)]
    assert record.calls == [("start", 0, 0), *epochs, ("end", 2, 6), "close"]


def test_what_is_held_is_freed_when_a_fit_fails(y):
    record = Record()
    with pytest.raises(KeyboardInterrupt):
        train(y, [record, Interrupt(2)])
    assert record.calls[-1] == "close"


def test_validation_measures_in_evaluation_mode_and_takes_no_random_numbers(y):
    net = make_net()
    dropped = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    x, labels = torch.randn(N, 3), torch.randint(2, (N,))
    seen = []

    class Model(NestedClassifier):
        def __init__(self):
            super().__init__(net)
            self.other = dropped

    def share_of_noise(data):
        seen.append(data)
        return torch.rand(()) + model.other.training  # would be above one in training mode

    results = []
    for callbacks in ([], [Validation((x, labels), {"noise": share_of_noise})]):
        net.load_state_dict(make_net().state_dict())
        model = Model()
        results.append(fit(model, net.guide, (x, labels), callbacks=callbacks, **QUICK))
    assert results[0].elbo == results[1].elbo
    assert all(value < 1 for value in results[1].metrics["noise"])
    assert len(seen) == len(results[1].validation_log_likelihood) == 5
    assert seen[0][0] is x


def test_early_stopping_waits_for_its_patience(y):
    class Script(Callback):
        def on_epoch(self, run):
            run.log("score", [1.0, 3.0, 2.9, 3.05, 2.0, 9.0, 9.0][run.epoch - 1])

    def epochs(**arguments):
        return len(train(y, [Script(), EarlyStopping("score", **arguments)], num_epochs=7)[0].elbo)

    assert epochs(patience=3) == 7  # 3.05 was better, and then 9.0
    assert epochs(patience=2) == 7
    assert epochs(patience=1) == 3
    assert epochs(patience=2, min_change=0.1) == 4
    assert epochs(patience=2, mode="min") == 3


def test_early_stopping_waits_for_ten_epochs_unless_told(y):
    class Worse(Callback):
        def on_epoch(self, run):
            run.log("score", -float(run.epoch))

    assert len(train(y, [Worse(), EarlyStopping("score")], num_epochs=20)[0].elbo) == 11


def test_the_best_epoch_is_put_back(y):
    """At a learning rate that is far too high the last epoch is not the best one."""
    states = []

    class Keep(Callback):
        def on_epoch(self, run):
            states.append({name: value.clone() for name, value in run.guide.state_dict().items()})

    best = BestEpoch("elbo")
    result, guide = train(y, [Keep(), best], lr=3.0, num_epochs=20)
    assert best.epoch == 1 + max(range(20), key=lambda epoch: result.elbo[epoch])
    assert best.epoch < 20
    kept = states[best.epoch - 1]
    assert all(torch.equal(value, kept[name]) for name, value in guide.state_dict().items())
    assert not all(torch.equal(value, states[-1][name]) for name, value in guide.state_dict().items())


def test_the_best_epoch_is_forgotten_when_another_fit_begins(y):
    epochs = []

    class Look(Callback):
        def on_step(self, run):
            epochs.append(best.epoch)

    best = BestEpoch("elbo")
    for _ in range(2):
        train(y, [best, Look()], num_epochs=1)
        assert epochs == [0, 0, 0]
        assert best.epoch == 1
        epochs.clear()


@pytest.mark.parametrize("mode", ["max", "min"])
def test_best_is_what_the_mode_says(mode, y):
    best = BestEpoch("elbo", mode=mode)
    result, _ = train(y, [best])
    assert result.elbo[best.epoch - 1] == {"max": max, "min": min}[mode](result.elbo)


def test_a_fit_that_was_stopped_early_is_over(y, tmp_path):
    path = tmp_path / "fit.pt"
    arguments = {"num_epochs": 30, "lr": 0.5, "validation": y + 0.3}

    def go(resume):
        best = BestEpoch()
        result, guide = train(y, [EarlyStopping(patience=2), best], checkpoint=path, resume=resume, **arguments)
        return result, guide.state_dict(), best.epoch

    first, state, epoch = go(resume=False)
    assert len(first.elbo) < 30
    for _ in range(2):
        again, other, same = go(resume=True)
        assert (again.elbo, same) == (first.elbo, epoch)
        assert all(torch.equal(value, other[name]) for name, value in state.items())
    longer, _ = train(y, [EarlyStopping(patience=4)], checkpoint=path, resume=True, **arguments)
    assert len(longer.elbo) > len(first.elbo)  # who waits for longer goes on


def test_more_epochs_go_on_from_the_last_weights_not_from_the_best(y, tmp_path):
    path = tmp_path / "fit.pt"
    straight, _ = train(y, num_epochs=7)

    def go(num_epochs, resume):
        worst = BestEpoch("elbo", mode="min")
        return train(y, [worst], num_epochs=num_epochs, checkpoint=path, resume=resume)[0]

    assert go(5, resume=False).elbo == straight.elbo[:5]
    assert go(7, resume="extend").elbo == straight.elbo


def test_a_metric_may_come_later(y, tmp_path):
    path = tmp_path / "fit.pt"
    train(y, num_epochs=2, checkpoint=path)
    best = BestEpoch()
    arguments = {"num_epochs": 5, "checkpoint": path, "resume": "extend", "validation": y + 0.3}
    result, _ = train(y, [EarlyStopping(patience=9), best], **arguments)
    assert len(result.validation_log_likelihood) == 3
    assert best.epoch - 3 == max(range(3), key=lambda i: result.validation_log_likelihood[i])


def test_weights_of_a_best_epoch_that_nobody_kept_are_not_put_back(y, tmp_path):
    class Falling(Callback):
        def on_epoch(self, run):
            run.log("score", -run.epoch)

    path, ends = tmp_path / "fit.pt", []
    for callbacks in ([Falling()], [Falling(), best := BestEpoch("score")]):
        path.unlink(missing_ok=True)
        train(y, [Falling()], num_epochs=2, checkpoint=path)
        ends.append(train(y, callbacks, num_epochs=4, checkpoint=path, resume="extend")[1].state_dict())
    assert best.epoch == 0
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("when", [{}, {"every_steps": 2}], ids=["epoch", "steps"])
def test_rates_by_group_on_a_schedule_are_not_those_of_a_description(when, y, tmp_path):
    """A checkpoint describes the schedule by a throw-away optimiser, which must not share its groups."""
    path = tmp_path / "fit.pt"
    settings = OptimizerSettings(lr_schedule=cosine_to_zero())
    arguments = QUICK | {"lr": {"laws": 0.05}, "optimizer": settings}
    rates = []

    class Rates(Callback):
        def on_step(self, run):
            rates.append([group["lr"] for group in run.optimizer.param_groups])

    def go(*callbacks):
        rates.clear()
        guide = AutoNested(lengths, latents="mean_field")
        result = fit(lengths, guide, y, callbacks=[Rates(), *callbacks], **arguments)
        return result.elbo, [*rates]

    whole, expected = go()
    assert len({rate for (rate,) in expected}) > 10
    assert go(Checkpoint(path, **when)) == (whole, expected)
    with pytest.raises(KeyboardInterrupt):
        go(Checkpoint(path, **when), Interrupt(8))
    assert go(Checkpoint(path, resume=True, **when))[0] == whole


def callbacks_of(path=None, **when):
    best, early = BestEpoch(), EarlyStopping(patience=8)
    return [best, early, *([Checkpoint(path, **when)] if path else [])]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 8, 11])
def test_an_interrupted_fit_goes_on_within_an_epoch_bit_by_bit(step, y, tmp_path):
    path = tmp_path / "fit.pt"
    arguments = {"lr": 0.5, "num_epochs": 6, "validation": y + 0.3}
    whole, guide = train(y, callbacks_of(), **arguments)
    with pytest.raises(KeyboardInterrupt):
        train(y, [*callbacks_of(path, every_steps=1), Interrupt(step)], **arguments)
    again = callbacks_of(path, every_steps=1, resume=True)
    result, other = train(y, again, **arguments)
    assert result.elbo == whole.elbo
    assert result.validation_log_likelihood == whole.validation_log_likelihood
    assert result.num_steps == whole.num_steps
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in guide.state_dict().items())


def test_power_a_position_that_is_forgotten_shows(y, tmp_path, monkeypatch):
    from pyro_vnd.infer._fit import loop

    path = tmp_path / "fit.pt"
    whole, _ = train(y, num_epochs=6)
    with pytest.raises(KeyboardInterrupt):
        train(y, [Checkpoint(path, every_steps=1), Interrupt(8)], num_epochs=6)
    monkeypatch.setattr(loop, "islice", lambda items, start, stop=None: iter(()) if stop else _first(items, start))
    result, _ = train(y, [Checkpoint(path, every_steps=1, resume=True)], num_epochs=6)
    assert result.elbo != whole.elbo


def _first(items, count):
    return [item for item, _ in zip(items, range(count), strict=False)]


def test_minutes_are_counted(y, tmp_path):
    path = tmp_path / "fit.pt"
    written = []

    class Look(Callback):
        def on_step(self, run):
            written.append(path.exists())

    train(y, [Look(), Checkpoint(path, every_minutes=1e-9)], num_epochs=1)
    assert written == [False, True, True]
    path.unlink()
    written.clear()
    train(y, [Look(), Checkpoint(path, every_minutes=100)], num_epochs=1)
    assert written == [False, False, False]
    assert path.exists()


def test_csv_has_a_line_an_epoch_and_goes_on(y, tmp_path):
    log, path = tmp_path / "fit.csv", tmp_path / "fit.pt"
    whole, _ = train(y, [CSVLogger(log)], validation=y)
    with log.open() as file:
        rows = [*csv.DictReader(file)]
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5]
    assert [float(row["elbo"]) for row in rows] == whole.elbo
    assert [float(row["validation_log_likelihood"]) for row in rows] == whole.validation_log_likelihood
    with pytest.raises(KeyboardInterrupt):
        train(y, [CSVLogger(log), Checkpoint(path), Interrupt(8)], validation=y)
    with log.open("a") as file:
        file.write(log.read_text().splitlines()[-1].replace("2,", "3,", 1) + "\n")  # of an epoch that was not over
    train(y, [CSVLogger(log), Checkpoint(path, resume=True)], validation=y)
    with log.open() as file:
        assert [float(row["elbo"]) for row in csv.DictReader(file)] == whole.elbo


def test_csv_files_that_killed_fits_left_are_taken_away(y, tmp_path):
    for name in (".fit.csv.123.tmp", ".other.csv.123.tmp"):
        (tmp_path / name).write_text("half")
    fit(
        normal_mean,
        AutoNormal(normal_mean),
        y,
        callbacks=[CSVLogger(tmp_path / "fit.csv")],
        num_epochs=1,
        progress=False,
    )
    assert {path.name for path in tmp_path.iterdir()} == {"fit.csv", ".other.csv.123.tmp"}


def test_mean_lengths_and_metrics_are_logged(y, tmp_path):
    log = tmp_path / "fit.csv"

    class Rate(Callback):
        def on_epoch(self, run):
            run.log("lr", run.optimizer.param_groups[0]["lr"])

    settings = OptimizerSettings(lr_schedule=cosine_to_zero())
    result = fit(lengths, AutoNested(lengths), y, optimizer=settings, callbacks=[Rate(), CSVLogger(log)], **QUICK)
    with log.open() as file:
        rows = [*csv.DictReader(file)]
    assert [float(row["mean_length/mask"]) for row in rows] == result.mean_length["mask"]
    rates = [float(row["lr"]) for row in rows]
    assert rates == result.metrics["lr"]
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_tensorboard_has_epochs_and_steps(y, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result, _ = train(y, [TensorBoardLogger(tmp_path, every_steps=4)])
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("elbo")] == pytest.approx(result.elbo)
    assert [event.step for event in events.Scalars("elbo")] == [3, 6, 9, 12, 15]
    assert [event.step for event in events.Scalars("step/elbo")] == [4, 8, 12]


def test_live_plot_draws_what_there_is(y):
    plot = LivePlot()
    figures = []

    class Draw(Callback):
        def on_epoch(self, run):
            run.log("halves", run.epoch / 2)
            figures.append(plot.figure(run))

    result = fit(lengths, AutoNested(lengths), y, validation=y, callbacks=[Draw()], **QUICK)
    axes = figures[-1].axes
    assert [each.get_ylabel() for each in axes] == ["nats per row", "halves", "mean length, units"]
    assert axes[0].lines[0].get_ydata().tolist() == result.elbo
    assert axes[1].lines[0].get_ydata().tolist() == [0.5, 1.0, 1.5, 2.0, 2.5]


def test_live_plot_in_a_script_says_when_it_would_draw(y, capsys):
    result, _ = train(y, [LivePlot(2)], validation=None)
    assert result.num_steps == 15
    assert capsys.readouterr().out.count("<IPython.core.display.Image object>") == 3  # epochs 2 and 4, and the last


@pytest.mark.parametrize(
    ("make", "missing", "message"),
    [
        (lambda: TensorBoardLogger("runs"), "torch.utils.tensorboard", "TensorBoardLogger needs tensorboard: pip inst"),
        (LivePlot, "IPython.display", "LivePlot needs IPython and matplotlib: pip install ipython matplotlib"),
        (LivePlot, "matplotlib.figure", "LivePlot needs IPython and matplotlib: pip install ipython matplotlib"),
    ],
)
def test_a_missing_package_is_named(make, missing, message, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=message):
        make()


def test_live_plot_is_one_picture_in_a_notebook():
    cell = """
import pyro, pyro.distributions as dist, torch
from pyro.infer.autoguide import AutoNormal
from pyro_vnd.infer import LivePlot, fit
def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
result = fit(model, AutoNormal(model), torch.ones(3), num_epochs=3, callbacks=[LivePlot()], progress=False)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    nbclient.NotebookClient(notebook, timeout=120).execute()
    (shown,) = [output for output in notebook.cells[0].outputs if output.output_type == "display_data"]
    png = base64.b64decode(shown.data["image/png"])
    assert png[:4] == b"\x89PNG"
    width = int.from_bytes(png[16:20], "big")
    assert shown.metadata["image/png"]["width"] == width // 2  # sharp where pixels are small


def test_progress_shows_epochs_and_the_last_numbers(y, capsys):
    train(y, progress=True)
    shown = capsys.readouterr().err
    assert "5/5" in shown
    assert "ELBO=" in shown
    train(y, [ProgressBar()], progress=True)
    assert capsys.readouterr().err.count("0/5") == 1  # one bar, not two
    train(y)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 5), (13, 4), (20, 2)])
def test_accumulated_batches_are_one(batch_size, accumulate, y):
    """With a point for a guide and steps in proportion to the gradient, whatever the order of the rows."""

    def end(batch_size, accumulate):
        guide = AutoDelta(normal_mean, init_loc_fn=init_to_value(values={"mu": torch.tensor(0.0)}))
        settings = OptimizerSettings(torch.optim.SGD, accumulate=accumulate)
        arguments = {"batch_size": batch_size, "optimizer": settings, "lr": 1e-3, "num_epochs": 3}
        return fit(normal_mean, guide, y, **arguments, progress=False), guide.median()["mu"].item()

    result, mean = end(batch_size, accumulate)
    assert result.num_steps == 3
    # A last batch of one row has a fortieth of the weight, not a fourth.
    rows = N / (batch_size * accumulate)  # by how much a step is shorter whose batches are not full
    expected = 0.0
    for _ in range(3):
        expected += 1e-3 * rows * (y.sum().item() - (N + 1) * expected)
    assert mean == pytest.approx(expected, rel=1e-12)


def test_rates_by_group():
    net = make_net()
    x, labels = torch.randn(N, 3), torch.randint(2, (N,))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fit(NestedClassifier(net), net.guide, (x, labels), **QUICK | {"lr": {"laws": 0.5, "*": 0.0}})
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.endswith("logits") for name in moved)


def test_a_group_at_rate_zero_does_not_shorten_the_gradient_of_others():
    class Two(PyroModule):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

        def forward(self, y):
            normal_mean(y - self.a - 100 * self.b)

    model, y = Two(), torch.ones(N)
    settings = OptimizerSettings(torch.optim.SGD, clip_norm=1.0)
    guide = AutoDelta(model, init_loc_fn=init_to_value(values={"mu": torch.tensor(0.0)}))
    arguments = {"num_epochs": 1, "lr": {"*b": 0.0, "guide.*": 0.0, "*": 0.1}, "progress": False}
    fit(model, guide, y, optimizer=settings, **arguments)
    assert model.a.item() == pytest.approx(0.1)
    assert model.b.item() == 0


def test_rates_by_name():
    net = make_net()
    x, labels = torch.randn(N, 3), torch.randint(2, (N,))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fit(NestedClassifier(net), net.guide, (x, labels), **QUICK | {"lr": {"*.log_scales.*": 0.5, "*": 0.0}})
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".log_scales." in name}


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        ({"nothing.*": 0.1}, "no parameter of model or guide is in that group"),
        ({"laws": 0.1}, "no parameter of model or guide is in that group"),  # there is no law here
        ({"*": -1.0}, r"`lr\['\*'\]` must be a finite number >= 0; got -1.0"),
    ],
)
def test_bad_rates(lr, message, y):
    with pytest.raises(ValueError, match=f"fit: .*{message}"):
        train(y, lr=lr)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EarlyStopping(patience=0), "EarlyStopping: argument `patience` must be an integer at least 1; got 0"),
        (lambda: EarlyStopping(min_change=math.nan), "EarlyStopping: argument `min_change` must be finite"),
        (lambda: BestEpoch(mode="best"), "BestEpoch: argument `mode` must be 'max' or 'min'; got 'best'"),
        (lambda: Validation(torch.ones(3), {"elbo": len}), "Validation: argument `metrics` .* got 'elbo'"),
        (
            lambda: Checkpoint("fit.pt", every_steps=0),
            "Checkpoint: argument `every_steps` must be an integer",
        ),
        (lambda: Checkpoint("fit.pt", every_minutes=-1), "Checkpoint: argument `every_minutes` must be finite"),
        (lambda: CSVLogger("nowhere/fit.csv"), "CSVLogger: argument `path` must be a file in a folder that exists"),
        (lambda: LivePlot(0), "LivePlot: argument `every_epochs` must be an integer at least 1; got 0"),
        (lambda: OptimizerSettings(accumulate=0), "OptimizerSettings: argument `accumulate` must be an integer"),
        (lambda: OptimizerSettings(clip_norm=-1), "OptimizerSettings: argument `clip_norm` must be a finite number"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("callbacks", "more", "message"),
    [
        ([print], {}, "`callbacks` must be a list of Callback objects"),
        (Plateau(), {}, "`callbacks` must be a list of Callback objects"),
        ([Validation(torch.ones(3))], {"validation": torch.ones(3)}, "have Validation twice"),
        ([EarlyStopping()], {}, "EarlyStopping: argument `monitor` is 'validation_log_likelihood', by default"),
        (
            [Late(), BestEpoch("score")],
            {},
            "`monitor` must be measured after every epoch; 'score' has 1 values",
        ),
        (
            [Validation(torch.ones(3, dtype=torch.float64), {"score": lambda data: data})],
            {},
            "'score' returned Tensor",
        ),
        ([BestEpoch("accuracy")], {}, "there is no metric 'accuracy' by epoch; there are"),
    ],
)
def test_callbacks_that_do_not_go_together(callbacks, more, message, y):
    with pytest.raises(ValueError, match=message):
        train(y, callbacks, **more)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("kl_weight", r"weights=KLWeights\(latents=...\)"),
        ("stop", r"callbacks=\[Plateau\(\)\]"),
        ("num_epoch", "did you mean 'num_epochs'"),
    ],
)
def test_other_arguments_are_told_their_place(name, instead, y):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; .*{instead}"):
        train(y, **{name: 1})


def test_a_temperature_without_cuts_is_that_of_the_schedule(y):
    guide = AutoNested(lengths, latents="mean_field")
    seen = []

    class Look(Callback):
        def on_step(self, run):
            seen.append(next(part.temperature for part in run.guide.modules() if hasattr(part, "temperature")))

    schedule = MaskSchedule(1, 0, 0, temperature=linear(1.0, 0.2))
    fit(lengths, guide, y, schedule=schedule, weights=KLWeights(), callbacks=[Look()], optimizer=still, **QUICK)
    assert seen[0] == 1.0
    assert seen[-1] == pytest.approx(0.2)
