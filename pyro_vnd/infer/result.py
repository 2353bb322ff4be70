"""What a fit did: the ELBO and its parts by epoch, and the learned laws of lengths."""

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.distributions.modes import most_probable, name_modes, say_modes
from pyro_vnd.distributions.nested import NestedLaw

__all__ = [
    "ElboParts",
    "FitResult",
    "LearnedLaw",
    "LengthCollapseWarning",
    "LengthSummary",
    "PoorFitWarning",
    "summaries",
]

_COLLAPSED = 0.05  # nats of entropy: for two lengths, odds of about 100 to 1
_AT_PRIOR = 0.01  # nats of KL: for two lengths, .57 where the prior has .5
_KHAT = 0.7  # where importance weights have a mean that can be estimated
_SHOWN = 10  # laws in a summary
_VALIDATION = "log-likelihood of the validation data"


class LengthCollapseWarning(UserWarning):
    """A learned law of lengths has put all its mass on one length."""


class PoorFitWarning(UserWarning):
    """A guide is far from the posterior, by its k-hat."""


class ElboParts(NamedTuple):
    """The objective of a fit and its parts: tensors of no dimension in a step, numbers in nats per row in an epoch.

    Attributes:
        elbo: The objective.
        log_likelihood: Its likelihood part.
        kl_latents: KL of the latents that are no masks, without weights.
        kl_lengths: KL of the masks and the lengths of codes, without weights.
    """

    elbo: Any
    log_likelihood: Any
    kl_latents: Any
    kl_lengths: Any

    @staticmethod
    def weighted(parts: Sequence["ElboParts"], counts: Sequence[int]) -> "ElboParts":
        """Return the mean over the evaluations of one step, each counting by its rows."""
        if len(parts) == 1:
            return parts[0]
        stacked = torch.stack([torch.stack(each) for each in parts])
        weights = torch.tensor(counts, dtype=stacked.dtype) / sum(counts)
        return ElboParts(*(weights.to(stacked.device) @ stacked))


class LearnedLaw(NamedTuple):
    """The law of the lengths at a site of the guide, and the one that it has in the model, if that is known."""

    law: OrderedMask | NestedLaw
    prior: OrderedMask | NestedLaw | None = None


@dataclass(frozen=True)
class LengthSummary:
    """What a law of lengths looks like, averaged over its batch shape.

    Attributes:
        mean: E L, in units.
        stddev: sd L, in units.
        entropy: Entropy of L, in nats.
        num_units: K.
        mode: The most probable length over the whole batch, in units.
        kl: Divergence from the prior law, in nats; None if that is not known.
        modes: All lengths whose probability is within a hundredth of the mode's, that one among them.
    """

    mean: float
    stddev: float
    entropy: float
    num_units: int
    mode: int
    kl: float | None = None
    modes: tuple[int, ...] = ()

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        law: OrderedMask | NestedLaw,
        prior: OrderedMask | NestedLaw | None = None,
        visible: Tensor | bool | None = None,
    ) -> "LengthSummary":
        """Summarise a law, taking the mean over the visible part of its batch: all of it if there is none.

        Example:
            >>> print(LengthSummary.of(OrderedMask(probs=torch.tensor([0.2, 0.5, 0.3])), OrderedMask.uniform(3)))
            E[L] = 2.1, sd[L] = 0.7, mode 2 of 3; entropy 1.03 nats, KL from its prior 0.07
        """
        lengths = law.mask_law if isinstance(law, NestedLaw) else law

        def seen(x: Tensor) -> Tensor:
            if not isinstance(visible, Tensor) or not visible.any():
                return x
            x, rows = torch.broadcast_tensors(x, visible)
            return x[rows]

        kl = None
        if prior is not None:
            kl = seen(kl_divergence(lengths, prior.mask_law if isinstance(prior, NestedLaw) else prior)).mean().item()
        probs = torch.stack([seen(p).mean() for p in lengths.probs.unbind(-1)])
        return cls(
            mean=seen(lengths.mean_length).mean().item(),
            stddev=seen(lengths.stddev_length).mean().item(),
            entropy=seen(lengths.entropy()).mean().item(),
            num_units=lengths.num_units,
            mode=1 + int(probs.argmax()),
            kl=kl,
            modes=most_probable(probs),
        )

    @property
    def left_prior(self) -> bool | None:
        """Whether the law is another one than its prior, by a hundredth of a nat; None if the prior is not known."""
        return None if self.kl is None else self.kl >= _AT_PRIOR

    def __str__(self) -> str:
        modes = say_modes(self.modes or [self.mode])
        lengths = f"E[L] = {self.mean:.1f}, sd[L] = {self.stddev:.1f}, {modes} of {self.num_units}"
        if self.kl is None:
            return f"{lengths}; entropy {self.entropy:.2f} nats"
        at_prior = "" if self.left_prior else ": it is at its prior"
        return f"{lengths}; entropy {self.entropy:.2f} nats, KL from its prior {self.kl:.2f}{at_prior}"


