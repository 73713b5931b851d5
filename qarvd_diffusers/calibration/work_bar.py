"""One bar over all that a calibration does, with a total and the time that is left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm

from .calibrate import Progress, Work


class WorkBar(tqdm):
    """Counts the steps of a calibration, which are of several kinds, each of its own duration.

    The time that is left is what every kind took so far, times how many of it are left; of a kind that is still to come, what
    all steps took on average.
    """

    def __init__(self, totals: Mapping[str, int], also: Progress | None = None, **options: Any) -> None:
        """
        Args:
            totals: steps by kind.
            also: told what is being done, how many steps are done, and how many there are.
            **options: of tqdm.
        """
        self._totals, self._also = totals, also
        self._done, self._seconds = Counter(), Counter()
        self._last = time.perf_counter()
        super().__init__(total=sum(totals.values()), unit="step", **options)

    def advance(self, kind: str, text: str) -> None:
        """One more step of a kind is done; `text` says what is being done."""
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
        """None before the first step."""
        if not self._done:
            return None
        mean = self._seconds.total() / self._done.total()
        return sum(
            (total - self._done[kind]) * (self._seconds[kind] / self._done[kind] if self._done[kind] else mean)
            for kind, total in self._totals.items()
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm shows; it takes the time that is left from the rate."""
        values = super().format_dict
        if seconds := self.seconds_left:
            values["rate"] = (self.total - self.n) / seconds or None
        return values


def work_totals(work: Work, passes: int, passes_of_share: int) -> dict[str, int]:
    """Steps by kind, for `WorkBar`.

    Args:
        work: what there is to do.
        passes: of the transformer in one set of rollouts.
        passes_of_share: of this process's share of it.
    """
    return {
        "layer": work.layers,
        "pass": work.shared_runs * passes_of_share + work.whole_runs * passes,
        "rounding": work.rounding,
    }
