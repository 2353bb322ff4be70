"""When to stop: a test of whether the ELBO still rises, which knows its own noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch

from pyro_vnd._sizes import is_integer, is_within
from pyro_vnd.infer.callbacks import Callback
from pyro_vnd.infer.run import Run

__all__ = ["Plateau"]

_BATCHES = 5  # batch means of a window


@dataclass(frozen=True)
class Plateau(Callback):
    r"""Stop a fit once the ELBO provably changes by less than `tolerance` from one window of epochs to the next.

    A noisy ELBO that shows no significant rise may well be rising, and the noisier it is the sooner such a rule would
    stop. This one asks for evidence of the opposite. With $\bar e_1, \bar e_2$ the mean ELBO of the last two windows
    and s the Monte-Carlo error of their difference, it holds where

    $$|\bar e_2 - \bar e_1| + t_j \, s < \mathrm{tolerance}.$$

    s is from the means of five batches in each window, and larger by $\sqrt{(1 + \rho) / (1 - \rho)}$ where these still
    have an autocorrelation $\rho > 0$, so that noise may last for some epochs. Windows do not overlap: the j-th test is
    after (j + 1) windows, with the quantile $t_j$ of Student's law at the level $\alpha / (j (j + 1))$. These levels
    sum to $\alpha$: however long the fit, an ELBO that goes on rising by the tolerance a window is stopped with a
    probability of at most $\alpha$. That takes windows that are longer than the noise lasts: with an
    autocorrelation of .9 from one epoch to the next, 100 epochs keep a rate of .05, and with 50 it is .07.

    As a callback of `fit` it sees the epochs in which weights of KLs, temperature and the shares of masks have the
    values that they keep. Schedules are made for all epochs, the learning rate's too, which may still be high then.

    The ELBO of a fit can rest before it rises, in a warm-up of the learning rate say; let the windows be longer. And
    if it is at rest, training at a smaller learning rate may still raise it.

    Args:
        window: Epochs of a window, a multiple of five.
        tolerance: Change of the ELBO, in nats per row and window, that is not worth another window. If it is below
            the noise, about four standard deviations of an epoch over the root of the window, the rule never holds.
        alpha: Probability of stopping an ELBO that still rises by the tolerance.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Dhaka, Catalina, Andersen, Magnusson, Huggins and Vehtari, "Robust, accurate stochastic optimization for
        variational inference", 2020, https://arxiv.org/abs/2009.00666, stop where R-hat says that two halves agree.

    Example:
        >>> rule = Plateau(window=10)
        >>> rising = [-1 / epoch for epoch in range(1, 101)]
        >>> rule.first(rising)
        70
        >>> rule(rising[:60]), rule(rising[:70])
        (False, True)
    """

    window: int = 50
    tolerance: float = 0.01
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if not is_integer(self.window) or self.window < 2 * _BATCHES or self.window % _BATCHES:
            raise ValueError(f"Plateau: argument `window` must be a multiple of 5 from 10 on; got {self.window!r}")
        if not is_within(self.tolerance, above=0):
            raise ValueError(f"Plateau: argument `tolerance` must be finite and > 0; got {self.tolerance!r}")
        if not is_within(self.alpha, 0, 0.5, above=0) or self.alpha == 0.5:
            raise ValueError(f"Plateau: argument `alpha` must be in (0, 0.5); got {self.alpha!r}")

    def on_fit_start(self, run: Run) -> None:
        """Stop a fit that is resumed where it was stopped."""
        self.on_epoch(run)

    def on_epoch(self, run: Run) -> None:
        """Stop if the rule holds."""
        run.result.converged = self(run.result.elbo[run.settled :])
        if run.result.converged:
            run.stop()

    def __call__(self, elbo: Sequence[float]) -> bool:
        """Say whether to stop after these epochs; never between the ends of two windows."""
        if len(elbo) < 2 * self.window or len(elbo) % self.window:
            return False
        gain, margin = self.gain(elbo)
        return abs(gain) + margin < self.tolerance

    def gain(self, elbo: Sequence[float]) -> tuple[float, float]:
        """Compare the last window with the one before.

        Args:
            elbo: ELBO of each epoch, in nats per row; at least two windows.

        Returns:
            By how much its mean is larger, and the margin of error: that of the test which follows this many epochs.

        Raises:
            ValueError: If there are fewer than two windows.
        """
        if len(elbo) < 2 * self.window:
            raise ValueError(f"Plateau: `elbo` must have two windows, {2 * self.window} epochs; got {len(elbo)}")
        means = torch.tensor(elbo[-2 * self.window :], dtype=torch.float64).reshape(2, _BATCHES, -1).mean(-1)
        errors = means - means.mean(-1, keepdim=True)
        squares, degrees = errors.square().sum().item(), 2 * (_BATCHES - 1)
        variance = 2 * squares / degrees / _BATCHES
        if squares > 0:
            # Deviations from a mean of five sum to zero, for which 1/5 makes up.
            rho = (errors[:, 1:] * errors[:, :-1]).sum().item() / squares + 1 / _BATCHES
            rho = min(max(rho, 0.0), 0.9)
            variance *= (1 + rho) / (1 - rho)
        test = len(elbo) // self.window - 1
        margin = _student_quantile(self.alpha / (test * (test + 1)), degrees) * math.sqrt(variance)
        return (means[1].mean() - means[0].mean()).item(), margin

    def first(self, elbo: Sequence[float]) -> int | None:
        """Return the number of epochs after which the rule first holds, or None if it never does."""
        ends = range(2 * self.window, len(elbo) + 1, self.window)
        return next((end for end in ends if self(elbo[:end])), None)


def _student_quantile(level: float, degrees: int) -> float:
    """Return the upper quantile of Student's law; Wallace (1959), to half a percent for 8 degrees of freedom."""
    z = NormalDist().inv_cdf(1 - level) * (8 * degrees + 3) / (8 * degrees + 1)
    return math.sqrt(degrees * math.expm1(z**2 / degrees))
