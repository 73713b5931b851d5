"""Write files and folders atomically: the old content stays until the new one is complete.

What is being written has a temporary name beside its place, `.NAME.qarvd-HOST-PROCESS-RANDOM`. If the process dies,
the next write of the same name removes it.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .exchange import exchange

REMEDY = "free some space or choose another place, and run again"

_LONGEST = 100  # characters of a name that its temporary name keeps
_OLD = ".old"  # ends the name of a folder that is about to be replaced, where two cannot be exchanged
_CANNOT_WRITE = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EDQUOT}
_NOT_EMPTY = {errno.ENOTEMPTY, errno.EEXIST, errno.EACCES}  # the last one on Windows
_NO_LINK = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
# `diffusion_pytorch_model.fp16-00001-of-00002.safetensors`, `model.safetensors.index.fp16.json`
_WEIGHTS = re.compile(r"(?P<stem>.+?)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index(?P<variant>\.\w+)?\.json)?")


@contextmanager
def atomic_directory(path: str | os.PathLike[str], owned: Collection[str] = ()) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `path` when the block ends and is removed when the block raises.

    If `path` exists already, the two are exchanged at once: at any moment `path` is wholly the old or wholly the new
    folder. Files of the old one that were not written are kept, except `owned` ones, and weight files and indexes
    beside new ones of the same name, which would be loaded in their place. A folder that cannot be moved (a mount, or
    the working directory) gets the new files one by one.

    Args:
        path: the folder; its parents are made. It gets the permissions of the umask.
        owned: names of files in `path` that only hold for what was written with them.

    Raises:
        FileExistsError: `path` is a file.
        OSError: the disk is full, or the place cannot be written to; the message names path and remedy.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, expected a folder or a free name")
    place = path.resolve()  # a link to a folder stays a link
    with _named_errors(path, None):
        place.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(place)
        temporary = _temporary_name(place)
        temporary.mkdir()
    try:
        with _named_errors(path, None):
            yield temporary
            _open_permissions(temporary)
            _put(temporary, place, owned)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(path: str | os.PathLike[str], remedy: str | None = None) -> Iterator[Path]:
    """Yield a temporary file name, which replaces `path` when the block ends and is removed when the block raises.

    Args:
        path: the file; folders are made. It gets the permissions of the umask.
        remedy: what to do if anything goes wrong in the block. With None only errors of writing are explained, since
            the block may also read.

    Raises:
        IsADirectoryError: `path` is a folder.
        OSError: the disk is full, or `path` cannot be written; the message names path and remedy.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file or a free name")
    with _named_errors(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(path)
        temporary = _temporary_name(path, path.suffix)
        try:
            yield temporary
            _open_permissions(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(value: Any, path: str | os.PathLike[str]) -> Path:
    """Write one JSON file atomically; see `atomic_file`."""
    with atomic_file(path, "free some space and run again, it continues") as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False), encoding="utf-8")
    return Path(path)


