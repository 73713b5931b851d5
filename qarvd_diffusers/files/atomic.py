"""Write files and folders atomically: the old content stays until the new one is complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends, and vanishes when the block raises.

    If `path` exists already its files are replaced one by one (each replacement is atomic) and others are left alone.
    """
    path = Path(path)
    if path.is_file():
        raise FileExistsError(f"{path} is a file, expected a folder or a free name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp makes private folders, published ones are not
        yield temporary
        if not path.exists():
            os.replace(temporary, path)
        else:
            for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
                target = path / file.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file name next to `path` that replaces `path` when the block ends and vanishes when it raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(value: Any, path: str | os.PathLike[str]) -> Path:
    """Write one JSON file, whole or not at all; folders are made.

    Raises:
        OSError: the disk is full, or the path cannot be written; named.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error}): free some space and run again, it continues") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
