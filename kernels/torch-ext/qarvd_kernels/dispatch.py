"""Choose the implementation of an operator, and say why each other one does not run.

Implementations stand in the order of `BACKENDS`. Each is a module `<backend>/<theme>.py` with a function of the
operator's name and

    unsupported_reason(operator: str, device: torch.device, arguments: Mapping[str, Any] | None) -> str | None

which returns why this implementation cannot (or should not) run there, or None if it can. `arguments` holds the call's
arguments by name, or is None to ask about the device only. The first implementation without a reason is taken; an
exception counts as a reason. The reference supports everything. Compiled implementations receive contiguous tensors,
unless they are marked with `takes_strides`. Copies would lose what an operator writes to its arguments, so those must
be checked here.

The environment variable `QARVD_KERNELS` (one of `BACKENDS`) disables all other compiled implementations.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("cuda", "fa3", "triton", "reference")
ENVIRONMENT_VARIABLE = "QARVD_KERNELS"
_MAX_CACHED_SIGNATURES = 4096  # per operator; shapes repeat, so that real use stays far below

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Implementation that runs, and why each other one does not.

    Attributes:
        backend: one of `BACKENDS`.
        function: what is called.
        others: `(backend, reason)` of every other implementation.
    """

    backend: str
    function: Callable[..., Any]
    others: tuple[tuple[str, str], ...]


def forced() -> str | None:
    """Return the backend that `QARVD_KERNELS` asks for, or None.

    Raises:
        ValueError: it names no backend.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is {name!r}, expected one of {', '.join(BACKENDS)} (or unset)")
    return name


@cache
def _load(backend: str, theme: str) -> ModuleType | str:
    """Import the module that implements a theme, or say why there is none."""
    name = f"{__package__}.{backend}.{theme}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            return f"no {backend} implementation in this version"
        return f"the package {error.name} is not installed"
    except Exception as error:  # a broken installation of a compiler must not take the reference down with it
        return f"{name} does not import: {type(error).__name__}: {error}"


def _unsupported_reason(
    backend: str, operator: str, theme: str, device: torch.device, arguments: Mapping[str, Any] | None
) -> str | None:
    """Return why a backend does not run an operator, or None."""
    if backend == "reference":
        return None
    if forced() not in (None, backend):
        return f"{ENVIRONMENT_VARIABLE}={forced()}"
    module = _load(backend, theme)
    if isinstance(module, str):
        return module
    if not hasattr(module, operator):
        return f"no {backend} implementation in this version"
    try:
        return module.unsupported_reason(operator, device, arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def choose(operator: str, theme: str, device: torch.device, arguments: Mapping[str, Any] | None = None) -> Choice:
    """Choose the implementation of `operator` on `device`.

    Args:
        operator: its name.
        theme: the name of the modules that implement it.
        device: where the call runs.
        arguments: the call's arguments by name; None asks about the device only.
    """
    others = []
    for backend in BACKENDS:
        reason = _unsupported_reason(backend, operator, theme, device, arguments)
        if reason is None:
            break
        others.append((backend, reason))
    rest = [(other, f"{backend} comes first") for other in BACKENDS[BACKENDS.index(backend) + 1 :]]
    return Choice(backend, getattr(_load(backend, theme), operator), tuple(others + rest))


def takes_strides(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a compiled implementation that accepts tensors with any strides."""
    function.takes_strides = True
    return function


def _on_contiguous(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` so that it receives contiguous copies of tensors that are not."""

    def call(*args: Any) -> Any:
        return function(*[a.contiguous() if isinstance(a, Tensor) else a for a in args])

    return call


class Dispatched:
    """One operator: caches, per call signature, which implementation to call.

    The signature is everything about the arguments but tensor values: dtypes, shapes, strides, devices, numbers. The
    shape function checks each signature once; later calls with it cost one dictionary look-up.

    Args:
        name: of the operator.
        theme: the name of the modules that implement it.
        shape_function: checks the arguments and returns empty results.
    """

    def __init__(self, name: str, theme: str, shape_function: Callable[..., Any]) -> None:
        self.name, self.theme = name, theme
        self.shape_function = shape_function
        self._functions: dict[tuple, Callable[..., Any]] = {}

    def run(self, *args: Any) -> Any:
        """Call the implementation for these arguments."""
        signature = tuple(
            [(a.dtype, a.shape, a.stride(), a.get_device()) if isinstance(a, Tensor) else a for a in args]
        )
        function = self._functions.get(signature)
        if function is None:
            function = self._remember(signature, args)
        return function(*args)

    def _remember(self, signature: tuple, args: tuple) -> Callable[..., Any]:
        """Check a new signature, choose its implementation and cache it."""
        self.shape_function(*args)
        tensors = [a for a in args if isinstance(a, Tensor)]
        devices = {str(t.device) for t in tensors}
        if len(devices) > 1:
            raise ValueError(
                f"qarvd_kernels: the tensors of {self.name} are on {sorted(devices)}, expected one device"
            )
        choice = self.choose(args)
        logger.debug("%s runs as %s; others: %s", self.name, choice.backend, choice.others)
        function = choice.function
        strided = choice.backend == "reference" or hasattr(function, "takes_strides")
        if not strided and not all(t.is_contiguous() for t in tensors):
            function = _on_contiguous(function)
        if len(self._functions) >= _MAX_CACHED_SIGNATURES:
            self._functions.clear()
        return self._functions.setdefault(signature, function)

    def choose(self, args: tuple) -> Choice:
        """Choose the implementation for a call with these arguments."""
        names = inspect.signature(self.shape_function).parameters
        device = next(a.device for a in args if isinstance(a, Tensor))
        return choose(self.name, self.theme, device, dict(zip(names, args, strict=True)))

    def forget(self) -> None:
        """Clear the cache, after a change of `QARVD_KERNELS`."""
        self._functions.clear()
