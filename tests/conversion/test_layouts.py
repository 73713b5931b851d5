"""Checkpoints as people have them: any nesting, any prefix, among other files and tensors. No tensor differs."""

from __future__ import annotations

import argparse
import re

import numpy as np
import pytest
import torch
from lora_files import as_file, random_lora
from safetensors.torch import save_file

from qarvd_diffusers.conversion import convert_checkpoint, detect_checkpoint, merge_lora, to_original_keys
from qarvd_diffusers.models import CausalWanTransformer3DModel


@pytest.fixture
def original(tiny_pipeline):
    """State dict of the tiny transformer under original names, without a prefix."""
    state_dict = to_original_keys(tiny_pipeline.transformer.state_dict(), prefix="")
    return {key: value.detach() for key, value in state_dict.items()}


def convert(source, folder, **options):
    """Reasons, and the tensors of the converted folder."""
    found = detect_checkpoint(source, options.get("family", "self-forcing"), options.get("weights"))
    convert_checkpoint(source, folder, num_attention_heads=2, **options)
    model = CausalWanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    return " | ".join(found.reasons), model.state_dict()


def assert_converts(source, tmp_path, want, **options):
    reasons, tensors = convert(source, tmp_path / "out", **options)
    assert tensors.keys() == want.keys() and all(torch.equal(tensors[key], want[key]) for key in want)
    return reasons


def prefixed(state_dict, prefix):
    return {prefix + key: value for key, value in state_dict.items()}


@pytest.mark.parametrize(
    "prefix", ["module.", "module.model.", "transformer.", "dit.", "pipe.dit.", "net._orig_mod.", "student.0."]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_any_prefix(tiny_pipeline, original, tmp_path, prefix, suffix):
    state_dict = prefixed(original, prefix)
    (torch.save if suffix == ".pt" else save_file)(state_dict, tmp_path / f"model{suffix}")
    assert_converts(tmp_path / f"model{suffix}", tmp_path, tiny_pipeline.transformer.state_dict())


@pytest.mark.parametrize(
    ("nest", "named"),
    [
        (lambda s: {"state_dict": s}, "state_dict"),
        (lambda s: {"model_state_dict": s, "epoch": 3}, "model_state_dict"),
        (lambda s: {"generator": {"model": s}}, "generator"),
        (lambda s: {"checkpoint": {"trainer": {"net": prefixed(s, "module.")}}}, "net"),
        (
            lambda s: {"state_dict": prefixed(s, "model."), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
            None,
        ),
    ],
)
def test_any_nesting(tiny_pipeline, original, tmp_path, nest, named):
    torch.save(nest(original), tmp_path / "model.pt")
    assert_converts(tmp_path / "model.pt", tmp_path, tiny_pipeline.transformer.state_dict(), weights=named)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"step": 3}, r"\['step'\] \(1 in all\), not tensors"),
        ({"global_step": torch.tensor(3)}, "global_step.*counters"),
        ({"freqs": torch.ones(8, 3)}, "freqs.*counters and buffers"),
        ({"blocks.0.self_attn.freqs_cis": torch.ones(8)}, "freqs_cis.*counters and buffers"),
        ({"ema_decay": torch.ones(1)}, "ema_decay.*counters"),
    ],
)
def test_what_is_no_parameter_is_left_out_and_said(tiny_pipeline, original, tmp_path, extra, said):
    torch.save({**original, **extra}, tmp_path / "model.pt")
    reasons = assert_converts(tmp_path / "model.pt", tmp_path, tiny_pipeline.transformer.state_dict())
    assert re.search(said, reasons), reasons


def test_all_in_one_file(tiny_pipeline, original, tmp_path):
    others = {"vae.decoder.conv1.weight": torch.ones(3, 3), "text_encoders.t5.shared.weight": torch.ones(4, 2)}
    save_file({**prefixed(original, "model.diffusion_model."), **others}, tmp_path / "all.safetensors")
    reasons = assert_converts(tmp_path / "all.safetensors", tmp_path, tiny_pipeline.transformer.state_dict())
    assert (
        "left out: 2 tensors without the prefix 'model.diffusion_model.', of other networks: ['text_encoders', 'vae']"
        in reasons
    )


