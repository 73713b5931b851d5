"""Check JSON from files before its values are used: syntax, keys and types, with errors that name file and entry."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum
from numbers import Integral, Real
from typing import Any, TypeVar

from .text import read_text, require_regular

T = TypeVar("T")

_SHOWN = 80  # characters of a wrong value in an error
_NAMED = 5  # names in an error
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
}


def read_json(path: str | os.PathLike[str], kind: type[T] = dict) -> T:  # type: ignore[assignment]
    """Read one JSON file.

    Args:
        path: the file, UTF-8.
        kind: `dict` or `list`, what the file holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, not JSON, or holds something else; the message names it.
    """
    require_regular(path)
    return parse_json(read_text(path), path, kind)


def parse_json(text: str | bytes, where: object, kind: type[T] = dict) -> T:  # type: ignore[assignment]
    """Parse JSON more strictly than `json.loads`: without NaN, infinity, keys given twice and lone surrogates.

    Args:
        text: the JSON.
        where: file, or file and entry, for errors.
        kind: `dict` or `list`, what the text holds.

    Raises:
        ValueError: it is not such JSON; the message names `where`.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # texts that no file can hold fail here, with their name
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, kind):
        raise ValueError(f"{where}: holds {_shown(value)}, expected {_KINDS.get(kind, kind.__name__)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict; raise ValueError for a key that is given twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is given twice")
    return values


def _finite(text: str) -> float:
    """Read a number; raise ValueError for NaN, infinity, and numbers too large for a float."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def from_fields(cls: type[T], values: Mapping[str, Any], where: object, *, extra: bool = False) -> T:
    """Build a dataclass from a JSON object, each value checked by the annotation of its field before it is used.

    Fields may be `int` (no bool, no 3.0, at most 64 bits), `float` (finite; integers too), `bool`, `str`, enums of
    texts, `None`, `Literal`, `Any`, unions, `tuple`, `list`, `Mapping` and `dict` of them, and other such dataclasses.
    Numbers keep their type; lists become tuples where a tuple is expected.

    Args:
        cls: a dataclass; its own ValueErrors are passed on with `where`.
        values: the JSON object.
        where: file, or file and entry, for errors.
        extra: leave out unknown keys, for objects that others extend.

    Raises:
        ValueError: an unknown or missing key, or a value of another type; the message names `where`, the key, what
            was got and what was expected.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: is {_shown(values)}, expected an object")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    optional = {name for name, field in fields.items() if _has_default(field)}
    annotations = {name: _hints(cls)[name] for name in fields}  # type: ignore[arg-type]
    checked = check_mapping(values, annotations, where, optional=optional, extra=extra)
    try:
        return cls(**checked)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_mapping(
    values: Mapping[str, Any],
    expected: Mapping[str, Any],
    where: object,
    *,
    optional: typing.Collection[str] = (),
    extra: bool = False,
) -> dict[str, Any]:
    """Check a JSON object that is no dataclass: name -> annotation; see `from_fields` for the rest."""
    unknown, missing = values.keys() - expected.keys(), expected.keys() - values.keys() - set(optional)
    for kind, names in (("unknown", () if extra else unknown), ("missing", missing)):
        if names:
            listed = ", ".join(sorted(map(repr, names))[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
            raise ValueError(f"{where}: {kind} keys {listed}; expected {', '.join(sorted(expected))}")
    return {
        name: check_value(value, expected[name], f"{where}: {name}")
        for name, value in values.items()
        if name in expected
    }


def check_fields(instance: Any) -> None:
    """Check the values of a dataclass that was constructed by a caller, in place: for its `__post_init__`.

    Raises:
        ValueError: a value of another type than its annotation; the message names class and field.
    """
    cls = type(instance)
    for field in dataclasses.fields(cls):
        value = getattr(instance, field.name)
        checked = check_value(value, _hints(cls)[field.name], f"{cls.__name__}.{field.name}")  # type: ignore[arg-type]
        if checked is not value:
            object.__setattr__(instance, field.name, checked)


def check_value(value: Any, expected: Any, where: object) -> Any:
    """Check one value by an annotation; return it, with lists as tuples and objects as dataclasses where expected.

    Raises:
        ValueError: it is of another type; the message names `where`, what was got and what was expected.
    """
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _check_union(value, args, where)
    if origin is typing.Literal:
        valid = any(type(value) is type(choice) and value == choice for choice in args)
    elif origin in (tuple, list, Sequence):
        return _check_sequence(value, origin, args, where)
    elif origin in (dict, Mapping):
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: check_value(each, args[1], f"{where}[{key!r}]") for key, each in value.items()}
        valid = False
    elif isinstance(expected, type) and dataclasses.is_dataclass(expected):
        return value if isinstance(value, expected) else from_fields(expected, value, where)
    else:
        valid = _is_plain(value, expected)
    if not valid:
        raise ValueError(f"{where} is {_shown(value)}, expected {_described(expected)}")
    return value


def _check_union(value: Any, choices: Sequence[Any], where: object) -> Any:
    """Check a value by the only member of a union that it can be meant as, else by all."""
    if value is None and type(None) in choices:
        return None
    others = [choice for choice in choices if choice is not type(None)]
    if len(others) == 1:
        return check_value(value, others[0], where)
    nested = [choice for choice in others if typing.get_origin(choice) or dataclasses.is_dataclass(choice)]
    if any(_is_plain(value, choice) for choice in others if choice not in nested):
        return value
    if len(nested) == 1 and isinstance(value, Mapping | list | tuple):
        return check_value(value, nested[0], where)
    raise ValueError(f"{where} is {_shown(value)}, expected {' or '.join(map(_described, choices))}")


def _check_sequence(value: Any, origin: Any, args: Sequence[Any], where: object) -> Any:
    """Check each item of a sequence; a tuple of several annotations has that many items."""
    fixed = origin is tuple and not (len(args) == 2 and args[1] is Ellipsis)
    if not isinstance(value, list | tuple) or (fixed and len(value) != len(args)):
        count = f"{len(args)} values" if fixed else "values"
        raise ValueError(f"{where} is {_shown(value)}, expected a list of {count}")
    kinds = args if fixed else [args[0]] * len(value)
    items = [check_value(each, kind, f"{where}[{i}]") for i, (each, kind) in enumerate(zip(value, kinds, strict=True))]
    return tuple(items) if origin is tuple else items


def _is_plain(value: Any, expected: Any) -> bool:
    """Tell whether a value is of a plain class, numbers of numpy included."""
    if expected in (None, type(None)):
        return value is None
    if expected is int:
        return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < 2**64
    if expected is float:
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        try:
            return math.isfinite(value)
        except OverflowError:  # an integer beyond every float
            return False
    if isinstance(expected, type) and issubclass(expected, Enum):
        return isinstance(value, expected) or (isinstance(value, str) and value in [each.value for each in expected])
    return isinstance(value, expected)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """Resolve the annotations of a class."""
    return typing.get_type_hints(cls)


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _described(expected: Any) -> str:
    """Name an annotation for people who read JSON."""
    if expected in (None, type(None)):
        return "null"
    if typing.get_origin(expected) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(expected)))}"
    if typing.get_origin(expected) in (dict, Mapping):
        return "an object"
    if typing.get_origin(expected) in (tuple, list, Sequence):
        return "a list"
    if isinstance(expected, type) and issubclass(expected, Enum):
        return f"one of {', '.join(repr(each.value) for each in expected)}"
    return _KINDS.get(expected, getattr(expected, "__name__", str(expected)))


def _shown(value: Any) -> str:
    """Show a value, shortened, with its kind where it does not tell."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