@contextmanager
def _named_errors(path: Path, remedy: str | None) -> Iterator[None]:
    """Let an error of writing name `path` and a remedy; with a remedy, every OSError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if remedy is None and not _is_of_writing(error, path):
            raise
        raise OSError(f"{path} could not be written ({error}): {remedy or REMEDY}") from error


def _is_of_writing(error: OSError | SafetensorError, path: Path) -> bool:
    """Return whether an error is one of writing to `path`, and not of what a block reads elsewhere."""
    if isinstance(error, SafetensorError):
        return "os error" in str(error)
    named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    return error.errno in _CANNOT_WRITE and (
        not named or named.startswith((str(path.parent), str(path.resolve().parent)))
    )


def _temporary_name(path: Path, suffix: str = "") -> Path:
    """Return a free name beside `path` that tells which process it belongs to."""
    return path.with_name(f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}{suffix}")


def _prefix(path: Path) -> str:
    """Return how temporary names of `path` begin on this host."""
    return f".{path.name[:_LONGEST]}.qarvd-{re.sub(r'[^A-Za-z0-9]', '', platform.node())}-"


def _clean_up(path: Path) -> None:
    """Remove what processes that have died left beside `path`, or move a folder back that one was replacing."""
    prefix = _prefix(path)
    with os.scandir(path.parent) as entries:
        stale = [entry.name for entry in entries if entry.name.startswith(prefix)]
    for name in sorted(stale, key=lambda name: not name.endswith(_OLD)):
        process = name.removeprefix(prefix).partition("-")[0]
        left = path.with_name(name)
        if not process.isdigit() or _is_alive(int(process)):
            continue
        if name.endswith(_OLD) and not path.exists():
            os.rename(left, path)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    """Return whether a process of this host runs."""
    try:
        os.kill(process, 0) if os.name == "posix" else None
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _open_permissions(path: Path) -> None:
    """Give a file, or all that is in a folder, the permissions that `open` and `mkdir` would have given."""
    probe = path.with_name(f"{path.name}.mode")
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = probe.stat().st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)
    for entry in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if not entry.is_symlink():
            entry.chmod(mode | (mode & 0o444) >> 2 if entry.is_dir() else mode)


def _put(new: Path, place: Path, owned: Collection[str]) -> None:
    """Move the complete folder `new` to `place`, which keeps what `atomic_directory` says."""
    try:
        os.rename(new, place)
        return
    except OSError as error:
        if error.errno == errno.EBUSY or (place.is_dir() and _cannot_move(place)):
            _replace_files(new, place, owned)
            return
        if error.errno not in _NOT_EMPTY or not place.is_dir():
            raise
    for file in _kept(new, place, owned):
        _link(place / file, new / file)
    shutil.copymode(place, new)  # a folder that its owner has closed stays closed
    exchange(new, place, place.with_name(new.name + _OLD))


def _cannot_move(folder: Path) -> bool:
    """Return whether a folder is a mount, or holds the working directory."""
    try:
        return os.path.ismount(folder) or Path.cwd().is_relative_to(folder)
    except FileNotFoundError:  # the working directory has been removed
        return False


def _kept(new: Path, old: Path, owned: Collection[str]) -> list[Path]:
    """List the files of `old`, relative to it, that stay beside those of `new`."""
    kept = []
    for file in sorted(_files(old)):
        own = len(file.parts) == 1 and file.name in owned
        written = any(os.path.lexists(new / part) and not (new / part).is_dir() for part in (file, *file.parents))
        if not (own or written or (new / file).is_dir() or _stem(file.name) in _stems(new / file.parent)):
            kept.append(file)
    return kept


def _files(folder: Path) -> Iterator[Path]:
    """Yield files and links below a folder, relative to it; links are not followed."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in (*files, *links):
            yield Path(parent, name).relative_to(folder)


def _stem(name: str) -> str | None:
    """Return what the weight files of one model, its shards and its index have in common; None for other files."""
    weights = _WEIGHTS.fullmatch(name)
    return weights and weights["stem"] + (weights["variant"] or "")


def _stems(folder: Path) -> set[str]:
    """Return the stems of all weight files in a folder; empty if there is no folder."""
    return {stem for name in (os.listdir(folder) if folder.is_dir() else ()) if (stem := _stem(name))}


def _link(source: Path, target: Path) -> None:
    """Let `target` be the same file as `source`, or a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LINK:
            raise
        shutil.copy2(source, target, follow_symlinks=False)


def _replace_files(new: Path, place: Path, owned: Collection[str]) -> None:
    """Replace the files of `place` one by one, each atomically."""
    kept = {*_kept(new, place, owned), *_files(new)}
    for file in sorted(_files(new)):
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / file, place / file)
    for file in _files(place):
        if file not in kept:
            with suppress(FileNotFoundError):
                (place / file).unlink()