def test_several_networks(tiny_pipeline, original, tmp_path):
    """The plain weights are taken of `ema` and `model`, and said; without a known name the choice is the user's."""
    ema = {key: value + 1 for key, value in original.items()}
    torch.save({"ema": ema, "model": original}, tmp_path / "both.pt")
    want = tiny_pipeline.transformer.state_dict()
    assert "weights: model, of ema, model; select others with weights=" in assert_converts(
        tmp_path / "both.pt", tmp_path, want
    )
    _, tensors = convert(tmp_path / "both.pt", tmp_path / "ema", weights="ema")
    assert torch.equal(tensors["proj_out.weight"], want["proj_out.weight"] + 1)
    save_file({**prefixed(original, "student.net."), **prefixed(ema, "teacher.net.")}, tmp_path / "flat.safetensors")
    with pytest.raises(
        ValueError, match=r"flat.safetensors: holds several networks \['student', 'teacher'\]: select one"
    ):
        detect_checkpoint(tmp_path / "flat.safetensors", "self-forcing")
    _, tensors = convert(tmp_path / "flat.safetensors", tmp_path / "student", weights="student")
    assert all(torch.equal(tensors[key], want[key]) for key in want)


def test_folder_of_an_original_release(tiny_pipeline, original, tmp_path):
    """Wan 1.3B: VAE, text encoder, a hidden file of macOS, a LoRA and a trainer's file lie beside the network."""
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    folder.mkdir()
    save_file(original, folder / "diffusion_pytorch_model.safetensors")
    torch.save({"decoder.conv1.weight": torch.ones(3, 3), "conv2.bias": torch.ones(3)}, folder / "Wan2.1_VAE.pth")
    torch.save({"blocks.0.attn.q.weight": torch.ones(3, 3), "norm.weight": torch.ones(3)}, folder / "models_t5.pth")
    torch.save(as_file(random_lora(tiny_pipeline.transformer), "comfyui"), folder / "style.pt")
    torch.save(argparse.Namespace(lr=1), folder / "training_args.bin")
    (folder / "._diffusion_pytorch_model.safetensors").write_bytes(b"\0\5\x16\7")
    reasons = assert_converts(folder, tmp_path, tiny_pipeline.transformer.state_dict())
    for name in ("Wan2.1_VAE.pth", "models_t5.pth", "style.pt", "training_args.bin", "'._diffusion"):
        assert f"left out: {name}" in reasons or f"left out: [{name}" in reasons, reasons


def test_folder_of_a_base_and_its_lora(tiny_pipeline, original, tmp_path):
    folder, lora = tmp_path / "longlive", random_lora(tiny_pipeline.transformer)
    folder.mkdir()
    torch.save({"generator": prefixed(original, "model.")}, folder / "longlive_base.pt")
    torch.save({"generator_lora": as_file(lora, "longlive")}, folder / "lora.pt")
    want = dict(tiny_pipeline.transformer.state_dict())
    for name, layer in lora.items():
        want[f"{name}.weight"], _ = merge_lora(want[f"{name}.weight"], None, layer)
    reasons, tensors = convert(folder, tmp_path / "out", family="longlive")
    assert all(torch.allclose(tensors[key], want[key], atol=1e-6) for key in want)
    assert "left out: lora.pt, not a Wan network" in reasons
    reasons, same = convert(folder, tmp_path / "same", family="longlive", weights="generator")
    assert all(torch.equal(same[key], tensors[key]) for key in tensors)
    assert "left out: lora.pt, has no state dict 'generator'" in reasons


