"""Mutation testing: does a test fail where the code is made wrong?

    python .ci/mutants.py [--number 300] [--seed 0] [--jobs 1] [--budget 60] [--again] [--contexts FILE]

At a sample of places of distributions/, and of infer/ and nn/, one operator of cosmic-ray changes the code (a sign, a
comparison, a number, a condition), and the tests that run this line, nearest and fastest first, must notice. Mutants
live in copies under build/mutants/; the checkout is only read. Results are kept there as they come: a run that was
stopped goes on, `--again` tries what survived once more, with the tests of now. Which tests run which line is measured
first, in a run of the whole suite under coverage, and again when a file of the library or a test is newer.

The sample is drawn by hashes of the seed and the changed line, so it stays the same while other lines change, and a
larger one contains the smaller. Left out is what is no code: annotations, types, overloads, assertions, and the texts
of errors and warnings. A mutant that no test can notice, since it does what the code does, is in .ci/equivalent.json,
with the reason. Ends with 1 if less than 95 % of the others were killed. Needs POSIX.
"""

import argparse
import ast
import compileall
import difflib
import json
import multiprocessing
import os
import py_compile
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread

import pytest
from mutations import ROOT, Mutant, mutate, sample, source

BUILD = ROOT / "build" / "mutants"
FLOOR = 0.95
GIBIBYTE = 2**30


# Which tests run it


def measure(contexts: Path) -> None:
    """Run the suite under coverage, once, which tells the tests of each line; the log has their durations."""
    contexts.parent.mkdir(parents=True, exist_ok=True)
    settings = contexts.with_suffix(".ini")
    settings.write_text(f"[run]\nsource = pyro_vnd\nrelative_files = true\ndata_file = {contexts}\n")
    options = ["--cov", f"--cov-config={settings}", "--cov-context=test", "--cov-report=", "-pno:cacheprovider"]
    workers = ["--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal", "--durations=0", "--durations-min=0.001"]
    print("Running the suite under coverage", flush=True)
    with contexts.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "pytest", "-q", *options, *workers]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log)
    if done.returncode:
        contexts.unlink(missing_ok=True)
        sys.exit(f"the tests fail without any mutant: see {log.name}")


class Tests:
    """Knows the tests of each line, and what each test takes."""

    def __init__(self, contexts: Path, budget: float) -> None:
        from coverage import CoverageData

        self._data = CoverageData(str(contexts))
        self._data.read()
        self._known = {context.rpartition("|")[0] for context in self._data.measured_contexts() if context}
        self._budget = budget
        self.seconds: dict[str, float] = defaultdict(lambda: 0.03)
        for took, test in re.findall(
            r"^ *([\d.]+)s (?:call|setup|teardown) +(\S.*)$", contexts.with_suffix(".log").read_text(), re.M
        ):
            self.seconds[test.strip()] += float(took)

    @cache  # noqa: B019 - there is one object
    def _by_line(self, path: str) -> dict[int, set[str]]:
        by_line = self._data.contexts_by_lineno(path)
        return {line: {name.rpartition("|")[0] for name in names if name} for line, names in by_line.items()}

    @cache  # noqa: B019
    def running(self, mutant: Mutant) -> set[str]:
        """The tests that run the statement; for what runs at import, those that run the definition around it."""
        by_line = self._by_line(mutant.path)
        around = []
        for node in ast.walk(ast.parse(source(mutant.path))):
            if not isinstance(node, ast.Module | ast.stmt | ast.ExceptHandler):
                continue
            lines = range(getattr(node, "lineno", 1), getattr(node, "end_lineno", 10**6) + 1)
            inner = getattr(node, "body", None)
            if (
                inner
                and mutant.line < inner[0].lineno
                and not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
            ):
                lines = range(lines.start, inner[0].lineno)  # the head of an if, for, with or while
            decorators = getattr(node, "decorator_list", [])
            if mutant.line in lines or mutant.line in [entry.lineno for entry in decorators]:
                around.append(lines)
        for lines in sorted(around, key=len):
            if tests := set().union(*(by_line.get(line, set()) for line in lines)):
                return tests
        return set()

    def chosen(self, mutant: Mutant) -> list[str]:
        """The tests to run, those of the module's own file and room first, as many as the budget allows.

        All tests of its own file are among them: they may run the line in processes of their own, which nobody saw.
        """
        _, *room, name = Path(mutant.path).with_suffix("").parts
        mirror = "/".join(["tests", *room])
        own = [test for test in self._known if test.startswith(f"{mirror}/test_{name}.py::")]

        def nearness(test: str) -> int:
            if test.startswith((f"{mirror}/test_{name}", mutant.path)):
                return 0
            return 1 if test.startswith(mirror) else 2 if test.startswith(f"tests/{room[0]}") else 3

        def cheapest(tests: Iterable[str]) -> list[str]:
            return sorted(tests, key=lambda test: (nearness(test), self.seconds[test], test))

        chosen, total = [], 0.0
        for test in cheapest(self.running(mutant)):
            total += self.seconds[test]
            if chosen and total > self._budget:
                break
            chosen.append(test)
        chosen += cheapest({*own} - {*chosen})
        # File by file, since fixtures may be shared within one.
        files = list(dict.fromkeys(test.partition("::")[0] for test in chosen))
        return sorted(chosen, key=lambda test: files.index(test.partition("::")[0]))


