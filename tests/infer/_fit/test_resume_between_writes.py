"""A fit that was interrupted between two writes that have no step between them goes on to the last bit, too."""

import pytest
import torch
from masked_mean import masked_mean

from pyro_vnd.autoencoders import OrderedVAE, mlp_bodies
from pyro_vnd.infer import (
    AutoNested,
    BestEpoch,
    Callback,
    Checkpoint,
    EarlyStopping,
    MaskSchedule,
    fit,
)

N, STEPS = 24, 3  # rows, and steps of an epoch


class Interrupted(Exception):
    pass


class Interruption(Callback):
    """Interrupts after the epoch's last step, or after the last epoch's write."""

    def __init__(self, epoch=None):
        self.epoch = epoch

    def on_epoch(self, run):
        if run.epoch == self.epoch:
            raise Interrupted

    def on_fit_end(self, run):
        raise Interrupted


def codes():
    torch.manual_seed(5)
    model = OrderedVAE((6,), 3, bodies=mlp_bodies((6,), hidden=(8,)))
    return model, model.guide, torch.rand(N, 6)


def conditional():
    torch.manual_seed(5)
    return masked_mean, AutoNested(masked_mean), torch.randn(N) + 1


def outcome(make, interruption=None, checkpoint=None, stops=False, **arguments):
    model, guide, data = make()
    stop = [EarlyStopping(patience=1)] if stops else []
    callbacks = [BestEpoch(), *stop, *filter(None, [interruption, checkpoint])]
    arguments = {"num_epochs": 4, "batch_size": N // STEPS, "validation": data, "progress": False} | arguments
    try:
        result = fit(model, guide, data, callbacks=callbacks, **arguments)
    except Interrupted:
        return None, None
    return guide.state_dict(), {name: value for name, value in vars(result).items() if name != "seconds"}


def check(make, interruption, path, every_steps=None, **arguments):
    expected, whole = outcome(make, **arguments)
    assert outcome(make, interruption, Checkpoint(path, every_steps=every_steps), **arguments) == (None, None)
    state, result = outcome(make, None, Checkpoint(path, every_steps=every_steps, resume=True), **arguments)
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []
    assert result == whole
    again = outcome(make, None, Checkpoint(path, resume=True), **arguments)  # which is over
    assert [name for name in expected if not torch.equal(again[0][name], expected[name])] == []
    assert again[1] == whole | {"converged": False}


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("make", [codes, conditional])
def test_after_the_last_epoch_the_rest_is_still_to_be_done(make, stops, tmp_path):
    """Laws are settled, k-hat is estimated, and the best weights are put back."""
    check(make, Interruption(), tmp_path / "fit.pt", stops=stops)


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("make", [codes, conditional])
def test_after_the_last_step_of_an_epoch_laws_are_those_of_that_step(make, epoch, tmp_path):
    check(make, Interruption(epoch), tmp_path / "fit.pt", every_steps=STEPS)


def test_laws_that_the_rest_of_an_epoch_does_not_draw_are_kept(tmp_path):
    """A code that is always cut is recorded with the law before; an interruption after any step leaves the same."""
    for step in (1, 2):
        check(
            codes,
            Interruption(2),
            tmp_path / f"{step}.pt",
            every_steps=step,
            schedule=MaskSchedule(0.2, 0.7, 0.1),
        )
