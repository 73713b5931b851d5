"""Converter: exact both ways, every nesting, every refusal, and a folder that loads."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from qarvd_diffusers.conversion import (
    convert_checkpoint,
    export_checkpoint,
    folder_to_single_file,
    infer_config,
    load_checkpoint,
    to_diffusers_keys,
    to_original_keys,
)
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline


@pytest.fixture
def original(tiny_pipeline):
    """State dict of the tiny transformer under original names."""
    return {key: value.detach() for key, value in to_original_keys(tiny_pipeline.transformer.state_dict()).items()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def test_golden_round_trip(golden):
    stored = golden.state_dict()
    there = to_diffusers_keys(stored)
    assert set(there) == set(WanTransformer3DModel(**golden.config()).state_dict())
    assert_equal(to_original_keys(there), stored)


def test_config_from_shapes(golden):
    config = golden.config()
    inferred = infer_config(to_diffusers_keys(golden.state_dict()), config["num_attention_heads"])
    assert {key: inferred[key] for key in config if key != "eps"} == {k: v for k, v in config.items() if k != "eps"}
    full_size = {
        "patch_embedding.weight": torch.empty(1536, 16, 1, 2, 2, device="meta"),
        "proj_out.weight": torch.empty(64, 1536, device="meta"),
        "condition_embedder.text_embedder.linear_1.weight": torch.empty(1536, 4096, device="meta"),
        "condition_embedder.time_embedder.linear_1.weight": torch.empty(1536, 256, device="meta"),
        "blocks.29.ffn.net.0.proj.weight": torch.empty(8960, 1536, device="meta"),
        "blocks.0.ffn.net.0.proj.weight": torch.empty(8960, 1536, device="meta"),
    }
    config = infer_config(full_size)
    assert (config["num_attention_heads"], config["attention_head_dim"], config["num_layers"]) == (12, 128, 30)
    narrow = {"patch_embedding.weight": torch.empty(96, 16, 1, 2, 2)}
    with pytest.raises(ValueError, match="not a multiple of head size 128: pass num_attention_heads"):
        infer_config(narrow)


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."])
def test_wrapper_substrings_are_stripped(original, wrapper):
    wrapped = {
        key.replace("blocks.0.", f"blocks.0.{wrapper}").replace("model.", f"model.{wrapper}"): v
        for key, v in original.items()
    }
    assert_equal(to_diffusers_keys(wrapped), to_diffusers_keys(original))


@pytest.mark.parametrize("nest", ["generator_ema", "generator", "model", None])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_nestings(original, tmp_path, nest, suffix):
    path = tmp_path / f"checkpoint{suffix}"
    torch.save(original if nest is None else {nest: original, "step": 3}, path)
    assert_equal(load_checkpoint(path), original)


def test_choice_between_nested_weights(original, tmp_path):
    path = tmp_path / "checkpoint.pt"
    ema = {key: value + 1 for key, value in original.items()}
    torch.save(
        {"generator": original, "generator_ema": ema, "critic": original}, path, _use_new_zipfile_serialization=False
    )
    assert_equal(load_checkpoint(path), ema)
    assert_equal(load_checkpoint(path, weights="generator"), original)
    with pytest.raises(ValueError, match="has no state dict 'teacher'"):
        load_checkpoint(path, weights="teacher")


def test_flat_safetensors(original, tmp_path):
    save_file(original, tmp_path / "checkpoint.safetensors")
    assert_equal(load_checkpoint(tmp_path / "checkpoint.safetensors"), original)


class Payload:
    """Would create a file if it were ever unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_is_unpickled(tmp_path):
    torch.save({"generator": Payload(str(tmp_path / "pwned"))}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt.*never unpickled"):
        load_checkpoint(tmp_path / "evil.pt")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Payload(str(tmp_path / "pwned"))))
    with pytest.raises(ValueError, match=r"raw\.pth"):
        load_checkpoint(tmp_path / "raw.pth")
    assert not (tmp_path / "pwned").exists()


