"""The one place that imports `qarvd_diffusers`: late, and with an error that helps."""

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

# Where the packages lie if the whole repository was cloned into custom_nodes.
_CLONE = Path(__file__).resolve().parent.parent
_IN_CLONE = {
    "qarvd_kernels": _CLONE / "kernels" / "torch-ext" / "qarvd_kernels",
    "qarvd_diffusers": _CLONE / "qarvd_diffusers",
}


def library(module: str = "") -> ModuleType:
    """`qarvd_diffusers`, or one of its modules, installed or from the clone this pack is part of.

    Raises:
        NodeError: it is missing, or something it needs is.
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
    """Say once, in the log, what is missing before a node runs and fails; the nodes are listed all the same."""
    missing = _missing_requirements()
    if importlib.util.find_spec("qarvd_diffusers") is None and not _has_library():
        missing.insert(0, "qarvd_diffusers")
    if missing:
        logger.warning("Q-ARVD cannot run yet, it needs %s. %s", ", ".join(missing), _remedy())


def _missing_requirements() -> list[str]:
    """What the pack's requirements ask for and this Python does not have."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # it comes with transformers, which ComfyUI needs itself
        return []
    missing = []
    lines = (Path(__file__).resolve().parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for line in (line.partition("#")[0].strip() for line in lines):
        if not line:
            continue
        requirement = Requirement(line)
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(line)
        else:
            if not requirement.specifier.contains(installed, prereleases=True):
                missing.append(f"{line} (not {installed})")
    return missing


def _has_library() -> bool:
    """Whether this pack is part of a clone of the whole repository."""
    return (_IN_CLONE["qarvd_diffusers"] / "__init__.py").is_file()


def _remedy() -> str:
    pip = f'"{sys.executable}" -m pip install'
    if _has_library():
        return f'Run {pip} -r "{_CLONE / "requirements.txt"}", then restart ComfyUI.'
    return f"Clone the whole repository of this pack, run {pip} -e . there, then restart ComfyUI."


def _import_from(package: str, folder: Path) -> None:
    """Import a package from its folder, without putting the folder's neighbours on the path."""
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
