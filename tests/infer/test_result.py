"""What a fit returns: its laws in numbers, and what it shows in a notebook and in print."""

import math
from html.parser import HTMLParser

import pyro
import pyro.distributions as dist
import pytest
import torch
from masked_mean import K, MaskedMeanGuide, masked_mean, still
from torch.distributions import kl_divergence

from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.infer import AutoNested, FitResult, LengthCollapseWarning, fit
from pyro_vnd.infer.result import ElboParts, LearnedLaw, LengthSummary

PROBS = torch.tensor([[0.1, 0.6, 0.1, 0.2], [0.1, 0.1, 0.5, 0.3], [0.3, 0.5, 0.1, 0.1]])


class Cells(HTMLParser):
    """The text of the cells of all tables, row by row."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.text = [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.text = tag

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.text = None

    def handle_data(self, data):
        if self.text:
            self.rows[-1][-1] += data


def as_code(mask):
    return NestedNormal(torch.zeros(K), torch.ones(K), probs=mask.probs)


@pytest.mark.parametrize("wrap", [lambda mask: mask, as_code], ids=["mask", "code"])
def test_a_summary_is_the_mean_over_a_batch(wrap):
    law, prior = OrderedMask(probs=PROBS), OrderedMask.geometric(0.5, K)
    summary = LengthSummary.of(wrap(law), wrap(prior))
    assert summary.mean == pytest.approx(law.mean_length.mean().item())
    assert summary.stddev == pytest.approx(law.stddev_length.mean().item())
    assert summary.entropy == pytest.approx(law.entropy().mean().item())
    assert summary.kl == pytest.approx(kl_divergence(law, prior).mean().item())
    assert (summary.mode, summary.num_units) == (2, K)  # of 1.2, .7 and .6: not the mean of 2, 3 and 2
    assert str(summary).endswith(f"KL from its prior {summary.kl:.2f}")


def test_a_law_at_its_prior_is_called_so():
    prior = OrderedMask.uniform(K)
    near, far = (OrderedMask(logits=scale * torch.linspace(0, 1, K)) for scale in (0.1, 1.0))
    assert LengthSummary.of(prior, prior).left_prior is LengthSummary.of(near, prior).left_prior is False
    assert LengthSummary.of(far, prior).left_prior is True
    assert LengthSummary.of(far).left_prior is None
    assert "it is at its prior" in str(LengthSummary.of(near, prior))
    assert "prior" not in str(LengthSummary.of(near))


def test_a_fit_says_whether_laws_left_their_prior(y):
    model_prior = OrderedMask.geometric(0.5, K)
    guide = AutoNested(masked_mean, latents="mean_field")
    result = fit(masked_mean, guide, y, num_epochs=1, optimizer=still, progress=False)
    assert result.lengths["mask"].kl == pytest.approx(0, abs=1e-9)
    assert "it is at its prior" in str(result)
    moved = MaskedMeanGuide()
    result = fit(masked_mean, moved, y, num_epochs=1, optimizer=still, progress=False)
    kl = kl_divergence(OrderedMask(logits=moved.logits.detach()), model_prior).item()
    assert result.lengths["mask"].kl == pytest.approx(kl)
    assert result.lengths["mask"].left_prior


def result_of(num_epochs, num_laws):
    result = FitResult(num_steps=7 * num_epochs, seconds=1.5)
    law = LearnedLaw(OrderedMask(probs=PROBS[0]), OrderedMask.uniform(K))
    for epoch in range(num_epochs):
        result.add_epoch(
            ElboParts(-3.0 + epoch, -2.0 + epoch, 0.75, 0.25), {f"mask<{i}>": law for i in range(num_laws)}
        )
    return result


def test_print_and_notebook_show_parts_and_laws():
    result = result_of(2, 1)
    assert repr(result) == str(result)
    assert str(result).splitlines() == [
        "2 epochs, 14 steps in 1.5 s",
        "nats per row: ELBO -2 = log-likelihood -1 - KL 1",
        "KL of latents 0.75, of lengths 0.25",
        "mask<0>: E[L] = 2.4, sd[L] = 0.9, mode 2 of 4; entropy 1.09 nats, KL from its prior 0.30",
    ]
    rows = Cells(result._repr_html_()).rows
    assert rows[0] == ["at the end", "nats per row"]
    assert rows[1:4] == [["ELBO", "-2"], ["log-likelihood", "-1"], ["KL", "1"]]
    assert rows[4:6] == [["KL of latents", "0.75"], ["KL of lengths", "0.25"]]
    assert rows[6] == ["law of lengths", "mean", "sd", "mode", "entropy, nats", "KL from prior, nats"]
    assert rows[7] == ["mask<0>", "2.4", "0.9", "2 of 4", "1.09", "0.30"]


@pytest.mark.parametrize(("num_epochs", "num_laws"), [(0, 0), (1, 0), (1000, 1), (5, 200)])
def test_what_is_shown_is_short(num_epochs, num_laws):
    result = result_of(num_epochs, num_laws)
    assert len(repr(result)) < 1500
    assert len(result._repr_html_()) < 3000
    if num_laws == 200:
        more = "and 190 more laws, in `lengths`, 0 of them at their prior"
        assert repr(result).splitlines()[-1] == more
        assert Cells(result._repr_html_()).rows[-1] == [more]


def test_each_law_that_did_not_leave_its_prior_is_called_so():
    result, prior = FitResult(num_steps=1), OrderedMask.uniform(K)
    laws = {f"{i}.mask": LearnedLaw(OrderedMask(probs=PROBS[0]) if i == 1 else prior, prior) for i in range(12)}
    result.add_epoch(ElboParts(-3.0, -2.0, 0.75, 0.25), laws)
    *lines, more = str(result).splitlines()[3:]
    assert ["it is at its prior" in line for line in lines] == [i != 1 for i in range(10)]
    assert "0.mask: E[L] = 2.5, sd[L] = 1.1, modes 1-4 of 4; entropy 1.39 nats, KL from its prior 0.00: it" in lines[0]
    assert more == "and 2 more laws, in `lengths`, 2 of them at their prior"
    *rows, last = Cells(result._repr_html_()).rows[-11:]
    assert ["at its prior" in row[-1] for row in rows] == [i != 1 for i in range(10)]
    assert last == [more]


@pytest.mark.parametrize(
    ("probs", "words"),
    [
        ([0.1, 0.6, 0.3], "mode 2 of 3"),
        ([0.4, 0.2, 0.4], "modes 1 and 3 of 3"),
        ([0.25, 0.25, 0.25, 0.2499, 1e-4], "modes 1-4 of 5"),
        ([0.3, 0.05, 0.3, 0.05, 0.3], "no single mode of 5"),
        ([0.33, 0.34, 0.33], "mode 2 of 3"),
    ],
)
def test_lengths_that_tie_are_named(probs, words):
    summary = LengthSummary.of(OrderedMask(probs=torch.tensor(probs)))
    assert f", {words}; entropy" in str(summary)
    assert summary.mode in summary.modes


def test_parts_that_are_not_known_are_left_out():
    result = FitResult(num_steps=1)
    result.add_epoch(ElboParts(-3.0, math.nan, math.nan, math.nan), {})
    assert str(result).splitlines()[1:] == ["nats per row: ELBO -3"]
    assert Cells(result._repr_html_()).rows == [["at the end", "nats per row"], ["ELBO", "-3"]]


def test_validation_is_shown(y):
    result = fit(masked_mean, MaskedMeanGuide(), y, num_epochs=1, validation=y, progress=False)
    value = f"{result.validation_log_likelihood[-1]:.4g}"
    assert f"log-likelihood of the validation data {value}" in str(result)
    assert ["log-likelihood of the validation data", value] in Cells(result._repr_html_()).rows


def test_collapse_warns():
    y = torch.full((500,), 3.0)

    def model(rows):
        mask = pyro.sample("mask", OrderedMask.uniform(K))
        with pyro.plate("data", len(rows)):
            pyro.sample("y", dist.Normal(mask.sum(-1), 0.5), obs=rows)

    guide = AutoNested(model, latents="mean_field")
    with pytest.warns(LengthCollapseWarning, match=r"site 'mask' has collapsed \(E\[L\] = 3.0"):
        fit(model, guide, y, num_epochs=400, lr=0.1, progress=False)
    assert guide.laws["mask"].mode.sum() == 3
