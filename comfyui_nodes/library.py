"""Import `qarvd_diffusers` when a node runs, with a helpful error if that fails."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

from .compat import NodeError

logger = logging.getLogger(__name__)

# Where the packages are if the whole repository was cloned into custom_nodes.
_CLONE = Path(__file__).resolve().parent.parent
_IN_CLONE = {
    "qarvd_kernels": _CLONE / "kernels" / "torch-ext" / "qarvd_kernels",
    "qarvd_diffusers": _CLONE / "qarvd_diffusers",
}


def library(module: str = "") -> ModuleType:
    """Import `qarvd_diffusers` or one of its modules, installed or from the clone that this pack is part of.

    Raises:
        NodeError: if it or one of its dependencies is missing.
    """
    name = f"qarvd_diffusers.{module}" if module else "qarvd_diffusers"
    try:
        if importlib.util.find_spec("qarvd_diffusers") is None:
            for package, folder in _IN_CLONE.items():
                _import_from(package, folder)
        return importlib.import_module(name)
    except ImportError as error:
        raise NodeError(
            f"The Python library qarvd_diffusers cannot be imported: {error}",
            _remedy(),
        ) from error


def warn_if_incomplete() -> None:
    """Log at startup which packages are missing; the nodes are listed nevertheless."""
    missing = _missing_requirements()
    if importlib.util.find_spec("qarvd_diffusers") is None and not _has_library():
        missing.insert(0, "qarvd_diffusers")
    if missing:
        logger.warning("Q-ARVD needs %s. %s", ", ".join(missing), _remedy())


def _missing_requirements() -> list[str]:
    """List the pack's requirements that this Python does not meet."""
    try:
        from packaging.requirements import Requirement

        lines = (Path(__file__).resolve().parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    except (ImportError, OSError):  # no requirements, or no way to compare versions
        return []
    missing = []
    for requirement in (Requirement(text) for line in lines if (text := line.partition("#")[0].strip())):
        found = _installed(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            missing.append(f"{requirement} ({'not installed' if found is None else f'not {found}'})")
    return missing


def _installed(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_library() -> bool:
    """Tell whether this pack is part of a clone of the whole repository."""
    return (_IN_CLONE["qarvd_diffusers"] / "__init__.py").is_file()


def _remedy() -> str:
    """Say how to install what is missing."""
    pip = f"{_quoted(sys.executable)} -m pip install"
    if _has_library():
        return f"Run {pip} -r {_quoted(_CLONE / 'requirements.txt')}, then restart ComfyUI."
    return f"Clone the whole repository of this pack, run {pip} -e . there, then restart ComfyUI."


def _quoted(path: str | Path) -> str:
    """Quote a path for any shell, only if needed: PowerShell takes a quoted program for a string."""
    return f'"{path}"' if " " in str(path) else str(path)


def _import_from(package: str, folder: Path) -> None:
    """Import a package from its folder, without adding the folder's parent to the path."""
    if package in sys.modules or not (folder / "__init__.py").is_file():
        return
    spec = importlib.util.spec_from_file_location(
        package, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[package])
    except BaseException:
        del sys.modules[package]
        raise