def test_unreadable_files_are_named(original, tmp_path):
    torch.save(original, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    save_file(original, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("cut.pt", "cut.safetensors", "empty.pt"):
        with pytest.raises(ValueError, match=rf"{name}: unreadable or truncated.*download the file again"):
            load_checkpoint(tmp_path / name)
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"unknown checkpoint format '\.ckpt'"):
        load_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")
    torch.save({"step": 3}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"non-tensor entries \['step'\]"):
        load_checkpoint(tmp_path / "none.pt")


def test_convert_with_a_base(tiny_pipeline, original, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "base")
    torch.save({"generator_ema": original}, tmp_path / "checkpoint.pt")
    out = convert_checkpoint(tmp_path / "checkpoint.pt", tmp_path / "out", "causvid", base=tmp_path / "base")
    pipe = ARVDPipeline.from_pretrained(out)
    assert pipe.rollout_config.denoising_timesteps == (1000, 757, 522)
    assert pipe.scheduler.config.timestep_shift == 8.0
    assert_equal(dict(pipe.transformer.state_dict()), dict(tiny_pipeline.transformer.state_dict()))
    assert pipe("a red circle", num_chunks=1, height=32, width=48).frames.shape == (1, 9, 32, 48, 3)
    assert type(WanTransformer3DModel.from_pretrained(out, subfolder="transformer")) is WanTransformer3DModel


def test_convert_without_a_base(original, tmp_path):
    save_file(original, tmp_path / "checkpoint.safetensors")
    out = convert_checkpoint(
        tmp_path / "checkpoint.safetensors", tmp_path / "out", num_attention_heads=2, dtype=torch.bfloat16
    )
    assert json.loads((out / "model_index.json").read_text())["vae"] == [None, None]
    pipe = ARVDPipeline.from_pretrained(out, dtype=torch.bfloat16)
    assert pipe.vae is None and pipe.transformer.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no text encoder"):
        pipe("a red circle")
    with pytest.raises(ValueError, match="pass output_type='latent'"):
        pipe(prompt_embeds=torch.zeros(1, 12, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.blocks.1.ffn.2.bias"), r"missing \['blocks.1.ffn.net.2.bias'\] \(1 in all\)"),
        (lambda s: s.update({"model.blocks.0.lora.weight": torch.zeros(1)}), "do not belong to an original Wan"),
        (
            lambda s: s.update({"model.blocks.0.self_attn.q.bias": torch.zeros(3)}),
            r"attn1.to_q.bias: \(3,\), expected",
        ),
        (lambda s: s.update({"head.head.bias": torch.zeros(16)}), "both name the parameter"),
    ],
)
def test_unfitting_checkpoints_leave_nothing(original, tmp_path, change, message):
    change(original)
    torch.save(original, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "checkpoint.pt", tmp_path / "out", num_attention_heads=2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_bad_targets(tiny_pipeline, original, tmp_path):
    torch.save(original, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="family is 'sora', expected one of self-forcing"):
        convert_checkpoint(tmp_path / "checkpoint.pt", tmp_path / "out", "sora")
    (tmp_path / "exists").mkdir()
    with pytest.raises(FileExistsError, match="exists; give a new folder"):
        convert_checkpoint(tmp_path / "checkpoint.pt", tmp_path / "exists")
    with pytest.raises(ValueError, match="base must be a local diffusers folder"):
        convert_checkpoint(tmp_path / "checkpoint.pt", tmp_path / "out", base=tmp_path / "exists")
    tiny_pipeline.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "vae").rename(tmp_path / "base" / "moved")
    with pytest.raises(ValueError, match="has no component 'vae'"):
        convert_checkpoint(tmp_path / "checkpoint.pt", tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_folder_back_to_one_file_is_exact(tmp_path):
    """Original file -> folder -> original file: same names, same bits, for any dtype and number of shards."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=24, ffn_dim=96, num_layers=2, text_dim=32)
    original = to_original_keys(model.bfloat16().state_dict())
    save_file(original, tmp_path / "wan.safetensors")
    convert_checkpoint(tmp_path / "wan.safetensors", tmp_path / "folder", num_attention_heads=2)
    with pytest.warns(DeprecationWarning, match='folder_to_single_file\\(folder, out, prefix="model."\\)'):
        export_checkpoint(tmp_path / "folder", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[key], original[key]) and back[key].dtype == original[key].dtype for key in original)
    with pytest.raises(ValueError, match=r"out\.pt"):
        folder_to_single_file(tmp_path / "folder", tmp_path / "out.pt")
    with pytest.raises(ValueError, match="no safetensors"):
        folder_to_single_file(tmp_path, tmp_path / "out.safetensors")
