"""Tell whether other users could have put code into a file that is about to be loaded."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def foreign_reason(*paths: Path) -> str | None:
    """Return why files and folders are not to be trusted, or None; those that do not exist are left out.

    Trusted are those that this user or root owns and nobody else can write, links resolved.
    """
    if not hasattr(os, "geteuid"):  # Windows: a profile's folders have lists of their own
        return None
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            continue
        if status.st_uid not in (os.geteuid(), 0):
            owner = f"belongs to another user (uid {status.st_uid})"
            return f"{path} {owner}: remove it, or set QARVD_CACHE to a folder of your own"
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX  # only owners replace what is in it
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
            return f"{path} can be written by other users: chmod go-w it, or set QARVD_CACHE to a folder of your own"
    return None