def test_the_same_weights_twice(tiny_pipeline, original, tmp_path):
    folder = tmp_path / "twice"
    folder.mkdir()
    save_file(original, folder / "model.safetensors")
    torch.save(original, folder / "model.pt")
    reasons = assert_converts(folder, tmp_path, tiny_pipeline.transformer.state_dict())
    assert "left out: ['model.pt'] (1 in all), the same weights as in model.safetensors" in reasons
    torch.save({key: value + 1 for key, value in original.items()}, folder / "model.pt")
    with pytest.raises(ValueError, match="shards of two models"):
        detect_checkpoint(folder, "self-forcing")


def test_bin(tiny_pipeline, original, tmp_path):
    torch.save(original, tmp_path / "pytorch_model.bin")
    assert_converts(tmp_path / "pytorch_model.bin", tmp_path, tiny_pipeline.transformer.state_dict())


@pytest.mark.parametrize(
    ("value", "named"), [(argparse.Namespace(lr=1), "argparse.Namespace"), (np.float64(3), "numpy")]
)
def test_pickled_objects_beside_the_weights(original, tmp_path, value, named):
    torch.save({"model": original, "config": value}, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=rf"model\.pt: holds more than plain tensors \({named}.*torch.save\(torch.load\('model.pt'"
    ):
        detect_checkpoint(tmp_path / "model.pt", "self-forcing")


def test_refusals_say_what_the_file_is(tiny_pipeline, original, tmp_path):
    save_file(dict(tiny_pipeline.transformer.state_dict()), tmp_path / "diffusers.safetensors")
    with pytest.raises(
        ValueError, match=r"diffusers.safetensors: these are diffusers names already .*FOLDER/transformer"
    ):
        detect_checkpoint(tmp_path / "diffusers.safetensors", "self-forcing")
    tiny_pipeline.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"transformer: these are diffusers names already"):
        detect_checkpoint(tmp_path / "base" / "transformer", "self-forcing")
    for key, kind in (
        ("blocks.0.cross_attn.k_img.weight", "image-to-video"),
        ("vace_blocks.0.after_proj.weight", "VACE"),
    ):
        save_file({**original, key: torch.ones(2, 2)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=rf"other.safetensors: 1 keys .*{kind} network, which is not supported"):
            detect_checkpoint(tmp_path / "other.safetensors", "self-forcing")
    lora = as_file(random_lora(tiny_pipeline.transformer), "comfyui")
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora.safetensors: .* this is an adapter: pass it with lora="):
        detect_checkpoint(tmp_path / "lora.safetensors", "self-forcing")


def test_differences_are_merged(tiny_pipeline, original, tmp_path):
    """`--lora`: what is no pair of factors is added as well."""
    width = original["head.modulation"].shape[-1]
    extra = {
        "blocks.0.norm3.diff": torch.randn(width),
        "blocks.0.diff_m": torch.randn(1, 6, width),
        "blocks.1.ffn.2.diff_b": torch.randn(width),
        "patch_embedding.lora_down.weight": torch.randn(2, 4, 1, 2, 2),
        "patch_embedding.lora_up.weight": torch.randn(width, 2, 1, 1, 1),
    }
    save_file(original, tmp_path / "model.safetensors")
    save_file(prefixed(extra, "diffusion_model."), tmp_path / "style.safetensors")
    _, tensors = convert(tmp_path / "model.safetensors", tmp_path / "out", lora=tmp_path / "style.safetensors")
    want = dict(tiny_pipeline.transformer.state_dict())
    want["blocks.0.norm2.weight"] = want["blocks.0.norm2.weight"] + extra["blocks.0.norm3.diff"]
    want["blocks.0.scale_shift_table"] = want["blocks.0.scale_shift_table"] + extra["blocks.0.diff_m"]
    want["blocks.1.ffn.net.2.bias"] = want["blocks.1.ffn.net.2.bias"] + extra["blocks.1.ffn.2.diff_b"]
    down, up = extra["patch_embedding.lora_down.weight"], extra["patch_embedding.lora_up.weight"]
    product = (up.flatten(1) @ down.flatten(1)).view_as(want["patch_embedding.weight"])
    want["patch_embedding.weight"] = want["patch_embedding.weight"] + product
    assert all(torch.equal(tensors[key], want[key]) for key in want)