# Running them


class _Chosen:
    """A plugin of pytest that runs the chosen tests in their order, each within its time, and writes down which."""

    def __init__(self, chosen: list[str], seconds: list[float], log: Path) -> None:
        self._seconds = dict(zip(chosen, seconds, strict=True))
        self._rank = {test: rank for rank, test in enumerate(chosen)}
        self._log = log.open("w", buffering=1)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self._rank), key=lambda item: self._rank[item.nodeid]
        )
        for test in self._rank.keys() - {item.nodeid for item in items}:
            print("missing", test, file=self._log)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        print("started", nodeid, file=self._log)
        signal.alarm(30 + int(10 * self._seconds[nodeid]))  # its default action ends the process, whatever it does

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            print("failed", report.nodeid, file=self._log)


def _run_tests(copy: Path, chosen: list[str], seconds: list[float], options: list[str]) -> None:
    """What a child process does; it ends with pytest's exit status."""
    os.setsid()
    os.chdir(copy)
    multiprocessing.set_start_method(None, force=True)  # that of the platform, as tests have it elsewhere
    resource.setrlimit(resource.RLIMIT_AS, (16 * GIBIBYTE, 16 * GIBIBYTE))
    output = os.open(f"{copy}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path.insert(0, str(copy))
    signal.alarm(300)  # for the imports
    files = list(dict.fromkeys(test.partition("::")[0] for test in chosen))
    options = ["-q", "-pno:cacheprovider", "-pno:randomly", f"--basetemp={copy}.tmp", *options]
    code = pytest.main([*options, *files], plugins=[_Chosen(chosen, seconds, copy.with_suffix(".log"))])
    library = sys.modules.get("pyro_vnd")
    if library is not None and not Path(str(library.__file__)).is_relative_to(copy):
        code = 70  # these tests were of another copy
    os._exit(int(code))


class Copy:
    """A copy of the checkout in which the tests of one mutant at a time run."""

    def __init__(self, number: int, tests: Tests) -> None:
        self._folder = BUILD / f"copy-{number}"
        self._tests = tests
        shutil.rmtree(self._folder, ignore_errors=True)
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, stdout=-1
        ).stdout.split(b"\0")
        for name in map(os.fsdecode, filter(None, names)):
            if (ROOT / name).is_file():
                (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self._folder / name)
        # Compiled files that are told from their source by its hash: two changes within a second have one time.
        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(self._folder / "pyro_vnd", quiet=1, invalidation_mode=mode)

    def run(self, chosen: list[str], *options: str) -> tuple[int, dict[str, list[str]]]:
        """The exit status of the process, and the tests that were started, failed and were missing."""
        context = multiprocessing.get_context("forkserver")  # torch and Pyro are imported once
        context.set_forkserver_preload(["torch", "pyro", "pytest"])
        log = self._folder.with_suffix(".log")
        log.write_text("")
        seconds = [self._tests.seconds[test] for test in chosen]
        process = context.Process(target=_run_tests, args=(self._folder, chosen, seconds, list(options)))
        process.start()
        process.join()
        with suppress(ProcessLookupError):  # what its tests had started
            os.killpg(process.pid, signal.SIGKILL)
        if process.exitcode == 70:
            sys.exit(f"the tests imported another pyro_vnd than that of {self._folder}")
        lines = [line.partition(" ") for line in log.read_text().splitlines()]
        return process.exitcode, {
            kind: [test for word, _, test in lines if word == kind] for kind in ("started", "failed", "missing")
        }

    def missing(self, chosen: list[str]) -> list[str]:
        """Which of the tests are not there."""
        code, log = self.run(chosen, "--collect-only")
        return log["missing"] if code in (0, 5) else [f"the tests cannot be collected: see {self._folder}.txt"]

    def try_mutant(self, mutant: Mutant) -> dict[str, object]:
        """Whether a test noticed."""
        before, changed = source(mutant.path), mutate(mutant)
        diff = [line for line in difflib.ndiff(before.splitlines(), changed.splitlines()) if line[0] in "+-"]
        result = {**asdict(mutant), "diff": diff}
        if not (chosen := self._tests.chosen(mutant)):
            return {**result, "outcome": "not covered"}
        files = list(dict.fromkeys(test.partition("::")[0] for test in chosen))
        near = [test for test in chosen if test.partition("::")[0] in files[:3]]
        (self._folder / mutant.path).write_text(changed)
        try:
            # Most are killed before the other files need be collected.
            for part in filter(None, (near, chosen[len(near) :])):
                code, log = self.run(part, "-x")
                if code not in (0, 5):
                    break
        finally:
            (self._folder / mutant.path).write_text(before)
        outcome = "survived" if code in (0, 5) else "timeout" if code == -signal.SIGALRM else "killed"
        by = (log["failed"] or log["started"] or ["import"])[-1] if outcome != "survived" else None
        counts = {"tests": len(chosen), "of": len(self._tests.running(mutant))}
        return {**result, "outcome": outcome, "by": by, **counts}


