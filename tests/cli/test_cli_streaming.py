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
    arguments = ["generate", files["model"], "--prompt-embeds", files["prompt.safetensors"], "--num-chunks", "1"]
    arguments += ["--image", files["start.png"], "--kv-cache", "int8", "--memory", "8GB", "--out", files["x.mp4"]]
    assert main([*arguments, "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 21 == len(imageio.mimread(files["x.mp4"]))
    assert main([*arguments[:-4], "--memory", "0.2GB", "--out", str(tmp_path / "y.mp4")]) == 1
    assert "does not fit into 0.2GB" in capsys.readouterr().err
    assert not (tmp_path / "y.mp4").exists()


def test_a_picture_starts_the_video_as_it_is_to_be_seen(tiny_pipeline, tmp_path, capsys):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    save_prompt_embeds(tiny_pipeline.encode_prompt("a red circle"), tmp_path / "prompt.safetensors")
    shown = np.zeros((32, 48, 3), np.uint8)
    shown[:16, :24] = (250, 40, 40)
    stored, exif = np.ascontiguousarray(np.rot90(shown)), Image.Exif()
    exif[0x0112] = 6  # shown: turned by 90 degrees clockwise
    Image.fromarray(shown).save(tmp_path / "shown.png")
    Image.fromarray(stored).save(tmp_path / "stored.png")
    Image.fromarray(stored).save(tmp_path / "phone.png", exif=exif)
    videos = {}
    for name in ("shown", "stored", "phone"):
        arguments = ["generate", str(tmp_path / "model"), "--prompt-embeds", str(tmp_path / "prompt.safetensors")]
        arguments += ["--image", str(tmp_path / f"{name}.png"), "--out", str(tmp_path / f"{name}.mp4")]
        assert main([*arguments, "--num-chunks", "1", "--device", "cpu"]) == 0
        videos[name] = np.stack(imageio.mimread(tmp_path / f"{name}.mp4"))
    assert np.array_equal(videos["phone"], videos["shown"])
    assert np.abs(videos["phone"].astype(int) - videos["stored"]).mean() > 1
    (tmp_path / "notes.png").write_text("no picture")
    assert (
        main(["generate", "no model", "--prompt", "x", "--image", str(tmp_path / "notes.png"), "--out", "x.mp4"]) == 1
    )
    assert "notes.png: is no picture that can be read" in capsys.readouterr().err
