"""Each notebook is its script, run in full, and fit to be read."""

import copy
import re
from pathlib import Path

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
MOST_LINES = 149
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~])/(?:home|root|work|tmp|usr|opt|var|mnt|Users|private)/|\b[A-Z]:\\\\?\w")


def problems(script, notebook):
    """Say what is wrong with a notebook, a line each."""
    found = []
    if [(cell.cell_type, cell.source) for cell in script.cells] != [
        (cell.cell_type, cell.source) for cell in notebook.cells
    ]:
        found.append("its cells are not those of the script")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("it has not been run from top to bottom")
    outputs = [output for cell in code for output in cell.outputs]
    if not outputs:
        found.append("it has no outputs")
    if any(output.output_type == "error" for output in outputs):
        found.append("a cell has failed")
    if any(output.get("name") == "stderr" for output in outputs):
        found.append("there are warnings or other messages")
    lines = [line for cell in code for line in cell.source.splitlines() if line.strip()]
    if len(lines) > MOST_LINES:
        found.append(f"it has {len(lines)} lines of code")
    texts = [cell.source for cell in notebook.cells]
    texts += ["".join(output.get("text", "")) for output in outputs]
    texts += [text for output in outputs for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    if paths := [text for text in texts if ABSOLUTE_PATH.search(text)]:
        found.append(f"it has an absolute path: {paths[0]!r}")
    return found


def read(path):
    return jupytext.read(path), nbformat.read(path.with_suffix(".ipynb"), as_version=4)


def test_each_script_has_a_notebook():
    assert SCRIPTS
    assert [path.stem for path in SCRIPTS] == [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_notebook(path):
    assert problems(*read(path)) == []


def other_code(notebook, cell):
    cell.source += "\nx = 1"


def not_run(notebook, cell):
    cell.execution_count = None


def cleared(notebook, cell):
    for each in notebook.cells:
        each.outputs = []


def failed(notebook, cell):
    cell.outputs.append(nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[]))


def warned(notebook, cell):
    cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="careful"))


def too_long(notebook, cell):
    cell.source += "\nx = 1" * 150


def with_path(notebook, cell):
    cell.outputs.append(nbformat.v4.new_output("stream", text="saved to /home/me/net.pt"))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (other_code, "its cells are not those of the script"),
        (not_run, "it has not been run from top to bottom"),
        (cleared, "it has no outputs"),
        (failed, "a cell has failed"),
        (warned, "there are warnings or other messages"),
        (too_long, "it has .* lines of code"),
        (with_path, "it has an absolute path"),
    ],
)
def test_problems_are_seen(spoil, problem):
    script, notebook = read(SCRIPTS[0])
    notebook = copy.deepcopy(notebook)
    spoil(notebook, next(cell for cell in notebook.cells if cell.cell_type == "code"))
    assert any(re.match(problem, found) for found in problems(script, notebook))
