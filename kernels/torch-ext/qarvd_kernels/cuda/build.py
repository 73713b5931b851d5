"""Build the CUDA sources with the installed nvcc, once, into the user's cache folder.

The library has a plain C interface and links its own CUDA runtime, so it works with any version of torch. Its name is
a hash of sources, flags and compiler; its last bytes are a checksum, which detects a damaged file before it is loaded.
Processes that build at the same time wait for each other.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from .ownership import foreign_reason

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
FLAGS = ("-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler", "-fPIC", "--shared")
MINIMUM_NVCC = (12, 5)  # the first whose runtime has cudaGetDriverEntryPointByVersion
_DIGEST = hashlib.sha256().digest_size


class BuildError(RuntimeError):
    """Raised when the kernels cannot be built or loaded; the message names cause and remedy."""


def cache_folder() -> Path:
    """Return the folder of built libraries: `$QARVD_CACHE/kernels`, else `qarvd/kernels` in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qarvd"
    return Path(os.environ.get("QARVD_CACHE") or default) / "kernels"


def find_nvcc() -> Path:
    """Find the compiler: in `$CUDA_HOME` if that is set, else on the PATH, else in /usr/local/cuda.

    Raises:
        BuildError: there is none.
    """
    home = os.environ.get("CUDA_HOME")
    nvcc = Path(home) / "bin" / "nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.access(nvcc, os.X_OK):
        place = f"in CUDA_HOME={home}" if home else "on the PATH or in /usr/local/cuda"
        raise BuildError(f"no nvcc {place}; install the CUDA toolkit {_dotted(MINIMUM_NVCC)} or later")
    return Path(nvcc)


def nvcc_version(nvcc: Path) -> str:
    """Return the output of `nvcc --version`.

    Raises:
        BuildError: it does not run, or is older than `MINIMUM_NVCC`.
    """
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{nvcc} does not run: {error}") from error
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None:
        raise BuildError(f"{nvcc} --version prints no release: {text.strip()[:80]!r}")
    if tuple(map(int, release.groups())) < MINIMUM_NVCC:
        raise BuildError(f"{nvcc} is release {_dotted(release.groups())}, expected {_dotted(MINIMUM_NVCC)} or later")
    return text


def build() -> Path:
    """Return the path of the built library, from the cache if it is there and intact.

    Raises:
        BuildError: no compiler, no place to write, a compilation error, or a cache that others own or can write.
    """
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the CUDA kernels are built on Linux only, this is {sys.platform}")
    nvcc = find_nvcc()
    key = hashlib.sha256(repr((FLAGS, nvcc_version(nvcc))).encode())
    for source in sorted(SOURCES.iterdir()):
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    target = cache_folder() / f"qarvd-sm90a-{key.hexdigest()[:20]}.so"
    if reason := foreign_reason(target.parent.parent, target.parent, target):
        raise BuildError(reason)
    if not _is_whole(target):
        try:
            target.parent.parent.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(mode=0o755, exist_ok=True)
            with _locked(target.with_suffix(".lock")):
                if not _is_whole(target):  # another process may have been first
                    _compile(nvcc, target)
        except OSError as error:
            raise BuildError(f"cannot write {target}: {error}; set QARVD_CACHE to a writable folder") from error
    return target


@cache
def _load() -> ctypes.CDLL | BuildError:
    """Build and load the library once per process; return it, or the error."""
    try:
        path = build()
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"{path} does not load: {error}") from error
    except BuildError as error:
        return error


def library() -> ctypes.CDLL:
    """Return the library, built and loaded once per process.

    Raises:
        BuildError: the same one on every call.
    """
    loaded = _load()
    if isinstance(loaded, BuildError):
        raise loaded
    return loaded


def unavailable_reason() -> str | None:
    """Return why the library is not available, or None. Builds it if necessary; never raises."""
    loaded = _load()
    return str(loaded) if isinstance(loaded, BuildError) else None


def message(code: int) -> str:
    """Return CUDA's message for the error code of a launch."""
    function = library().qarvd_error
    function.restype = ctypes.c_char_p
    return function(code).decode()


def _dotted(version: tuple) -> str:
    return ".".join(map(str, version))


def _is_whole(library: Path) -> bool:
    """Return whether a library ends with the digest of its content."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return len(content) > _DIGEST and hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes; it is released with the file or with the process."""
    import fcntl

    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("Another process is compiling the CUDA kernels: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(nvcc: Path, target: Path) -> None:
    """Compile the sources and append a digest to the library."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        output = Path(folder) / target.name
        command = [nvcc, *FLAGS, *sorted(SOURCES.glob("*.cu")), "-o", output]
        # A warning, since nothing less is shown where nobody has set up logging.
        logger.warning("Compiling the CUDA kernels with %s, once; this takes about a minute", nvcc)
        start = time.monotonic()
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            lines = (result.stderr or result.stdout).strip().splitlines()
            cause = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
            raise BuildError(f"{nvcc} failed: {cause.strip()}")
        # What follows an ELF image is not read by loaders.
        output.write_bytes(output.read_bytes() + hashlib.sha256(output.read_bytes()).digest())
        output.chmod(0o755)  # whatever the umask: one that others can write would not be loaded
        os.replace(output, target)
        logger.warning("Compiled in %.0f s; they are kept in %s", time.monotonic() - start, target)
