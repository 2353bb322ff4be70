"""Test the library with its lowest and its newest dependencies, each in an environment of its own under .venv.

`lowest` has, under the oldest Python that is supported, each dependency at the lower bound of pyproject.toml; the other
lines are versions of Python that this machine has, such as 3.13, with what pip finds there, ArviZ 1.x among it.
constraints.txt plays no part.

    python .ci/matrix.py [--cuda] [lowest] [3.12] [3.13] [-- ARGUMENTS OF PYTEST]

On Linux the registry's builds of torch bring gigabytes of CUDA libraries. They are not installed unless `--cuda` is
given; without it, let pip find builds for the CPU, with PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TESTS = [f"tests/{room}" for room in ("distributions", "nn", "infer", "autoencoders", "diagnostics", "test_compat.py")]
# Warnings are no errors here: old and new versions of other packages warn of each other.
PYTEST = ["-q", "-oaddopts=", "--import-mode=importlib", "-pno:cacheprovider", "-Wdefault", "-mnot slow"]
PYTEST += ["--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal"]
SHOWN = ("arviz", "numpy", "pyro-ppl", "torch")


def pythons() -> dict[str, str]:
    """The versions of Python from the lowest one on that this machine has, in order, each with its interpreter."""
    lowest = int(PROJECT["requires-python"].removeprefix(">=3."))
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = {}
    for version in (f"3.{minor}" for minor in range(lowest, lowest + 9)):
        candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]
        check = f"import sys, venv, ensurepip; assert sys.version.startswith('{version}.')"
        for path in filter(None, candidates):
            if subprocess.run([path, "-c", check], capture_output=True).returncode == 0:
                found[version] = str(path)
                break
    return found


def requirements(line: str) -> list[str]:
    """What a line of the matrix installs: bounds as they are, or each at its lower bound."""
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["diagnostics"], *extras["data"]]
    # A bound such as >=0.8,<0.9 is one already; >=2.8 becomes ==2.8.*, its newest repair.
    lowest = [re.sub(r">=([\d.]+)(?=;|$)", r"==\1.*", entry) for entry in wanted]
    tools = [entry for entry in extras["notebooks"] + extras["dev"] if not entry.startswith("pyro-vnd")]
    return [*(lowest if line == "lowest" else wanted), *tools]


def run_line(line: str, version: str, base: str, cuda: bool, arguments: list[str]) -> str:
    """Install and test one line; returns what came of it."""
    folder = ROOT / ".venv" / f"matrix-{line}"
    python = str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    subprocess.run([base, "-m", "venv", "--clear", str(folder)], check=True)
    options = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    pip = [python, "-m", "pip", "install", *options, *requirements(line)]
    if not cuda:
        report = folder / "report.json"
        subprocess.run([*pip, "--dry-run", "--report", str(report)], check=True)
        names = [entry["metadata"]["name"] for entry in json.loads(report.read_text())["install"]]
        if any(name.startswith("nvidia-") for name in names):
            return "not run: this build of torch brings CUDA libraries; see `python .ci/matrix.py --help`"
    subprocess.run(pip, check=True)
    freeze = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True)
    got = {entry["name"]: entry["version"] for entry in json.loads(freeze.stdout)}
    print(f"{line}: Python {version}, " + ", ".join(f"{name} {got[name]}" for name in SHOWN), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, "-m", "pytest", *PYTEST, *(arguments or TESTS)], cwd=ROOT, env=environment)
    return "passed" if done.returncode == 0 else f"failed: pytest ended with {done.returncode}"


def main() -> int:
    """Run the lines asked for, or all; 0 if all of them passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", metavar="LINE", help="lowest or a version of Python; all by default")
    parser.add_argument("--cuda", action="store_true", help="take torch with CUDA libraries where there is no other")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:split])
    if not (found := pythons()):
        parser.error("no Python that the project supports was found, with its venv module")
    (oldest, first), *newer = found.items()
    lines = {"lowest": (oldest, first)} | {version: (version, base) for version, base in newer}
    if unknown := sorted(set(options.lines) - set(lines)):
        parser.error(f"LINE must be one of {', '.join(lines)}; got {unknown}")
    results = {
        line: run_line(line, *lines[line], options.cuda, sys.argv[split + 1 :]) for line in options.lines or lines
    }
    for line, result in results.items():
        print(f"{line}: {result}")
    return int(any(result != "passed" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
