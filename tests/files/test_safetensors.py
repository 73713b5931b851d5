"""Safetensors files are read as they were written, or refused by file and tensor before a tensor is used."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from qarvd_diffusers.files import safetensors as files
from qarvd_diffusers.files.safetensors import TensorSpec

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "empty": torch.ones(0, 3),
    "scalar": torch.tensor(3, dtype=torch.int8),
    "é": torch.ones(1, dtype=torch.float16),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", {"format": "pt"})
    return tmp_path / "a.safetensors"


def edit(path, change):
    """Rewrite the header of a file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = (text if isinstance(text, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_the_header_says_what_the_file_holds(path):
    specs, metadata = files.read_header(path)
    assert specs == {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}
    assert metadata == {"format": "pt"}
    files.check_specs(path, specs, files.read_specs(path))


HEADERS = {
    "another dtype of one size": lambda h: h["b"].update(dtype="F32"),
    "unknown dtype": lambda h: h["b"].update(dtype="F17"),
    "dtype a list": lambda h: h["b"].update(dtype=["F16"]),
    "no dtype": lambda h: h["b"].pop("dtype"),
    "shape a number": lambda h: h["b"].update(shape=4),
    "shape of floats": lambda h: h["b"].update(shape=[4.0]),
    "negative shape": lambda h: h["b"].update(shape=[-2, -2]),
    "huge shape": lambda h: h["b"].update(shape=[2**70, 10**4000]),
    "offsets beyond the end": lambda h: h["b"].update(data_offsets=[2**40, 2**40 + 8]),
    "overlapping offsets": lambda h: h["b"].update(data_offsets=[0, 8]),
    "negative offsets": lambda h: h["b"].update(data_offsets=[-8, 0]),
    "three offsets": lambda h: h["b"].update(data_offsets=[0, 8, 8]),
    "a tensor left out": lambda h: h.pop("a.weight") and None,
    "an entry that is text": lambda h: h.update(b="F16"),
    "an unknown key": lambda h: h["b"].update(strides=[1]),
    "a key given twice": lambda h: json.dumps(h)[:-1] + ', "b": ' + json.dumps(h["b"]) + "}",
    "metadata that is no text": lambda h: h["__metadata__"].update(format=1),
    "a list": lambda h: "[]",
    "no JSON": lambda h: "{",
    "deep": lambda h: '{"b":' * 100_000,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_damaged_header_is_refused_with_the_file(kind, path):
    edit(path, HEADERS[kind])
    for read in (files.read_specs, files.read_metadata, lambda path: files.open_tensors(path).__enter__()):
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            read(path)


@pytest.mark.parametrize("length", [0, 4, 8, 20, 300, -1])
def test_a_truncated_file_is_refused(length, path):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        files.read_specs(path)


@pytest.mark.parametrize("length", [2**63, 10**8 + 1, 1])
def test_a_wrong_length_of_the_header_is_refused_before_anything_is_allocated(length, path):
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        files.read_specs(path)


def test_every_difference_of_the_tensors_is_named():
    some = {"a": TensorSpec((2,), torch.float32), "b": TensorSpec((2,), torch.int8), "c": TensorSpec((), torch.int8)}
    other = {"a": TensorSpec((2,), torch.bfloat16), "b": TensorSpec((3,), torch.int8), "d": some["c"]}
    with pytest.raises(ValueError, match=r"^F: tensors 1 missing \(c\) and 1 unexpected \(d\) and 2 of another") as e:
        files.check_specs("F", some, other)
    assert "a is bfloat16 [2], expected float32 [2]" in str(e.value) and "b is int8 [3]" in str(e.value)
    with pytest.raises(ValueError, match=r"1 of another shape or dtype \(b is"):
        files.check_specs("F", some, other, any_float=lambda name: name == "a")


def test_values_are_checked():
    files.check_finite(torch.tensor([-1.0, 2]), "x")
    files.check_permutation(torch.tensor([2, 0, 1], dtype=torch.int32), "x")
    for bad in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(ValueError, match=r"layer\.scale holds"):
            files.check_finite(torch.tensor([1.0, bad]), "layer.scale", positive=True)
    for order in ([0, 0, 1], [0, 1, 3], [-1, 0, 1]):
        with pytest.raises(ValueError, match=r"layer\.order holds"):
            files.check_permutation(torch.tensor(order), "layer.order")
