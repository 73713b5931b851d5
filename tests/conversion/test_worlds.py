"""Models with controls: original files to folders and back, loading, and what is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import build_world

from qarvd_diffusers import ARVDPipeline, CausalWanTransformer3DModel, QARVDConfig, WorldWanTransformer3DModel
from qarvd_diffusers.calibration.targets import ONCE, kept_float
from qarvd_diffusers.conversion import (
    convert_checkpoint,
    detect_checkpoint,
    folder_to_single_file,
    quantize_folder,
    to_original_keys,
)
from qarvd_diffusers.conversion.families import FAMILIES
from qarvd_diffusers.conversion.single_file import single_file_to_folder


@pytest.fixture
def released(tmp_path):
    """A file under original names, in a folder of the release, and the pipeline that it is of."""
    pipe = build_world()
    path = tmp_path / "lingbot_world_fast" / "model.safetensors"
    path.parent.mkdir()
    state_dict = pipe.transformer.state_dict()
    save_file({key: value.contiguous() for key, value in to_original_keys(state_dict, "").items()}, path)
    return path, pipe


def test_there_and_back(released, tmp_path):
    path, pipe = released
    out = convert_checkpoint(path, tmp_path / "out", "auto", num_attention_heads=2)
    loaded = ARVDPipeline.from_pretrained(out)
    assert loaded.rollout_config == FAMILIES["lingbot-world"].fields
    assert type(loaded.transformer) is WorldWanTransformer3DModel and loaded.transformer.config.control_dim == 6
    state, want = loaded.transformer.state_dict(), pipe.transformer.state_dict()
    assert state.keys() == want.keys() and all(torch.equal(state[key], want[key]) for key in want)
    loaded.save_pretrained(tmp_path / "saved")
    for folder in (out, tmp_path / "saved"):
        index = json.loads((folder / "model_index.json").read_text())
        config = json.loads((folder / "transformer" / "config.json").read_text())
        assert index["transformer"] == ["qarvd_diffusers", "WorldWanTransformer3DModel"]
        assert config["_class_name"] == "WorldWanTransformer3DModel"
    again = ARVDPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(
        again.transformer.state_dict()["blocks.1.injector.scale.weight"], want["blocks.1.injector.scale.weight"]
    )
    back, original = tmp_path / "back.safetensors", load_file(path)
    folder_to_single_file(out, back)
    written = load_file(back)
    assert written.keys() == original.keys() and all(torch.equal(written[key], original[key]) for key in original)
    ARVDPipeline.from_pretrained(single_file_to_folder(back, tmp_path / "folder"))
    with pytest.raises(ValueError, match=r"transformer with controls.*convert it with `qarvd convert FILE FOLDER`"):
        ARVDPipeline.from_single_file(back)
    with pytest.raises(ValueError, match="load it with WorldWanTransformer3DModel, not CausalWanTransformer3DModel"):
        CausalWanTransformer3DModel.from_pretrained(out, subfolder="transformer")


def test_what_is_quantized(released, tmp_path):
    """Injectors run once per chunk and stay float, in memory and from disk."""
    path, pipe = released
    kept = {name for name, why in kept_float(pipe.transformer, QARVDConfig("w8a16")).items() if why == ONCE}
    assert kept == {name for name, _ in pipe.transformer.named_modules() if ".injector." in name}
    out = convert_checkpoint(path, tmp_path / "out", num_attention_heads=2, family="lingbot-world")
    pipe.quantize(QARVDConfig("w8a16"))
    quantize_folder(out, tmp_path / "quantized", QARVDConfig("w8a16"))
    loaded = ARVDPipeline.from_pretrained(tmp_path / "quantized")
    state, want = loaded.transformer.state_dict(), pipe.transformer.state_dict()
    assert state.keys() == want.keys() and all(torch.equal(state[key], want[key]) for key in want)


def test_actions_by_their_shape(tmp_path):
    tensors = to_original_keys(build_world(control_dim=7).transformer.state_dict(), "")
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "model.safetensors")
    out = convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", "lingbot-world", num_attention_heads=2)
    assert ARVDPipeline.from_pretrained(out).transformer.config.control_dim == 7


def test_a_family_without_controls_and_a_file_without(released, tiny_pipeline, tmp_path):
    path, _ = released
    with pytest.raises(ValueError, match=r"has layers for controls, the family 'self-forcing' has none"):
        detect_checkpoint(path, "self-forcing")
    save_file(to_original_keys(dict(tiny_pipeline.transformer.state_dict())), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"has no layers for controls, the family 'lingbot-world' has some"):
        detect_checkpoint(tmp_path / "plain.safetensors", "lingbot-world")


@pytest.mark.parametrize(
    ("path", "family"),
    [
        ("lingbot-world-base-cam/lingbot_world_fast", "lingbot-world"),
        ("lingbot-world-v2-14b/transformers", "lingbot-world-2"),
    ],
)
def test_detection_by_name(released, tmp_path, path, family):
    folder = tmp_path / path
    folder.mkdir(parents=True)
    released[0].rename(folder / "diffusion_pytorch_model.safetensors")
    found = detect_checkpoint(folder)
    assert found.family == family and found.licence == FAMILIES[family].licence


def test_golden_weights_convert_both_ways(golden_family, tmp_path):
    golden = golden_family("lingbot_world")
    stored = golden.state_dict()
    save_file(stored, tmp_path / "model.safetensors")
    heads = golden.original_config()["num_heads"]
    out = convert_checkpoint(
        tmp_path / "model.safetensors", tmp_path / "out", "lingbot-world", num_attention_heads=heads
    )
    ARVDPipeline.from_pretrained(out)
    folder_to_single_file(out, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == stored.keys() and all(torch.equal(back[key], stored[key]) for key in stored)
