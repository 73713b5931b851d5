"""Time calls: medians of CUDA events, or of the wall clock without a GPU."""

from __future__ import annotations

import itertools
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Clock cycles (some milliseconds) for which the GPU waits before the timed calls, so that the host gets ahead. Without
# this wait, the time of a kernel that is shorter than its launch includes waiting for the launch.
_HEAD_START = 10_000_000


def median_ms(run: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
    """Measure the median milliseconds of `run()` on the current device; each repetition has its own pair of events.

    On a GPU, the host's launches count only after it has used up its head start.
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
    """Measure one call by the wall clock."""
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def relative_error(got: Tensor, reference: Tensor) -> float:
    """Compute `|got - reference| / |reference|` of two tensors."""
    return float((got - reference).norm() / reference.norm())


def rotating(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """Make a function that runs the calls in turn, so that none finds its operands in the cache."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`; without a limit for None, or outside the main thread."""
    if (
        seconds is None
        or not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def interrupt(*_: object) -> None:
        """Handle the alarm."""
        raise TimeoutError(f"not done within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
