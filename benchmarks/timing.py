"""Time functions against each other, and count the memory they need."""

import gc
import json
import os
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import thread_time

from torch.profiler import ProfilerActivity, profile

__all__ = ["interleaved_medians", "peak_bytes"]

BLOCK_SECONDS = 0.01  # long against the clock and the loop, short against changes in the machine's load


def interleaved_medians(
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int,
    clock: Callable[[], float] = thread_time,
) -> dict[str, float]:
    """Measure the seconds that one call of each function takes.

    In each round every function runs for one block of calls, in an order drawn anew, so that a change in the load
    of the machine or in the state of its caches meets all of them alike. Compare medians of one call of this
    function only. What counts is the time that this thread ran, not that for which it waited for a core; give another
    clock where other threads do part of the work.

    Args:
        functions: What to time, by name.
        seconds: Total time to spend, about.
        min_rounds: Rounds to run even if that takes longer.
        clock: Tells the time in seconds.

    Returns:
        The median over rounds of the mean seconds a call.
    """
    calls, round_seconds = {}, 0.0
    for name, function in functions.items():
        function()  # the first call sets things up
        once = _block_seconds(function, 1, clock)
        if once < BLOCK_SECONDS:
            warm_up = max(3, round(BLOCK_SECONDS / once))
            once = _block_seconds(function, warm_up, clock) / warm_up
        calls[name] = max(1, round(BLOCK_SECONDS / once))
        round_seconds += calls[name] * once
    rounds = max(min_rounds, round(seconds / round_seconds))
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(_block_seconds(functions[name], calls[name], clock) / calls[name])
    return {name: median(values) for name, values in times.items()}


def _block_seconds(function: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    collecting = gc.isenabled()
    gc.disable()
    start = clock()
    for _ in range(calls):
        function()
    elapsed = clock() - start
    if collecting:
        gc.enable()
    return elapsed


def peak_bytes(function: Callable[[], object]) -> int:
    """Return how many bytes of tensors a call holds at its peak, beyond what was there before.

    This is torch's own record of every allocation and release on the CPU: the same at each run, and exact for
    kilobytes as well as gigabytes, where the resident size of a process starts from the peak of its imports and
    moves in pages that the C library keeps or returns as it likes.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce its start and end
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
