"""Each notebook is its script, run in full, and fit to be read; each script runs, here with little to do."""

import copy
import re
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
MOST_LINES, MOST_COLUMNS = 149, 99
# What the tests write in place of a notebook's own numbers: they want to know only whether all of it runs.
SMALL = {
    "01_the_ordered_mask": {"range(1500)": "range(10)", "range(500)": "range(10)"},
    "02_a_nested_net": {'= "fashion-mnist", 16, 10': '= "digits", 2, 3'},
    "03_an_ordered_vae": {'= "fashion-mnist", 10, 20_000': '= "digits", 2, 200'},
    "04_diagnostics_in_arviz": {
        "= 500, 1000, 300": "= 20, 50, 20",
        "num_epochs=40": "num_epochs=2",
        "1.0], 200": "1.0], 30",
    },
    "05_the_mask_in_your_model": {"= 500, 1500, 3": "= 20, 20, 1"},
    "06_scaling_up": {
        "= 100_000, 100_000, 1000, 5": "= 1_000, 2_000, 10, 5",
        "min_run_time=1": "min_run_time=0",
        '"batch_size": 64': '"batch_size": 256',
        "run.step == 70": "run.step == 17",
        "num_epochs=20": "num_epochs=1",
        "size in (1, 2)": "size in (2,)",
    },
}
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
    if long := [line for line in lines if len(line) > MOST_COLUMNS]:
        found.append(f"a line of code is too long for a page: {long[0]!r}")
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


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")  # nobody sees these figures
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")  # nor these, in Jupyter
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_runs(path, monkeypatch):
    source = path.read_text()
    for number, small in SMALL[path.stem].items():
        assert source.count(number) == 1, f"{path.name} should have {number!r} once"
        source = source.replace(number, small)
    monkeypatch.chdir(FOLDER)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))  # for the processes that a notebook starts
    torch.set_default_dtype(torch.float32)
    with plt.rc_context():
        exec(compile(source, path, "exec"), {"__name__": path.stem})
    plt.close("all")


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


def too_wide(notebook, cell):
    cell.source += f"\nx = {'1' * 96}"


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
        (too_wide, "a line of code is too long for a page: 'x = 1"),
        (with_path, "it has an absolute path"),
    ],
)
def test_problems_are_seen(spoil, problem):
    script, notebook = read(SCRIPTS[0])
    notebook = copy.deepcopy(notebook)
    spoil(notebook, next(cell for cell in notebook.cells if cell.cell_type == "code"))
    assert any(re.match(problem, found) for found in problems(script, notebook))
