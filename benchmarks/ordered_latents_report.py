"""Tables, figures and targets of the benchmark of ordered latents, made from its committed rows."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from benchmarks.ordered_latents import FIXED, MODELS, PREFIXES
from benchmarks.record import markdown_table
from benchmarks.tables import Rows

LABELS = {
    "plain": "plain",
    "fixed_geometric": "nested dropout, geometric",
    "fixed_uniform": "nested dropout, uniform",
    "vnd": "ours",
    "pca": "principal components",
}
NAMES = {
    "vae": "VAE",
    "vae_our_parts": "VAE, our parts",
    "beta_vae": "beta-VAE",
    "wae": "WAE",
    "vqvae_tokens": "VQ-VAE, tokens",
    "vqvae_dims": "VQ-VAE, dimensions",
    "linear": "linear VAE",
}
METRICS = {"vae": ("mse", "elbo", "fid_samples", "probe_accuracy"), "vae_our_parts": ("mse", "elbo", "fid_samples")}
# Metric: caption, factor, digits.
PANELS = {
    "mse": ("MSE x 1000", 1000.0, 1),
    "elbo": ("ELBO, nats", 1.0, 0),
    "fid_samples": ("FID of samples", 1.0, 0),
    "probe_accuracy": ("linear probe", 1.0, 3),
}


def targets(rows: Rows) -> list[dict[str, Any]]:
    """Compare the ordered VAE with what it has to reach: a value and its limit, at each prefix or at full length."""

    def vae(method: str, prefix: int | str, metric: str) -> float:
        return rows.mean("vae", method, prefix, metric)

    found: list[dict[str, Any]] = []
    full = PREFIXES[-1]
    for prefix in PREFIXES:
        ours = vae("vnd", prefix, "mse")
        for model, whose in {"vae": "better fixed law's", "vae_our_parts": "better fixed law's with our parts"}.items():
            better = min(rows.mean(model, method, prefix, "mse") for method in FIXED)
            found.append({"what": f"MSE / {whose}", "prefix": prefix, "value": ours / better, "limit": 1.02})
        components = rows.mean("linear", "pca", prefix, "mse")
        found.append({"what": "MSE / principal components'", "prefix": prefix, "value": ours / components, "limit": 1})
    whole: dict[str, tuple[str, int | str, float]] = {
        "MSE / ": ("mse", full, 1.05),
        "ELBO, share that is lost to the ": ("elbo", full, 0.02),
        "FID of samples at full length / ": ("fid_samples", full, 1),
        "FID of samples with lengths from the prior / ": ("fid_samples_prior", "law", 1),
    }
    for model, whose in {"vae": "plain VAE's", "vae_our_parts": "plain VAE's with our parts"}.items():
        for what, (metric, where, limit) in whole.items():
            value = vae("vnd", where, metric) / rows.mean(model, "plain", where, metric)
            value = 1 - value if metric == "elbo" else value
            found.append({"what": what + whose, "prefix": full, "value": value, "limit": limit})
    return [row | {"met": row["value"] <= row["limit"]} for row in found]


def targets_table(rows: Rows) -> str:
    """Format the targets: a line a target, a column a prefix; what is missed is in bold."""
    found = targets(rows)
    body = []
    for what in dict.fromkeys(row["what"] for row in found):
        by_prefix = {row["prefix"]: row for row in found if row["what"] == what}
        cells = []
        for prefix in PREFIXES:
            row = by_prefix.get(prefix)
            text = "-" if row is None else f"{row['value']:.3f}"
            cells.append(text if row is None or row["met"] else f"**{text}**")
        body.append([what, f"at most {next(iter(by_prefix.values()))['limit']:g}", *cells])
    return markdown_table(["the VAE, ours", "target", *map(str, PREFIXES)], body)


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Plot the metrics against the length of the code: all of the VAE's, the error of the other models."""
    rows = _rows(result)
    return {"ordered_vae": _vae_figure(rows), "ordered_others": _others_figure(rows)}


def _vae_figure(rows: Rows) -> Figure:
    drawn, axes = plt.subplots(2, 2, figsize=(8, 6.6), layout="constrained")
    for ax, metric in zip(axes.flat, PANELS, strict=True):
        for method in rows.methods:
            _draw(rows, ax, "vae", method, metric)
        for method in ("plain", *FIXED):
            label = f"{LABELS[method]}, our parts"
            _draw(rows, ax, "vae_our_parts", method, metric, label=label, linestyle="--", markerfacecolor="none")
        _label(ax, metric, PANELS[metric][0])
    _legend(drawn, ncols=3)
    return drawn


def _others_figure(rows: Rows) -> Figure:
    drawn, axes = plt.subplots(2, 2, figsize=(8, 6.4), layout="constrained")
    for ax, model in zip(axes.flat, ("wae", "vqvae_tokens", "vqvae_dims", "linear"), strict=True):
        for method in rows.methods:
            _draw(rows, ax, model, method, "mse")
        _label(ax, "mse", f"{NAMES[model]}: {PANELS['mse'][0]}")
    _legend(drawn, ncols=3)
    return drawn


def _draw(rows: Rows, ax: Axes, model: str, method: str, metric: str, **style: Any) -> None:
    # Codes of a plain model that are cut are so far off that nothing else could be seen.
    whole_only = method == "plain" and metric != "probe_accuracy"
    rows.draw(ax, model, method, metric, PREFIXES[-1:] if whole_only else PREFIXES, PANELS[metric][1], **style)


def _label(ax: Axes, metric: str, title: str) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(PREFIXES, [str(k) for k in PREFIXES])
    if metric in ("mse", "fid_samples"):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="length of the code", title=title)


def _legend(drawn: Figure, ncols: int) -> None:
    handles = {
        label: handle for ax in drawn.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols, frameon=False)


def markdown(result: dict[str, Any]) -> str:
    """Format the tables of the page: for each model the metrics that it has, by length of the code, and targets."""
    rows = _rows(result)
    parts = []
    for model in (name for name in MODELS if name in rows.fitted):
        parts.append(f"## {NAMES[model]}")
        for metric in METRICS.get(model, ("mse",)):
            label, factor, digits = PANELS[metric]
            if any(key[0] == model and key[3] == metric for key in rows.values):
                table = rows.table(model, metric, PREFIXES, digits, factor)
                parts.append(table.replace(f"| {metric} |", f"| {label} |", 1))
    return "\n\n".join([*parts, "## Targets", targets_table(rows)])


def _rows(result: dict[str, Any]) -> Rows:
    return Rows(result, "model", "prefix", LABELS)
