"""JSON from files is checked before its values are used; errors name file and entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import pytest

from qarvd_diffusers.files.schema import check_fields, from_fields, parse_json, read_json

DAMAGED = {
    "empty": b"",
    "truncated": b'{"a": 1',
    "not UTF-8": b'{"a": "\xff"}',
    "another type": b"[1, 2]",
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "a float that overflows": b'{"a": 1e999}',
    "a key given twice": b'{"a": 1, "b": {"c": 1, "c": 2}}',
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "an integer of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "half a character": b'{"a": "\\ud800"}',
    "NUL": b'{"a": 1}\0',
}


@dataclasses.dataclass(frozen=True)
class Part:
    count: int
    kind: Literal["one", "two"] = "one"


@dataclasses.dataclass(frozen=True)
class Whole:
    share: float
    flag: bool = False
    steps: tuple[float, ...] = ()
    pair: tuple[int, str] | None = None
    parts: Mapping[str, Part] | None = None
    weights: str | tuple[float, ...] = "uniform"


WHOLE = {"share": 1, "flag": True, "steps": [3, 2.5], "pair": [1, "x"], "parts": {"a": {"count": 3}}, "weights": [1]}
WRONG_PARTS = [{"count": 128.0}, {"count": True}, {"kind": "three"}, {"kind": ["one"]}, {"x": 1}]
WRONG = {
    "share": [True, "1", None, [1], float("nan"), 10**400],
    "flag": [1, 0, "true", None],
    "steps": [3, "32", None, [None], [[1]], {"0": 1}, [True]],
    "pair": [[1], [1, 2], [1.0, "x"], ["x", 1], [1, "x", 2], {}],
    "parts": [[], "a", {"a": 3}, {"a": {}}, *({"a": {"count": 1, **wrong}} for wrong in WRONG_PARTS)],
    "weights": [1, None, True, [None], {"a": 1}],
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_json_is_a_value_error_with_the_file(kind, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json(path)


def test_json_of_any_editor_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('\ufeff{"a": [1, 1e3, "\\u00e9 \\ud83d\\ude00"]}'.encode())
    assert read_json(path) == {"a": [1, 1000.0, "é 😀"]}
    assert parse_json("[1]", "here", list) == [1]
    with pytest.raises(OSError, match="absent"):
        read_json(tmp_path / "absent.json")


def test_values_come_back_as_their_fields_say():
    part = Part(3)
    assert from_fields(Whole, WHOLE, "f") == Whole(1, True, (3, 2.5), (1, "x"), {"a": part}, (1,))
    assert from_fields(Whole, {"share": 0.5, "parts": {"a": part}}, "f").parts == {"a": part}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_of_another_type_is_named(name, value):
    with pytest.raises(ValueError, match=rf"^file\.json: {name}.* is .*expected|^file\.json: {name}.* keys"):
        from_fields(Whole, {**WHOLE, name: value}, "file.json")


@pytest.mark.parametrize("values", [{}, {"share": 1, "other": 2}, [1], None, "share"])
def test_unknown_and_missing_keys_are_named(values):
    with pytest.raises(ValueError, match=r"^file\.json: (missing keys 'share'|unknown keys 'other'|is )"):
        from_fields(Whole, values, "file.json")
    assert from_fields(Whole, {"share": 1, "other": 2}, "f", extra=True) == Whole(1)


def test_a_constructed_dataclass_is_checked_by_the_same_rules():
    check_fields(Whole(1.0, steps=(1, 2)))
    with pytest.raises(ValueError, match=r"Whole\.flag is 1, expected true or false"):
        check_fields(Whole(1.0, flag=1))
