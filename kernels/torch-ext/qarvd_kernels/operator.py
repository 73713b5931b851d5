"""How an operator is declared: one schema, one shape function, and whatever implementation `dispatch` picks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from .dispatch import Dispatched

LIBRARY = torch.library.Library("qarvd", "DEF")
OPERATORS: dict[str, Dispatched] = {}
"""Every operator by name, in order of declaration."""

Function = TypeVar("Function", bound=Callable[..., Any])


def operator(arguments: str, returns: str) -> Callable[[Function], Function]:
    """Declare the operator `qarvd::<name of the decorated function>`.

    The body of the decorated function is the operator's shape function: it checks the arguments (shapes, dtypes and ranges,
    never tensor values) and returns empty results. It runs while tracing, and once per kind of call in eager mode, where
    its ValueErrors reach the caller. The name of its module is also the name of the modules that implement it:
    `cuda/<name>.py`, `triton/<name>.py` and `reference/<name>.py`.

    Args:
        arguments: the arguments of the schema. None has a default: a boxed kernel would not be handed it.
        returns: what the schema returns.
    """

    def declare(shape_function: Function) -> Function:
        name, module = shape_function.__name__, shape_function.__module__.rpartition(".")[2]
        LIBRARY.define(f"{name}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
        dispatched = OPERATORS[name] = Dispatched(name, module, shape_function)
        # Below autograd and for every device: dispatch looks at the device itself.
        LIBRARY.impl(name, dispatched.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qarvd::{name}", shape_function, lib=LIBRARY)
        overload = getattr(torch.ops.qarvd, name).default

        @wraps(shape_function)
        def call(*args, **kwargs):
            # Torch's dispatcher is for what traces or differentiates; without either it only costs as much as a launch.
            if kwargs or type(args[0]) is not Tensor or torch.is_grad_enabled() or torch.compiler.is_compiling():
                return overload(*args, **kwargs)
            if args[0].is_meta:  # shapes are all there is
                return shape_function(*args)
            return dispatched.run(*args)

        call.overload = overload
        return call

    return declare
