"""The committed pages are what the committed results make of them."""

import json
import re
from dataclasses import replace

import pytest

from benchmarks import report
from benchmarks.report import BEGIN, END, PAGES, ROOT, fill, main


@pytest.mark.parametrize("name", PAGES)
def test_pages_have_the_tables_of_the_results(name):
    page = PAGES[name]
    text = page.path.read_text()
    assert fill(text, page.content(*page.read_results())) == text, f"run python -m benchmarks.report {name}"


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if page.dated and name != "demo"])
def test_pages_say_when_and_at_which_revision_they_were_measured(name):
    page = PAGES[name]
    lines = [line for line in page.path.read_text().splitlines() if line.startswith(("Measured ", "Joined "))]
    for header in (result["header"] for result in page.read_results()):
        changes = " with changes that are not committed" if header["revision"]["dirty"] else ""
        revision = f"{header['date'][:10]} at revision {header['revision']['commit'][:7]}{changes}, "
        machine = (
            f"{header['machine']['cpu']}, {header['machine']['cores']} cores, {header['machine']['threads']} thread"
        )
        assert any(revision + machine in line for line in lines)


@pytest.mark.parametrize("name", PAGES)
def test_figures_of_pages_are_there(name):
    page = PAGES[name]
    paths = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.path.read_text())
    images = [(page.path.parent / path).resolve() for path in paths]
    assert all(image.is_file() for image in images)
    if page.figures:
        made = page.figures(*page.read_results()[:1])
        assert {image.stem for image in images} == set(made)


def test_every_page_is_made_and_in_the_index():
    folder = ROOT / "docs" / "benchmarks"
    pages = {path.stem for path in folder.glob("*.md")} - {"index"}
    assert pages == set(PAGES) - {"README"}
    assert pages == set(re.findall(r"\((\w+)\.md\)", (folder / "index.md").read_text()))


def test_a_changed_result_changes_the_page(tmp_path, monkeypatch):
    """The power of the above: one number in one row is enough."""
    page = PAGES["demo"]
    (result,) = page.read_results()
    result["classifier"]["widths"][0]["accuracy"] -= 0.01
    (tmp_path / "demo_digits.json").write_text(json.dumps(result))
    copy = replace(page, path=tmp_path / "demo.md")
    copy.path.write_text(page.path.read_text())
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setitem(PAGES, "demo", copy)
    main(["demo"])
    before, after = page.path.read_text().splitlines(), copy.path.read_text().splitlines()
    assert len(before) == len(after)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_demo_is_that_of_the_readme():
    (result,) = PAGES["demo"].read_results()
    assert result["header"]["command"] == "python -m models demo --data digits --seed 0"


@pytest.mark.parametrize("text", ["no marks", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{END}", f"{BEGIN}{BEGIN}{END}"])
def test_a_page_needs_its_marks(text):
    with pytest.raises(ValueError, match="once each"):
        fill(text, "| a |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nonesuch"], "unknown page nonesuch"), (["--json", "x.json"], "--json FILE needs one page")],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
