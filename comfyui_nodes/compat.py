"""What differs between ComfyUI versions, and what every node does around its work."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io

CATEGORY = "Q-ARVD"
# Search aliases of the nodes where work begins: what people call these models and what they do.
FAMILY = ["self forcing", "self-forcing", "wan", "causvid", "longlive", "krea realtime", "video", "image to video"]


class NodeError(RuntimeError):
    """An error for the user of a node: its first line says what is wrong, the second what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}\n{remedy}")
        self.line = f"{problem} {remedy}"  # for places that show only one


def supported(constructor: Callable, options: dict[str, Any]) -> dict[str, Any]:
    """The options that this version's constructor knows: one it does not know would keep the whole pack from loading."""
    known = inspect.signature(constructor).parameters
    return {name: value for name, value in options.items() if name in known}


def widget(kind: Any, name: str, **options: Any) -> Any:
    """An input of type `kind` (`io.Int`, ...), without the options that this ComfyUI does not know yet."""
    return kind.Input(name, **supported(kind.Input.__init__, options))


def schema(**options: Any) -> io.Schema:
    """A node's schema, likewise."""
    return io.Schema(**supported(io.Schema.__init__, {"category": CATEGORY, **options}))


def work(execute: Callable) -> Callable:
    """Decorator of `execute`: ordinary tensors inside, whatever ComfyUI's own inference mode is.

    Tensors made in inference mode can neither be calibrated with nor changed in place later.
    """

    @functools.wraps(execute)
    def run(cls: type, **inputs: Any) -> io.NodeOutput:
        with torch.inference_mode(False), torch.no_grad():
            return execute(cls, **{name: ordinary(value) for name, value in inputs.items()})

    return run


def ordinary(value: Any) -> Any:
    """`value` with its inference tensors, at any depth of lists and dicts, cloned to ordinary ones."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, list | tuple):
        return type(value)(ordinary(item) for item in value) if type(value) in (list, tuple) else value
    if type(value) is dict:
        return {key: ordinary(item) for key, item in value.items()}
    return value


def stop_if_interrupted() -> None:
    """Raise ComfyUI's interruption, if the user pressed stop."""
    comfy.model_management.throw_exception_if_processing_interrupted()
