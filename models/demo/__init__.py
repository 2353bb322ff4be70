"""The main job from end to end: two models with learned order, trained on real images by SVI, and a report on them."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.datasets import load
from models.demo import autoencoder, classifier
from models.demo.settings import SETTINGS
from models.output import atomic_folder, is_first_process, versions
from models.report import Report

__all__ = ["SETTINGS", "run"]


def run(data_name: str, out: Path, *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Train both models, print their tables, and write report.html, metrics.json, posterior.nc and the figures.

    Of several processes, as torchrun starts them, all train, and the first one does the rest.

    Args:
        data_name: A data set that `SETTINGS` has.
        out: Folder for the results; it is made, and changed only once everything is there.
        seed: Seed of all trainings.
        quick: Whether to train for a few steps only.

    Returns:
        The content of metrics.json; of other processes than the first, nothing.

    Raises:
        ValueError: If the demo has no settings for the data set, or it is corrupt.
        OSError: If data are missing or the folder cannot be written.
    """
    if data_name not in SETTINGS:
        raise ValueError(f"no settings for data set {data_name!r}; the demo runs on {', '.join(SETTINGS)}")
    started = time.perf_counter()
    data = load(data_name, flatten=True)
    settings = SETTINGS[data_name].quick() if quick else SETTINGS[data_name]
    if not is_first_process():
        classifier.train(data, settings, seed)
        autoencoder.train(data, settings, seed)
        return {}
    with atomic_folder(out) as folder:
        report = Report(f"Learned order on {data.name}", folder)
        metrics: dict[str, Any] = {"header": {}}
        metrics["classifier"] = classifier.run(data, settings, seed, report)
        metrics["vae"] = autoencoder.run(data, settings, seed, report)
        metrics["header"] = {
            "command": f"python -m models demo --data {data.name} --seed {seed}" + (" --quick" if quick else ""),
            "settings": asdict(settings),
            "versions": versions(),
            "seconds": round(time.perf_counter() - started, 1),
        }
        report.footer(metrics["header"])
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        (folder / "report.html").write_text(report.html())
    print(f"\nreport: {out / 'report.html'} ({metrics['header']['seconds']:.0f} s)")
    return metrics
