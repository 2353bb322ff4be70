"""Folders that are complete or untouched, and the page of a report."""

import matplotlib.pyplot as plt
import pytest

from models.output import atomic_folder, print_table
from models.report import Report


def test_a_folder_is_filled_at_the_end_and_keeps_what_it_had(tmp_path):
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as folder:
        (folder / "a").write_text("first")
        assert not out.exists()
    (out / "own").write_text("mine")
    with atomic_folder(out) as folder:
        (folder / "a").write_text("second")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"a": "second", "own": "mine"}
    assert list(out.parent.iterdir()) == [out]


def test_a_failure_leaves_the_folder_as_it_was(tmp_path):
    def fail():
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_printed_table_is_aligned(capsys):
    print_table(("width", "NLL"), [["1", "0.25"], ["0.125", "10"]])
    assert capsys.readouterr().out.splitlines() == ["width   NLL", "    1  0.25", "0.125    10"]


def test_a_report_escapes_its_text_and_carries_its_figures(tmp_path):
    report = Report("a < b", tmp_path)
    report.section("p & q", "x > y")
    report.subsection("<i>")
    report.terms({"E[L] & sd": "a <mean>"})
    report.table(("<th>",), [["<td>"]])
    report.figure(plt.subplots(figsize=(2, 1))[0], "curve", 'a "caption"')
    page = report.html()
    for raw, escaped in {
        "<title>a < b": "<title>a &lt; b</title>",
        "p & q": "<h2>p &amp; q</h2>",
        "<h3><i>": "<h3>&lt;i&gt;</h3>",
        "a <mean>": "<dt>E[L] &amp; sd</dt><dd>a &lt;mean&gt;</dd>",
        "<td><td>": "<td>&lt;td&gt;</td>",
        'alt="a "caption""': 'alt="a &quot;caption&quot;"',
    }.items():
        assert escaped in page
        assert raw not in page
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == 1
