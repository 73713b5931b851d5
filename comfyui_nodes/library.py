"""The one place that imports `qarvd_diffusers`: late, and with an error that helps."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .compat import NodeError

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
            f"Install it with the Python that runs ComfyUI: {sys.executable} -m pip install qarvd-diffusers, or run "
            f"pip install -e in a clone of its repository; then restart ComfyUI.",
        ) from error


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
