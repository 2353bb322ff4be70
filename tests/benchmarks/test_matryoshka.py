import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity
from torchmetrics.functional.retrieval import retrieval_average_precision

from benchmarks import matryoshka
from benchmarks.matryoshka import (
    LABELS,
    METHODS,
    RECIPE,
    main,
    markdown,
    principal_components,
    retrieval_accuracy,
    scores_by_query,
    step_ratios,
    views,
)
from benchmarks.tables import Rows
from models.datasets import Split, load


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Every method, on digits, for two epochs; the second call finds all of it done."""
    folder = tmp_path_factory.mktemp("matryoshka")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # single fits go to results/
        patch.setattr(matryoshka, "RECIPE", replace(RECIPE, epochs=2, batch_size=64, num_dims=8, distil_steps=200))
        patch.setattr(
            matryoshka, "step_ratios", lambda *_: dict.fromkeys(METHODS, 1.5)
        )  # they have a test of their own
        for _ in range(2):
            main(["--data", "digits", "--seeds", "1", "--json", str(folder / "rows.json")])
            patch.setattr(matryoshka, "train", None)
    return json.loads((folder / "rows.json").read_text())


def test_rows_are_complete(result):
    found = Rows(result, "model", "prefix", LABELS)
    assert found.methods == list(LABELS)
    for method in LABELS:
        for metric in ("1-NN accuracy", "mAP@10"):
            sizes = {key[2] for key in found.values if key[1] == method and key[3] == metric}
            assert sizes == {1, 2, 3, 4, 6, 8}
            assert 0 <= found.mean("mlp", method, 8, metric) <= 1
        if method not in ("plain", "pca"):
            assert 0 < found.mean("mlp", method, 4, "classification accuracy, length by query") <= 1
            assert found.mean("mlp", method, 4, "mean length, length by query") == pytest.approx(4, abs=1.5)
    assert set(result["rows"][0]) == {"data", "model", "method", "prefix", "seed", "metric", "value"}
    assert {"command", "versions", "revision", "recipe", "part"} <= set(result["header"])


def test_only_ours_learn_a_law(result):
    found = Rows(result, "model", "prefix", LABELS)
    for method, learned in (("fixed_uniform", False), ("fixed_octaves", False), ("vnd", True), ("vnd_schedule", True)):
        laws = views(method, 8).probs.reshape(-1, 8).mean(0)
        before = (laws * torch.arange(1, 9)).sum().item()
        after = found.mean("mlp", method, "law", "mean_length")
        assert (abs(after / before - 1) > 1e-3) == learned, method
    assert found.mean("mlp", "plain", "law", "mean_length") == 8
    assert found.mean("mlp", "fixed_sizes", "law", "mean_length") == pytest.approx(14 / 3, rel=1e-3)


def test_tables(result):
    found = Rows(result, "model", "prefix", LABELS)
    text = markdown(result)
    assert text.startswith("| 1-NN accuracy | 1 | 2 | 3 | 4 | 6 | 8 |")
    assert f"| {found.mean('mlp', 'vnd', 3, 'mAP@10'):.3f} |" in text
    assert "| plain | 8.0 | 1.50 |" in text


def test_steps_are_timed_against_plain():
    data, recipe = load("digits"), replace(RECIPE, batch_size=32, num_dims=8)
    torch.set_default_dtype(torch.float32)  # as the images are
    found = step_ratios(data, recipe, num_steps=1)
    assert list(found) == list(METHODS)
    assert found["plain"] == 1
    assert all(0 < ratio < 100 for ratio in found.values())


def slow_scores(index, queries, top_k, similarity):
    """One query at a time, with the average precision of torchmetrics, which wants positive scores."""
    nearest, precision = [], []
    for z, label in zip(*queries, strict=True):
        similar = similarity(index.images, z)
        relevant = index.labels == label
        nearest.append(relevant[similar.argmax()].double())
        precision.append(retrieval_average_precision(similar - similar.min() + 1, relevant, top_k=top_k).double())
    return torch.stack(nearest).mean().item(), torch.stack(precision).mean().item()


def test_retrieval_is_what_a_slow_loop_finds():
    torch.manual_seed(0)
    labels = torch.arange(300) % 4
    z = torch.nn.functional.one_hot(labels, 6) + torch.randn(300, 6)
    index, queries = Split(z[:200], labels[:200]), Split(3 * z[200:], labels[200:])
    for top_k in (1, 7):
        found = retrieval_accuracy(index, queries, top_k, chunk_size=30)
        assert list(found) == ["1-NN accuracy", f"mAP@{top_k}"]
        assert list(found.values()) == pytest.approx(
            slow_scores(index, queries, top_k, lambda rows, z: cosine_similarity(rows, z.unsqueeze(0))), abs=1e-6
        )
        # Power: neighbours by another distance do not pass for those by cosine.
        others = slow_scores(index, queries, top_k, lambda rows, z: -(rows - z).norm(dim=-1))
        assert abs(others[1] - found[f"mAP@{top_k}"]) > 0.01


def test_queries_of_one_length_are_scored_as_ever():
    torch.manual_seed(0)
    labels = torch.arange(300) % 4
    z = torch.nn.functional.one_hot(labels, 6) + torch.randn(300, 6)
    index, queries = Split(z[:200], labels[:200]), Split(z[200:], labels[200:])
    fixed = {k: retrieval_accuracy(Split(z[:200, :k], labels[:200]), Split(z[200:, :k], labels[200:])) for k in (2, 5)}
    for k, expected in fixed.items():
        assert scores_by_query(index, queries, torch.full((100,), k)) == pytest.approx(expected)
    lengths = torch.tensor([2, 5]).repeat_interleave(50)
    halves = [
        scores_by_query(index, Split(*(x[half] for x in queries)), lengths[half])
        for half in (slice(50), slice(50, 100))
    ]
    expected = {metric: (halves[0][metric] + halves[1][metric]) / 2 for metric in halves[0]}
    assert scores_by_query(index, queries, lengths) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shapes", "top_k", "message"),
    [
        (((5, 2), (4,), (3, 2), (3,)), 1, r"argument `index` .* got \[\(5, 2\), \(4,\)\]"),
        (((5, 2), (5,), (3, 4), (3,)), 1, r"argument `queries` .* got \[\(3, 4\), \(3,\)\]"),
        (((5,), (5,), (3, 2), (3,)), 1, "argument `index`"),
        (((5, 2), (5,), (3, 2), (3,)), 6, "argument `top_k` must be from 1 to 5, the rows of the index; got 6"),
        (((5, 2), (5,), (3, 2), (3,)), 0, "got 0"),
    ],
)
def test_bad_input(shapes, top_k, message):
    tensors = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        retrieval_accuracy(Split(*tensors[:2]), Split(*tensors[2:]), top_k)


def test_principal_components_are_those_of_the_index():
    torch.manual_seed(0)
    z = torch.randn(400, 3) * torch.tensor([1.0, 3.0, 2.0]) + 5
    index, queries = principal_components(z[:300], z[300:])
    torch.testing.assert_close(index.T.cov(), torch.linalg.eigvalsh(z[:300].T.cov()).flip(-1).diag())
    torch.testing.assert_close(torch.cdist(queries, index), torch.cdist(z[300:], z[:300]))  # nothing but a turn


def test_the_test_part_is_for_the_committed_file(capsys):
    with pytest.raises(SystemExit):
        main(["--part", "validation"])
    assert "--part validation needs --json FILE" in capsys.readouterr().err
