"""What a fit did: the ELBO and its parts by epoch, and the learned laws of lengths."""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from pyro_vnd.distributions import NestedLaw, OrderedMask

__all__ = ["FitResult", "LengthCollapseWarning", "LengthSummary"]

_COLLAPSED = 0.05  # nats of entropy: for two lengths, odds of about 100 to 1


class LengthCollapseWarning(UserWarning):
    """A learned law of lengths has put all its mass on one length."""


@dataclass(frozen=True)
class LengthSummary:
    """What a law of lengths looks like, averaged over its batch shape.

    Attributes:
        mean: E L, in units.
        stddev: sd L, in units.
        entropy: Entropy of L, in nats.
        num_units: K.
    """

    mean: float
    stddev: float
    entropy: float
    num_units: int

    @classmethod
    @torch.no_grad()
    def of(cls, law: OrderedMask | NestedLaw) -> "LengthSummary":
        """Summarise a law, taking the mean over its batch."""
        lengths = law.mask_law if isinstance(law, NestedLaw) else law
        return cls(
            mean=lengths.mean_length.mean().item(),
            stddev=lengths.stddev_length.mean().item(),
            entropy=lengths.entropy().mean().item(),
            num_units=lengths.num_units,
        )

    def __str__(self) -> str:
        return f"E[L] = {self.mean:.1f}, sd[L] = {self.stddev:.1f} of {self.num_units}, entropy {self.entropy:.2f} nats"


@dataclass
class FitResult:
    """What `fit` did; parts of the ELBO are in nats per row of the data, each the mean over the steps of an epoch.

    Attributes:
        elbo: Objective of each epoch: the ELBO, with weighted KLs where `fit` was given weights.
        log_likelihood: Its likelihood part, E log p(data | latents).
        kl: Its KL part, weighted as in the objective, so that elbo = log_likelihood - kl; both are nan where a site is
            enumerated.
        kl_latents: KL of all latents that are no masks, without weights: how far weights and codes are from their
            prior, also while a weight is still rising. A `NestedNormal` is among them, lengths and all.
        kl_lengths: KL of all masks, without weights. At weights of one, kl = kl_latents + kl_lengths; both are nan
            where the objective is no `NestedELBO`.
        validation_log_likelihood: Log-likelihood of the validation data after each epoch, if there are any.
        lengths: The law of each mask site at the end.
        mean_length: E L of each mask site in each epoch.
        converged: Whether the rule that `fit` was given as `stop` held, which ended training after the last epoch here.
        num_steps: Steps of the optimiser.
        seconds: Wall-clock time.
    """

    elbo: list[float] = field(default_factory=list)
    log_likelihood: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    kl_latents: list[float] = field(default_factory=list)
    kl_lengths: list[float] = field(default_factory=list)
    validation_log_likelihood: list[float] = field(default_factory=list)
    lengths: dict[str, LengthSummary] = field(default_factory=dict)
    mean_length: dict[str, list[float]] = field(default_factory=dict)
    converged: bool = False
    num_steps: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        epochs = f"{len(self.elbo)} epochs{', converged' if self.converged else ''}"
        lines = [
            f"{epochs}, {self.num_steps} steps in {self.seconds:.1f} s; nats per row: ELBO "
            f"{self.elbo[-1]:.4g} = log-likelihood {self.log_likelihood[-1]:.4g} - KL {self.kl[-1]:.4g}"
        ]
        if not math.isnan(self.kl_latents[-1]):
            lines.append(f"KL of latents {self.kl_latents[-1]:.4g}, of lengths {self.kl_lengths[-1]:.4g}")
        if self.validation_log_likelihood:
            lines.append(f"log-likelihood of the validation data {self.validation_log_likelihood[-1]:.4g}")
        return "\n".join(lines + [f"{name}: {summary}" for name, summary in self.lengths.items()])

    def add_epoch(self, parts: Sequence[float], laws: Mapping[str, OrderedMask | NestedLaw]) -> None:
        """Record an epoch.

        Args:
            parts: Mean objective, log-likelihood, KL of the latents that are no masks, and of the masks, in nats per
                row.
            laws: Laws of lengths at its end, by site.
        """
        elbo, log_likelihood, kl_latents, kl_lengths = parts
        self.elbo.append(elbo)
        self.log_likelihood.append(log_likelihood)
        self.kl.append(log_likelihood - elbo)
        self.kl_latents.append(kl_latents)
        self.kl_lengths.append(kl_lengths)
        self.lengths = {name: LengthSummary.of(law) for name, law in laws.items()}
        for name, summary in self.lengths.items():
            self.mean_length.setdefault(name, []).append(summary.mean)

    def progress(self) -> str:
        """Say in one line where the fit stands."""
        parts = [f"ELBO={self.elbo[-1]:.4g}", f"log-lik={self.log_likelihood[-1]:.4g}", f"KL={self.kl[-1]:.3g}"]
        if self.validation_log_likelihood:
            parts.append(f"validation={self.validation_log_likelihood[-1]:.4g}")
        return ", ".join([*parts, *(f"E[L {name}]={summary.mean:.1f}" for name, summary in self.lengths.items())])

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
                    "widths, too (schedule=MaskSchedule()), or raise length_weight.",
                    LengthCollapseWarning,
                    stacklevel=3,
                )
