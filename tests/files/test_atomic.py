"""A write that fails leaves nothing behind, and says which file failed and what to do."""

import json

import pytest
import torch
from safetensors.torch import save_file

from qarvd_diffusers.files.atomic import atomic_file, write_json


def test_a_failed_write_names_file_and_remedy(tmp_path):
    for write in (
        lambda path: save_file({"x": torch.zeros(1)}, path / "not a folder" / "x"),  # SafetensorError
        lambda path: (path / "x").write_text("x"),  # NotADirectoryError
    ):
        named = pytest.raises(OSError, match=r"out\.json could not be written \(.+\): ask the administrator$")
        with named, atomic_file(tmp_path / "out.json", "ask the administrator") as temporary:
            temporary.write_text("half")
            write(temporary)
    with pytest.raises(FileNotFoundError, match=r"^[^(]*input"), atomic_file(tmp_path / "out.json"):
        (tmp_path / "input").read_text()  # without a remedy the block's own errors stay
    assert list(tmp_path.iterdir()) == []


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = write_json({"a": 1.5}, tmp_path / "new folder" / "x.json")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json({"a": float("nan")}, path)
    assert json.loads(path.read_text()) == {"a": 1.5} and len(list(path.parent.iterdir())) == 1
