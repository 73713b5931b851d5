"""Where Triton kernels can run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor that torch.empty makes holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_device() -> Callable[..., Any]:
    """`on_device(function, arguments)` calls a Triton implementation with its tensors moved to where it runs.

    That is a GPU, or the CPU with TRITON_INTERPRET=1 (slow: element by element). Results come back to the CPU;
    arguments that the function wrote to are copied back.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install -e '.[test]' on Linux, x86-64")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1")
    device = "cpu" if interpreted else "cuda"

    def call(function: Callable[..., Any], arguments: Any) -> Any:
        moved = [a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in arguments]
        with poisoned():
            result = function(*moved)
        for given, used in zip(arguments, moved, strict=True):
            if isinstance(given, torch.Tensor):
                given.copy_(used)
        if isinstance(result, tuple):
            return tuple(r.cpu() for r in result)
        return None if result is None else result.cpu()

    return call
