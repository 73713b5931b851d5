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

from safetensors import SafetensorError


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `path` when the block ends and is removed when the block raises.

    If `path` exists already its files are replaced one by one (each replacement is atomic) and others are left alone.

    Raises:
        FileExistsError: `path` is a file.
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
def atomic_file(path: str | os.PathLike[str], remedy: str | None = None) -> Iterator[Path]:
    """Yield a temporary file name, which replaces `path` when the block ends and is removed when the block raises.

    Args:
        path: the file; folders are made.
        remedy: what to do if the file cannot be written. None leaves errors as they are, for blocks that also read.

    Raises:
        OSError: the disk is full, or `path` cannot be written; the message names path and remedy.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if remedy is None:
            raise
        raise OSError(f"{path} could not be written ({error}): {remedy}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(value: Any, path: str | os.PathLike[str]) -> Path:
    """Write one JSON file atomically; see `atomic_file`."""
    with atomic_file(path, "free some space and run again, it continues") as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False), encoding="utf-8")
    return Path(path)
