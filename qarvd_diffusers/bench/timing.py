"""Medians of CUDA events; wall clock where there is no GPU."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Clock cycles, some milliseconds, for which a GPU waits before what is timed: the host gets ahead meanwhile. Without it
# a kernel shorter than its launch is timed with the wait for the next one.
_HEAD_START = 10_000_000


def median_ms(run: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
    """Median milliseconds of `run()` on the current device; every repetition is timed by its own pair of events.

    On a GPU launches of the host count only once it has used up its head start.
    """
    for _ in range(warmup):
        run()
    if not torch.cuda.is_available():
        return statistics.median(_wall_ms(run) for _ in range(repeats))
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START)
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


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises TimeoutError in what is run within, after so many seconds; None, or another thread than the first: no limit."""
    if (
        seconds is None
        or not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
