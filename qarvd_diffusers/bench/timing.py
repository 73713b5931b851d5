"""Medians of CUDA events; wall clock where there is no GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def median_ms(run: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
    """Median milliseconds of `run()` on the current device; every repetition is timed by its own pair of events."""
    for _ in range(warmup):
        run()
    if not torch.cuda.is_available():
        return statistics.median(_wall_ms(run) for _ in range(repeats))
    torch.cuda.synchronize()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in pairs:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in pairs)


def _wall_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def rotating(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """Calls one after the other, so that no call finds its own operands in the cache."""
    state = {"next": 0}

    def run() -> object:
        state["next"] = (state["next"] + 1) % len(calls)
        return calls[state["next"]]()

    return run
