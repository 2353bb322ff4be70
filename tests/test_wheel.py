"""What users install: the wheel, in environments that have nothing of the checkout; `make wheel` runs this."""

import ast
import doctest
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pyro_vnd

ROOT = Path(__file__).parents[1]
PROJECT, CONSTRAINTS, README = (ROOT / name for name in ("pyproject.toml", "constraints.txt", "README.md"))
# What the core has: its dependencies and Python itself. Examples that import more need extras.
CORE = {"numpy", "pyro", "pyro_vnd", "torch", "tqdm"} | set(sys.stdlib_module_names)

pytestmark = pytest.mark.slow


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, made from the source archive, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (archive,), (built,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    assert archive.name == f"pyro_vnd-{pyro_vnd.__version__}.tar.gz"
    return built


def packages(python):
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def environment(wheel, extra="", core=None):
    """An environment with the wheel and what it needs; kept until a version changes, with a new wheel each time.

    torch is large: an environment with an extra finds it in the one that has the core and nothing else.
    """
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (PROJECT, CONSTRAINTS))).hexdigest()[:12]
    folder = ROOT / ".venv" / f"wheel-{extra or 'core'}-{key}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
    stamp = folder / "installed"
    if not stamp.exists():
        run(sys.executable, "-m", "venv", "--clear", folder)
        if core:
            (packages(python) / "core.pth").write_text(str(packages(core)))
        run(*install, "-c", CONSTRAINTS, f"{wheel}[{extra}]" if extra else wheel)
        stamp.touch()
    if not core:
        run(*install, "--no-deps", "--force-reinstall", wheel)
    run(python, "-m", "pip", "check")
    return python


@pytest.fixture(scope="module")
def core(wheel):
    return environment(wheel)


@pytest.fixture(scope="module")
def diagnostics(wheel, core):
    return environment(wheel, "diagnostics", core)


def test_the_wheel_has_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pyro_vnd").rglob("*.py")}
    assert files == sources | {"pyro_vnd/py.typed"}


def test_the_core_needs_no_extra(core, tmp_path):
    listed = {line.partition("==")[0] for line in run(core, "-m", "pip", "list", "--format=freeze").splitlines()}
    assert {"numpy", "pyro-ppl", "pyro-vnd", "torch", "tqdm"} <= listed
    assert listed.isdisjoint({"arviz", "matplotlib", "pandas", "scikit-learn", "scipy", "torchmetrics", "xarray"})
    code = """
import importlib, pathlib, pyro_vnd
root = pathlib.Path(pyro_vnd.__file__).parent
assert "site-packages" in root.parts
modules = [path.relative_to(root.parent).with_suffix("").parts for path in sorted(root.rglob("*.py"))]
for parts in modules:
    if "diagnostics" not in parts:
        importlib.import_module(".".join(parts).removesuffix(".__init__"))
for package in sorted(set(pyro_vnd.__all__) - {"diagnostics"}):
    for name in importlib.import_module(f"pyro_vnd.{package}").__all__:
        getattr(getattr(pyro_vnd, package), name)
"""
    run(core, "-W", "error", "-c", code, cwd=tmp_path)


def test_without_the_extra_diagnostics_say_how_to_get_it(core, tmp_path):
    code = """
try:
    from pyro_vnd.diagnostics import summary
except ImportError as error:
    print(error)
"""
    assert 'pip install "pyro-vnd[diagnostics]"' in run(core, "-c", code, cwd=tmp_path)


def test_with_the_extra_every_name_is_there(diagnostics, tmp_path):
    code = "import pyro_vnd\nfor name in pyro_vnd.diagnostics.__all__:\n    getattr(pyro_vnd.diagnostics, name)\n"
    run(diagnostics, "-c", code, cwd=tmp_path)


def examples():
    """The examples of README.md as doctests, each with whether the core is enough for it.

    It is where the example imports no more, and has no name in common with those made by an example that does.
    """
    made = set()
    for block in README.read_text().split("```python\n")[1:]:
        text = block.partition("```")[0]
        source = "".join(example.source for example in doctest.DocTestParser().get_examples(text))
        nodes = list(ast.walk(ast.parse(source)))
        imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        aliases = {alias for node in imports for alias in node.names}
        modules = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
        names = [node for node in nodes if isinstance(node, ast.Name)]
        foreign = {module.partition(".")[0] for module in modules} - CORE
        enough = not foreign and "diagnostics" not in source and made.isdisjoint(name.id for name in names)
        if not enough:
            made |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
            made |= {alias.asname or alias.name for alias in aliases}
        yield text, enough


def run_examples(python, texts, folder):
    """Run doctests of one session, outside the checkout; returns how many lines were tried."""
    (folder / "examples.txt").write_text("\n".join(texts))
    code = """
import doctest, pyro
pyro.set_rng_seed(0)
flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
result = doctest.testfile("examples.txt", module_relative=False, optionflags=flags)
print(result.attempted)
raise SystemExit(result.failed)
"""
    return int(run(python, "-c", code, cwd=folder).splitlines()[-1])


def test_examples_of_the_readme_that_need_no_extra(core, tmp_path):
    texts = [text for text, enough in examples() if enough]
    assert texts
    assert run_examples(core, texts, tmp_path) == sum(text.count(">>> ") for text in texts)


def test_all_examples_of_the_readme(diagnostics, tmp_path):
    texts = [text for text, _ in examples()]
    assert run_examples(diagnostics, texts, tmp_path) == sum(text.count(">>> ") for text in texts)
