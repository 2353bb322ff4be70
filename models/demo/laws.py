"""What a fit has learned about lengths, in numbers, in words and in a figure."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch.distributions import kl_divergence

from models.report import Report
from pyro_vnd.diagnostics import plot_keep_probs
from pyro_vnd.distributions import OrderedMask

# Up to which total variation a law has hardly moved, and up to which it still shows its prior.
HARDLY, PARTLY = 0.2, 0.5

MEANINGS = {
    "E[L], sd[L]": "mean and standard deviation of the length, the number of units kept.",
    "entropy": "how spread the law is, in nats: zero if it is sure of one length, log K if all K are equally likely.",
    "total variation": "the share of the probability that has moved away from where the prior has it: zero for the "
    "prior itself, one if nothing is where it was.",
}


@dataclass(frozen=True)
class LawBesidePrior:
    """A law beside its prior; where there is a law for each image, means over the images.

    Attributes:
        mean: E[L], in units.
        stddev: Standard deviation of L.
        entropy: In nats.
        prior_mean: E[L] under the prior.
        prior_stddev: Standard deviation under the prior.
        prior_entropy: Entropy of the prior.
        total_variation: Half the sum over lengths of |q - p|: the share of the mass that has moved.
        kl: KL divergence from the prior, in nats.
        stddev_between: Standard deviation over images of their E[L]; zero where they share one law.
        less_likely: Lengths less likely than under the prior, by their mean probabilities.
        num_units: K.
    """

    mean: float
    stddev: float
    entropy: float
    prior_mean: float
    prior_stddev: float
    prior_entropy: float
    total_variation: float
    kl: float
    stddev_between: float
    less_likely: str
    num_units: int

    @classmethod
    def of(cls, law: OrderedMask, prior: OrderedMask) -> "LawBesidePrior":
        """Compare a law, of any batch shape, with its prior, which has none."""
        probs = law.probs.reshape(-1, law.num_units).mean(0)
        return cls(
            mean=law.mean_length.mean().item(),
            stddev=law.stddev_length.mean().item(),
            entropy=law.entropy().mean().item(),
            prior_mean=prior.mean_length.item(),
            prior_stddev=prior.stddev_length.item(),
            prior_entropy=prior.entropy().item(),
            total_variation=0.5 * (law.probs - prior.probs).abs().sum(-1).mean().item(),
            kl=kl_divergence(law, prior).mean().item(),
            stddev_between=law.mean_length.std(correction=0).item(),
            less_likely=_ranges((1 + (probs < prior.probs).nonzero().flatten()).tolist()),
            num_units=law.num_units,
        )

    def verdict(self) -> str:
        """Say how far the law is from its prior, and where it has lost probability."""
        distance, where = self.total_variation, "longer" if self.mean > self.prior_mean else "shorter"
        if distance < HARDLY:
            words = "the law has hardly left its prior: the data say little about the length."
        elif distance < PARTLY:
            words = f"the law has moved part of the way, to {where} lengths; the prior still shows."
        else:
            words = f"the law is far from its prior, at {where} lengths: the data decide."
        lost = f" Less likely than a priori: lengths {self.less_likely}." if self.less_likely else ""
        return f"Total variation to the prior {distance:.2f}; {words}{lost}"


def _ranges(numbers: Iterable[int]) -> str:
    """Format increasing numbers, 1, 2, 3, 7 say, as "1-3, 7"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ", ".join("-".join(map(str, ends)) for ends in found)


def describe(report: Report, laws: Mapping[str, OrderedMask], prior: OrderedMask) -> dict[str, Any]:
    """Add what laws have learned to a report: a table and a sentence about each.

    Args:
        report: The report.
        laws: Learned laws by site.
        prior: Their prior.

    Returns:
        The numbers, by site.
    """
    learned = {site: LawBesidePrior.of(law, prior) for site, law in laws.items()}
    cells = [
        [site, f"{law.mean:.1f}", f"{law.stddev:.1f}", f"{law.entropy:.2f}", f"{law.total_variation:.2f}"]
        for site, law in learned.items()
    ]
    first = next(iter(learned.values()))
    cells.append(
        ["prior", f"{first.prior_mean:.1f}", f"{first.prior_stddev:.1f}", f"{first.prior_entropy:.2f}", "0.00"]
    )
    report.table(("law of", "E[L]", "sd[L]", "entropy", "total variation to the prior"), cells)
    for site, law in learned.items():
        report.text(f"{site}: {law.verdict()}")
    return {site: asdict(law) for site, law in learned.items()}


def figure(posterior: Any, laws: Mapping[str, OrderedMask], prior: OrderedMask) -> Figure:
    """Plot probabilities of lengths and keep probabilities of units, with those of the prior dashed.

    Args:
        posterior: Draws of the masks, as `to_arviz` returned them.
        laws: Learned laws by site.
        prior: Their prior.
    """
    drawing, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    lengths = range(1, prior.num_units + 1)
    for site, law in laws.items():
        left.plot(lengths, law.probs.reshape(-1, law.num_units).mean(0), marker=".", label=site)
    left.plot(lengths, prior.probs, "k--", linewidth=1, label="prior")
    left.set(xlabel="length (units kept)", ylabel="probability", ylim=(0, None), title="lengths")
    left.legend()
    plot_keep_probs(posterior, list(laws), ax=right)
    right.plot(lengths, prior.keep_probs, "k--", linewidth=1, label="prior")
    right.legend(title=right.get_legend().get_title().get_text())
    right.set_title("units")
    return drawing