def summaries(laws: Mapping[str, LearnedLaw], visible: Mapping[str, Any] | None = None) -> dict[str, LengthSummary]:
    """Summarise laws by site, each over the part that is visible."""
    return {name: LengthSummary.of(*law, (visible or {}).get(name)) for name, law in laws.items()}


@dataclass(repr=False)
class FitResult:
    """What `fit` did; parts of the ELBO are in nats per row of the data, each the mean over the steps of an epoch.

    Attributes:
        elbo: Objective of each epoch: the ELBO, with weighted KLs where `fit` was given weights.
        log_likelihood: Its likelihood part, E log p(data | latents).
        kl: Its KL part, weighted as in the objective, so that elbo = log_likelihood - kl; both are nan where a site is
            enumerated.
        kl_latents: KL of all latents that are no masks, without weights: how far weights and codes are from their
            prior, also while a weight is still rising.
        kl_lengths: KL of all masks and of the lengths of each `NestedNormal`, without weights. At weights of one,
            kl = kl_latents + kl_lengths; both are nan where the objective is no `NestedELBO`.
        validation_log_likelihood: Log-likelihood of the validation data after each epoch, if there are any.
        metrics: What callbacks measured after each epoch, by name.
        lengths: The law of each mask site at the end.
        mean_length: E L of each mask site in each epoch.
        khat: k-hat of the guide, of a Pyro autoguide without latents in the plate of the data: above 0.7 it misses mass
            of the posterior. None where it was not estimated.
        converged: Whether a `Plateau` ended training after the last epoch here.
        num_steps: Steps of the optimiser.
        seconds: Wall-clock time.
    """

    elbo: list[float] = field(default_factory=list)
    log_likelihood: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    kl_latents: list[float] = field(default_factory=list)
    kl_lengths: list[float] = field(default_factory=list)
    validation_log_likelihood: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    lengths: dict[str, LengthSummary] = field(default_factory=dict)
    mean_length: dict[str, list[float]] = field(default_factory=dict)
    khat: float | None = None
    converged: bool = False
    num_steps: int = 0
    seconds: float = 0.0

    def __repr__(self) -> str:
        laws = [f"{name}: {summary}" for name, summary in list(self.lengths.items())[:_SHOWN]]
        return "\n".join([self._headline(), *self._sentences(), *laws, *self._more()])

    def _repr_html_(self) -> str:
        """Show, in a notebook, the parts of the ELBO at the end and the laws of lengths."""
        laws = [
            [
                escape(name),
                f"{law.mean:.1f}",
                f"{law.stddev:.1f}",
                f"{name_modes(law.modes or [law.mode])} of {law.num_units}",
                f"{law.entropy:.2f}",
                "" if law.kl is None else f"{law.kl:.2f}{'' if law.left_prior else ', at its prior'}",
            ]
            for name, law in list(self.lengths.items())[:_SHOWN]
        ]
        laws += [[more] for more in self._more()]
        header = ["law of lengths", "mean", "sd", "mode", "entropy, nats", "KL from prior, nats"]
        parts = [[escape(name), f"{value:.4g}"] for name, value in self._parts().items()]
        tables = _table(["at the end", "nats per row"], parts) + (_table(header, laws) if laws else "")
        return f"<p>{escape(self._headline())}</p>{tables}"

    def _more(self) -> list[str]:
        """Say of how many laws there is no line, and how many of them are at their prior."""
        rest = list(self.lengths.values())[_SHOWN:]
        at_prior = sum(law.left_prior is False for law in rest)
        return [f"and {len(rest)} more laws, in `lengths`, {at_prior} of them at their prior"] if rest else []

    def _headline(self) -> str:
        converged = ", converged" if self.converged else ""
        return f"{len(self.elbo)} epochs{converged}, {self.num_steps} steps in {self.seconds:.1f} s"

    def _parts(self) -> dict[str, float]:
        """The last entry of each part of the ELBO that there is."""
        parts = {
            "ELBO": self.elbo,
            "log-likelihood": self.log_likelihood,
            "KL": self.kl,
            "KL of latents": self.kl_latents,
            "KL of lengths": self.kl_lengths,
            _VALIDATION: self.validation_log_likelihood,
        }
        return {name: values[-1] for name, values in parts.items() if values and not math.isnan(values[-1])}

    def _sentences(self) -> list[str]:
        shown = {name: f"{value:.4g}" for name, value in self._parts().items()}
        if "ELBO" not in shown:
            return []
        terms = f" = log-likelihood {shown['log-likelihood']} - KL {shown['KL']}" if "KL" in shown else ""
        lines = [f"nats per row: ELBO {shown['ELBO']}{terms}"]
        if "KL of latents" in shown:
            lines.append(f"KL of latents {shown['KL of latents']}, of lengths {shown['KL of lengths']}")
        if self.khat is not None:
            lines.append(f"k-hat of the guide {self.khat:.3g}, {'above' if self.khat > _KHAT else 'below'} {_KHAT}")
        moving = [name for name in self.lengths if self.still_moves(name)]
        if moving:
            names = ", ".join(moving[:_SHOWN])
            lines.append(f"still moving in the last tenth of the epochs: the mean length of {names}; train for longer")
        return lines + [f"{name} {value}" for name, value in shown.items() if name == _VALIDATION]

    def still_moves(self, name: str) -> bool:
        """Say whether the mean length of a site moved in the last tenth of the epochs, by 1 % of its units or more.

        Of a law that has come to rest its mean length goes up and down; what moves goes one way.
        """
        history = self.mean_length.get(name, [])
        if len(history) < 20:
            return False
        last = history[-(len(history) // 10) - 1 :]
        way = abs(last[-1] - last[0])
        path = sum(abs(b - a) for a, b in pairwise(last))
        return way > 0.01 * self.lengths[name].num_units and way > 0.5 * path

    def add_epoch(
        self, parts: ElboParts, laws: Mapping[str, LearnedLaw], visible: Mapping[str, Any] | None = None
    ) -> None:
        """Record an epoch.

        Args:
            parts: Their means over the steps, in nats per row.
            laws: Laws of lengths at its end, by site.
            visible: Rows of them that the model does not hide, by site, where it has a mask.
        """
        self.elbo.append(parts.elbo)
        self.log_likelihood.append(parts.log_likelihood)
        self.kl.append(parts.log_likelihood - parts.elbo)
        self.kl_latents.append(parts.kl_latents)
        self.kl_lengths.append(parts.kl_lengths)
        self.describe_laws(laws, visible)
        for name, summary in self.lengths.items():
            self.mean_length.setdefault(name, []).append(summary.mean)

    def describe_laws(self, laws: Mapping[str, LearnedLaw], visible: Mapping[str, Any] | None = None) -> None:
        """Keep what laws of lengths look like, as in `add_epoch`."""
        self.lengths = self.lengths | summaries(laws, visible)

    def progress(self) -> str:
        """Say in one line where the fit stands."""
        parts = [f"ELBO={self.elbo[-1]:.4g}", f"log-lik={self.log_likelihood[-1]:.4g}", f"KL={self.kl[-1]:.3g}"]
        if self.validation_log_likelihood:
            parts.append(f"validation={self.validation_log_likelihood[-1]:.4g}")
        parts += [f"{name}={values[-1]:.4g}" for name, values in self.metrics.items() if values]
        return ", ".join([*parts, *(f"E[L {name}]={summary.mean:.1f}" for name, summary in self.lengths.items())])

    def warn_of_poor_fit(self, *, knows_lengths: bool) -> None:
        """Warn of a guide with a large k-hat.

        Args:
            knows_lengths: Whether its other latents know the lengths of masks.
        """
        if self.khat is None or self.khat <= _KHAT:
            return
        cure = "" if knows_lengths else "let other latents know the lengths, AutoNested(model, latents='conditional'); "
        warnings.warn(
            f"k-hat of the guide is {self.khat:.3g}: above {_KHAT} it misses mass of the posterior, and what it says "
            f"of lengths may be wrong. Train for longer, perhaps at a lower `lr`; {cure}or compare with MCMC. "
            "warnings.simplefilter('ignore', PoorFitWarning) hides this",
            PoorFitWarning,
            stacklevel=3,
        )

    def warn_of_collapse(self, given: Collection[str] = ()) -> None:
        """Warn of laws that have put all their mass on one length.

        Args:
            given: Sites whose law is not learned.
        """
        for name, summary in self.lengths.items():
            if name not in given and summary.num_units > 1 and summary.entropy < _COLLAPSED:
                warnings.warn(
                    f"the law of lengths at site {name!r} has collapsed ({summary}). If the length itself is what you "
                    "infer, that may be the posterior. If every prefix is to be useful: draw a mask for each row "
                    '(mask_per="example" of a nested net, or the site in the plate of the data), train at fixed '
                    "widths, too (schedule=MaskSchedule()), or raise the weight, KLWeights(lengths=...).",
                    LengthCollapseWarning,
                    stacklevel=3,
                )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [("th", header), *(("td", row) for row in rows)]
    cells = ("".join(f"<{tag}>{cell}</{tag}>" for cell in line) for tag, line in lines)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"
