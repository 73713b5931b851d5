"""Show one progress bar over all steps of a calibration, with a total and the remaining time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm

from .calibrate import Progress, Work


class WorkBar(tqdm):
    """Count the steps of a calibration, which are of several kinds with different durations.

    The remaining time is the mean time per step of each kind so far, times the steps left; a kind that has not begun
    counts with the mean over all steps.
    """

    def __init__(self, totals: Mapping[str, int], also: Progress | None = None, **options: Any) -> None:
        """
        Args:
            totals: steps by kind.
            also: called with the current work, the steps done and the number of steps.
            **options: of tqdm.
        """
        self._totals, self._also = totals, also
        self._done, self._seconds = Counter(), Counter()
        self._last = time.perf_counter()
        super().__init__(total=sum(totals.values()), unit="step", **options)

    def advance(self, kind: str, text: str) -> None:
        """Count one more step of a kind; `text` describes the current work."""
        now = time.perf_counter()
        self._seconds[kind] += now - self._last
        self._done[kind] += 1
        self._last = now
        self.set_postfix_str(text, refresh=False)
        self.update()
        if self._also is not None:
            self._also(text, self._done.total(), sum(self._totals.values()))

    @property
    def seconds_left(self) -> float | None:
        """Estimate the remaining time; None before the first step."""
        if not self._done:
            return None
        mean = self._seconds.total() / self._done.total()
        return sum(
            (total - self._done[kind]) * (self._seconds[kind] / self._done[kind] if self._done[kind] else mean)
            for kind, total in self._totals.items()
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """Values that tqdm shows; it computes the remaining time from the rate."""
        values = super().format_dict
        if seconds := self.seconds_left:
            values["rate"] = (self.total - self.n) / seconds or None
        return values


def work_totals(work: Work, passes: int, passes_of_share: int) -> dict[str, int]:
    """Count steps by kind, for `WorkBar`.

    Args:
        work: of the calibration.
        passes: of the transformer in one set of rollouts.
        passes_of_share: of this process's share of it.
    """
    return {
        "layer": work.layers,
        "pass": work.shared_runs * passes_of_share + work.whole_runs * passes,
        "rounding": work.rounding,
    }
