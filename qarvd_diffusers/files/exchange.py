"""Exchange two folders at once, where the system can."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Any

_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2  # Linux, Linux, macOS
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def exchange(new: Path, old: Path, aside: Path) -> None:
    """Give each of two folders the name of the other; `aside` is a free name.

    Where the file system cannot do that at once, the old folder is moved aside first. If the process dies in between,
    it is there under the name `aside`.

    Raises:
        OSError: one of them cannot be moved; the old folder is in its place.
    """
    if _exchange(new, old):
        return
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names by one system call; False where there is none."""
    paths = os.fsencode(one), os.fsencode(other)
    libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform in ("linux", "darwin") else None
    if hasattr(libc, "renameat2"):
        code = libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    elif hasattr(libc, "renamex_np"):
        code = libc.renamex_np(*paths, _RENAME_SWAP)
    else:
        return False
    if code and ctypes.get_errno() not in _UNSUPPORTED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))
    return code == 0
