"""Declare operators: a schema from annotations, a shape function, and the implementation that `dispatch` picks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, Signature
from itertools import islice
from typing import Annotated, Any, get_type_hints

import torch
from torch import Tensor

from .dispatch import Dispatched

LIBRARY = torch.library.Library("qarvd", "DEF")
OPERATORS: dict[str, Dispatched] = {}
"""Every operator by name, in order of declaration."""

Constant = Annotated[int, "never symbolic"]
"""An integer argument that tracing keeps as a number; a plain `int` may become a symbol."""


def operator(mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare the operator `qarvd::<name of the decorated function>`.

    The body of the decorated function is the operator's shape function: it checks the arguments (shapes, dtypes and
    ranges, never tensor values) and returns empty results. It runs while tracing, and once per signature in eager
    mode, where its ValueErrors reach the caller. The name of its module is also the name of the modules that implement
    it: `cuda/<name>.py`, `triton/<name>.py` and `reference/<name>.py`.

    Its annotations are the schema. A parameter whose type is a `NamedTuple` is a group of arguments that several
    operators share: callers and implementations pass and receive its fields one by one, in its place. No argument has
    a default: a boxed kernel would not be handed it.

    Args:
        mutates: names of the arguments that the operator writes to.
    """

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        """Define the operator, and return what calls it."""
        name, module = function.__name__, function.__module__.rpartition(".")[2]
        shape_function = _ungrouped(function)
        LIBRARY.define(name + _schema(shape_function, mutates), tags=(torch.Tag.pt2_compliant_tag,))
        dispatched = OPERATORS[name] = Dispatched(name, module, shape_function)
        # Below autograd and for every device: dispatch looks at the device itself.
        LIBRARY.impl(name, dispatched.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qarvd::{name}", shape_function, lib=LIBRARY)
        overload = getattr(torch.ops.qarvd, name).default

        @wraps(shape_function)
        def call(*args: Any, **kwargs: Any) -> Any:
            """Call the operator, through torch's dispatcher where that has something to do."""
            # Only tracing and autograd need torch's dispatcher; otherwise it costs as much as a kernel launch.
            if kwargs or type(args[0]) is not Tensor or torch.is_grad_enabled() or torch.compiler.is_compiling():
                return overload(*args, **kwargs)
            if args[0].is_meta:  # shapes are all there is
                return shape_function(*args)
            return dispatched.run(*args)

        call.overload = overload
        return call

    return declare


def _ungrouped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let `function` take the fields of its groups one by one, as `__signature__` of the result lists them."""
    hints = get_type_hints(function, include_extras=True)
    returns = hints.pop("return")
    flat: dict[str, Any] = {}
    for name, hint in hints.items():
        flat |= get_type_hints(hint, include_extras=True) if _is_group(hint) else {name: hint}
    parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=hint) for name, hint in flat.items()]
    signature = Signature(parameters, return_annotation=returns)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        """Gather the fields into groups, and call `function`."""
        values = iter(signature.bind(*args, **kwargs).arguments.values())
        return function(
            *[hint(*islice(values, len(hint._fields))) if _is_group(hint) else next(values) for hint in hints.values()]
        )

    call.__signature__ = signature
    return call


def _is_group(hint: Any) -> bool:
    """Return whether an annotation is a group of arguments."""
    return hasattr(hint, "_fields")


def _schema(function: Callable[..., Any], mutates: Sequence[str]) -> str:
    """`(arguments) -> results` of a function of `_ungrouped`."""

    def prototype() -> None: ...

    signature = function.__signature__
    plain = [p.replace(annotation=int) if p.annotation == Constant else p for p in signature.parameters.values()]
    returns = None if signature.return_annotation is type(None) else signature.return_annotation
    prototype.__signature__ = Signature(plain, return_annotation=returns)
    schema = torch.library.infer_schema(prototype, mutates_args=mutates)
    for parameter in signature.parameters.values():
        if parameter.annotation == Constant:  # torch has no annotation for these
            schema = re.sub(rf"\bSymInt {parameter.name}\b", f"int {parameter.name}", schema)
    return schema