# The whole


def table(results: list[dict], equivalent: dict[str, str]) -> tuple[str, float]:
    """Counts by package with what survived, and the share of killed ones among those that a test can notice."""
    columns = ["killed", "timeout", "survived", "not covered", "equivalent"]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    survivors = []
    for result in results:
        package = "/".join(result["path"].split("/")[:2])
        lives = result["outcome"] in ("survived", "not covered")
        outcome = "equivalent" if lives and result["key"] in equivalent else result["outcome"]
        for name in (package, "all"):
            counts[name][outcome] += 1
        if outcome in ("survived", "not covered"):
            survivors.append(result)
    rows = ["| package | " + " | ".join(columns) + " | share killed |", "|---" * 7 + "|"]
    share = 0.0
    for name in sorted(counts, key=lambda name: (name == "all", name)):
        count = counts[name]
        killed, noticeable = count["killed"] + count["timeout"], count.total() - count["equivalent"]
        share = killed / max(noticeable, 1)
        rows.append(f"| {name} | " + " | ".join(str(count[column]) for column in columns) + f" | {share:.1%} |")
    shown = [
        "\n".join(
            [
                f"\n{entry['path']}:{entry['line']} {entry['outcome']} ({entry.get('tests', 0)} tests)",
                *entry["diff"],
                f"    {json.dumps(entry['key'])}",
            ]
        )
        for entry in survivors
    ]
    return "\n".join([*rows, *shown]), share


def keep(path: Path, results: dict[str, dict]) -> None:
    """Write the results such that a run that is killed leaves those before or these."""
    path.with_suffix(".tmp").write_text(json.dumps(results, indent=1))
    path.with_suffix(".tmp").replace(path)


def main() -> int:
    """Draw the sample and try each mutant; 0 if enough of them were killed."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=300, help="mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="mutants side by side")
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests a mutant, by their usual durations")
    parser.add_argument("--again", action="store_true", help="try what survived once more")
    parser.add_argument("--contexts", type=Path, help="a file of coverage with tests as contexts, its log beside it")
    options = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = "1"
    BUILD.mkdir(parents=True, exist_ok=True)
    contexts = options.contexts or BUILD / "tests.coverage"
    newest = max(path.stat().st_mtime for room in ("pyro_vnd", "tests") for path in (ROOT / room).rglob("*.py"))
    if not options.contexts and not (contexts.exists() and contexts.stat().st_mtime > newest):
        measure(contexts)
    tests = Tests(contexts, options.budget)
    drawn = sample(options.number, options.seed)
    kept = BUILD / f"seed-{options.seed}.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    if options.again:
        results = {key: result for key, result in results.items() if result["outcome"] in ("killed", "timeout")}
    todo = [mutant for mutant in drawn if mutant.key not in results]

    random.Random(options.seed).shuffle(todo)  # a run that is stopped has tried a smaller sample

    copies = [Copy(number, tests) for number in range(options.jobs)]
    chosen = list(dict.fromkeys(test for mutant in todo for test in tests.chosen(mutant)))
    if chosen and (missing := copies[0].missing(chosen)):
        sys.exit(f"{len(missing)} of {len(chosen)} tests are not those of {contexts}: {missing[:3]}")

    equivalent = json.loads((ROOT / ".ci" / "equivalent.json").read_text())

    def report() -> tuple[str, float]:
        return table([results[mutant.key] for mutant in drawn if mutant.key in results], equivalent)

    queue: SimpleQueue[Mutant] = SimpleQueue()
    lock = Lock()
    for mutant in todo:
        queue.put(mutant)
    with tqdm(total=len(drawn), initial=len(drawn) - len(todo), unit="mutant") as bar:

        def work(copy: Copy) -> None:
            with suppress(Empty):
                while True:
                    result = copy.try_mutant(queue.get_nowait())
                    with lock:
                        results[result["key"]] = result
                        keep(kept, results)
                        kept.with_suffix(".md").write_text(report()[0])
                        bar.update()
                        bar.set_postfix(Counter(entry["outcome"] for entry in results.values()))

        threads = [Thread(target=work, args=(copy,), daemon=True) for copy in copies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if any(mutant.key not in results for mutant in drawn):
        return 1  # a thread has failed, and has said why

    # What fails without the mutant, too, has noticed nothing.
    killers = {entry["by"] for mutant in drawn if (entry := results[mutant.key])["outcome"] == "killed"} - {"import"}
    code, log = copies[0].run(sorted(killers))
    if code:
        failed = log["failed"] or log["started"][-1:]
        keep(kept, {key: result for key, result in results.items() if result.get("by") not in failed})
        sys.exit(f"these tests fail without a mutant; what they killed must be tried again: {failed}")
    text, share = report()
    print(text)
    return int(share < FLOOR)


if __name__ == "__main__":
    sys.exit(main())
