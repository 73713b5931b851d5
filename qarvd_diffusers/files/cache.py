"""Locate the cache folder."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder that keeps calibration results: `$QARVD_CACHE`, else `qarvd` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qarvd"
    return Path(os.environ.get("QARVD_CACHE") or default)


def can_keep_results() -> bool:
    """Tell whether `cache_folder()` can be written to; logs a warning if not, since only time is lost then."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_folder()):
            return True
    except OSError as error:
        logger.warning(
            "Results will not be kept for another time: %s cannot be written to (%s). Set QARVD_CACHE to a folder "
            "that can.",
            cache_folder(),
            error,
        )
        return False
