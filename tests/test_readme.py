"""The numbers in the README are those of the committed results."""

import json
from pathlib import Path

import pytest

from benchmarks import masks, matryoshka, nested_nets_report, nested_speed, ordered_latents_report, ordered_speed
from benchmarks.tables import Rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def test_demo_tables():
    metrics = result("demo_digits.json")
    assert metrics["header"]["command"] == "python -m models demo --data digits --seed 0"
    for row in metrics["classifier"]["widths"]:
        assert f"| {row['width']:.3f} | {row['accuracy']:.3f} | {row['nll']:.3f} | {row['ece']:.3f} |" in README
    errors = " | ".join(f"{1000 * error:.1f}" for error in metrics["vae"]["mse"].values())
    assert f"| test MSE x 1000 | {errors} |" in README


@pytest.mark.parametrize(
    ("benchmark", "name"),
    [
        (masks, "masks.json"),
        (nested_nets_report, "nested_nets.json"),
        (nested_speed, "nested_speed.json"),
        (ordered_latents_report, "ordered_latents.json"),
        (ordered_speed, "ordered_speed.json"),
    ],
)
def test_benchmark_tables(benchmark, name):
    for paragraph in benchmark.markdown(result(name)).split("\n\n"):
        assert paragraph in README


def test_targets_of_ordered_latents():
    rows = Rows(result("ordered_latents.json"), "model", "prefix", ordered_latents_report.LABELS)
    assert ordered_latents_report.targets_table(rows) in README


def test_tables_of_embeddings():
    page = (ROOT / "docs" / "other_models.md").read_text()
    for paragraph in matryoshka.markdown(result("matryoshka.json")).strip().split("\n\n"):
        assert paragraph in page


def test_images_exist():
    images = [line.split("](")[1].rstrip(")") for line in README.splitlines() if line.startswith("![")]
    assert images
    assert all((ROOT / image).is_file() for image in images)
