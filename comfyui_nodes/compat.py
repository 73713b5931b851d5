"""Hide the differences between ComfyUI versions, and wrap the work of every node."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io

CATEGORY = "Q-ARVD"
# Search aliases of the loaders and of Stream Generate: what people call these models.
FAMILY = ["self forcing", "self-forcing", "wan", "causvid", "longlive", "krea realtime", "video", "image to video"]


class NodeError(RuntimeError):
    """Tell the user of a node in one line what is wrong, and in a second line what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}\n{remedy}")
        self.line = f"{problem} {remedy}"  # for places that show only one


def supported(constructor: Callable, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that `constructor` accepts in this version: others would keep the pack from loading."""
    known = inspect.signature(constructor).parameters
    return {name: value for name, value in options.items() if name in known}


def widget(kind: Any, name: str, **options: Any) -> Any:
    """Make an input of type `kind` (`io.Int`, ...), without the options that this ComfyUI does not support."""
    return kind.Input(name, **supported(kind.Input.__init__, options))


def output(kind: Any, name: str, tooltip: str) -> Any:
    """Make an output of type `kind`, without the options that this ComfyUI does not support."""
    return kind.Output(**supported(kind.Output.__init__, {"display_name": name, "tooltip": tooltip}))


def schema(**options: Any) -> io.Schema:
    """Make a node's schema, without the options that this ComfyUI does not support."""
    return io.Schema(**supported(io.Schema.__init__, {"category": CATEGORY, **options}))


def work(execute: Callable) -> Callable:
    """Decorate `execute` to run outside of ComfyUI's inference mode, on ordinary tensors.

    Tensors made in inference mode can neither be used in calibration nor be changed in place later.
    """

    @functools.wraps(execute)
    def run(cls: type, **inputs: Any) -> io.NodeOutput:
        with torch.inference_mode(False), torch.no_grad():
            return execute(cls, **{name: ordinary(value) for name, value in inputs.items()})

    return run


def ordinary(value: Any) -> Any:
    """Return `value` with its inference tensors, at any depth of lists and dicts, cloned to ordinary ones."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, list | tuple):
        return type(value)(ordinary(item) for item in value) if type(value) in (list, tuple) else value
    if type(value) is dict:
        return {key: ordinary(item) for key, item in value.items()}
    return value


def stop_if_interrupted() -> None:
    """Raise ComfyUI's interruption if the user pressed Stop."""
    comfy.model_management.throw_exception_if_processing_interrupted()
