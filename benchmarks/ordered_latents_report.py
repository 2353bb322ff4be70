"""Tables, figure and targets of the benchmark of ordered latents, made from its committed rows."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from benchmarks.ordered_latents import FIXED, MODELS, PREFIXES, RESULTS
from benchmarks.record import markdown_table
from benchmarks.tables import Rows

FIGURE = Path(__file__).parents[1] / "docs" / "images" / "ordered_latents.png"
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
    whole = {
        "MSE / ": ("mse", full, 1.05),
        "ELBO, share that is lost to the ": ("elbo", full, 0.02),
        "FID of samples at full length / ": ("fid_samples", full, 1),
        "FID of samples with lengths from the prior / ": ("fid_samples_prior", "law", 1),
    }
    for model, whose in {"vae": "plain VAE's", "vae_our_parts": "plain VAE's with our parts"}.items():
        for what, (metric, prefix, limit) in whole.items():
            value = vae("vnd", prefix, metric) / rows.mean(model, "plain", prefix, metric)
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


def figure(rows: Rows) -> Figure:
    """Plot the metrics against the length of the code, a row of panels for each model with several methods."""
    models = [name for name in MODELS if {"plain", "fixed_uniform"} <= _methods(rows, name)]
    drawn, axes = plt.subplots(
        len(models), len(PANELS), figsize=(3.3 * len(PANELS), 2.5 * len(models)), layout="constrained", squeeze=False
    )
    for line, model in zip(axes, models, strict=True):
        for ax, (metric, (label, factor, _)) in zip(line, PANELS.items(), strict=True):
            for method in rows.methods:
                # Codes of a plain model that are cut are so far off that nothing else could be seen.
                whole_only = method == "plain" and metric != "probe_accuracy"
                # Linear decoders, and tokens drawn without a law of which go together, make no images.
                if metric != "fid_samples" or model in ("vae", "vae_our_parts", "wae"):
                    rows.draw(ax, model, method, metric, PREFIXES[-1:] if whole_only else PREFIXES, factor)
            if not ax.has_data():
                ax.set_axis_off()
                continue
            ax.set_xscale("log", base=2)
            ax.set_xticks(PREFIXES, [str(k) for k in PREFIXES])
            if metric in ("mse", "fid_samples"):
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter(ScalarFormatter())
                ax.yaxis.set_minor_formatter(NullFormatter())
            if metric == "fid_samples":
                ax.set_ylim(top=min(ax.get_ylim()[1], 1500))  # a fit that went astray would hide the rest
            ax.set(xlabel="code length", title=f"{NAMES[model]}: {label}")
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    return drawn


def _methods(rows: Rows, model: str) -> set[str]:
    return {key[1] for key in rows.values if key[0] == model}


def markdown(result: dict[str, Any]) -> str:
    """Format the tables of the README: for each model the metrics that it has, by length of the code."""
    rows = Rows(result, "model", "prefix", LABELS)
    parts = []
    for model in (name for name in MODELS if name in rows.fitted):
        for metric in METRICS.get(model, ("mse",)):
            label, factor, digits = PANELS[metric]
            if any(key[0] == model and key[3] == metric for key in rows.values):
                table = rows.table(model, metric, PREFIXES, digits, factor)
                parts.append(table.replace(f"| {metric} |", f"| {NAMES[model]}: {label} |", 1))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Print tables and targets, and draw the figure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ordered_latents_report", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="rows to read")
    parser.add_argument("--figure", type=Path, default=FIGURE, metavar="FILE", help="figure to write")
    args = parser.parse_args(argv)
    result = json.loads(args.json.read_text())
    print(markdown(result))
    rows = Rows(result, "model", "prefix", LABELS)
    print(f"\n{targets_table(rows)}")
    drawn = figure(rows)
    drawn.savefig(args.figure, dpi=110)
    plt.close(drawn)


if __name__ == "__main__":
    sys.exit(main())
