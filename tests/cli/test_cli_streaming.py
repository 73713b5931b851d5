"""`qarvd generate` from a picture and from embeddings, with a cache in 8 bits, within a budget."""

from __future__ import annotations

import json

import imageio.v2 as imageio
import numpy as np
from PIL import Image

from qarvd_diffusers import save_prompt_embeds
from qarvd_diffusers.cli import main


def test_generate_from_files(tiny_pipeline, tmp_path, capsys):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    save_prompt_embeds(tiny_pipeline.encode_prompt("a red circle"), tmp_path / "prompt.safetensors")
    Image.fromarray(np.full((20, 30, 3), 200, dtype=np.uint8)).save(tmp_path / "start.png")
    files = {name: str(tmp_path / name) for name in ("model", "prompt.safetensors", "start.png", "x.mp4")}
    arguments = ["generate", files["model"], "--prompt-embeds", files["prompt.safetensors"], "--chunks", "1"]
    arguments += ["--image", files["start.png"], "--kv-cache", "int8", "--memory", "8GB", "--out", files["x.mp4"]]
    assert main([*arguments, "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 21 == len(imageio.mimread(files["x.mp4"]))
    assert main([*arguments[:-4], "--memory", "0.2GB", "--out", str(tmp_path / "y.mp4")]) == 1
    assert "does not fit into 0.2GB" in capsys.readouterr().err
    assert not (tmp_path / "y.mp4").exists()
