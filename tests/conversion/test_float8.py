"""8-bit floats: plain ones in memory and from disk, and ComfyUI's scaled ones in both spellings."""

from __future__ import annotations

import json

import pytest
import torch
from lora_files import as_file, random_lora
from safetensors.torch import load_file, save_file

from qarvd_diffusers import ARVDPipeline, QARVDConfig
from qarvd_diffusers.conversion import convert_checkpoint, detect_checkpoint, quantize_folder, to_original_keys
from qarvd_diffusers.conversion.names import to_diffusers_keys

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def original(tiny_pipeline):
    state_dict = to_original_keys(tiny_pipeline.transformer.state_dict(), prefix="")
    return {key: value.detach() for key, value in state_dict.items()}


def is_layer(key):
    return key.startswith("blocks.") and key.endswith(".weight") and "norm" not in key


def scaled_file(original, spelling, dtype=E4M3, rows=False):
    """A file as ComfyUI's tools write it, and its weights: code times scale in float64, rounded to float32."""
    file, truth = {}, {}
    for key, tensor in original.items():
        if not is_layer(key):
            file[key] = truth[key] = tensor.bfloat16()
            continue
        largest = tensor.abs().amax(dim=1, keepdim=True) if rows else tensor.abs().max()
        limit = 127 if dtype is torch.int8 else torch.finfo(dtype).max
        scale = (largest / limit).float()
        codes = (tensor / scale).round().to(dtype) if dtype is torch.int8 else (tensor / scale).to(dtype)
        module = key.removesuffix(".weight")
        file[key], truth[key] = codes, (codes.double() * scale.double()).float()
        if spelling == "old":
            file |= {f"{module}.scale_weight": scale, f"{module}.scale_input": torch.ones(())}
        else:
            note = {"format": "int8_tensorwise" if dtype is torch.int8 else str(dtype).removeprefix("torch.")}
            marker = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
            file |= {f"{module}.weight_scale": scale, f"{module}.comfy_quant": marker}
    if spelling == "old":
        file["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    return file, to_diffusers_keys(truth)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("spelling", "dtype", "rows"),
    [("old", E4M3, False), ("old", E5M2, False), ("new", E4M3, False), ("new", E4M3, True), ("new", torch.int8, True)],
)
def test_scales_are_multiplied_in(original, tmp_path, prefix, spelling, dtype, rows):
    file, truth = scaled_file(original, spelling, dtype, rows)
    save_file({prefix + key: value for key, value in file.items()}, tmp_path / "scaled.safetensors")
    found = detect_checkpoint(tmp_path / "scaled.safetensors", "self-forcing")
    assert any("multiplied in float32" in reason for reason in found.reasons)
    for name, cast in (("bf16", torch.bfloat16), ("none", None), ("fp32", torch.float32)):
        convert_checkpoint(tmp_path / "scaled.safetensors", tmp_path / name, num_attention_heads=2, dtype=cast)
        tensors = load_file(tmp_path / name / WEIGHTS)
        assert tensors.keys() == truth.keys()
        layer = "blocks.1.ffn.net.2.weight"
        assert tensors[layer].dtype == (cast or torch.bfloat16)
        assert all(torch.equal(tensors[key], truth[key].to(tensors[key].dtype)) for key in truth)


def test_scales_that_are_not_understood(original, tmp_path):
    file, _ = scaled_file(original, "new")
    key = "blocks.0.ffn.0"
    note = torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)
    changes = {
        rf"{key.replace('ffn.0', 'ffn.net.0.proj')}.comfy_quant has format 'nvfp4'": {f"{key}.comfy_quant": note},
        "scales of blocks are not supported": {f"{key}.weight_scale": torch.ones(48, 2)},
        "scales a weight that is torch.float32": {f"{key}.weight": torch.ones(48, 24)},
    }
    for message, change in changes.items():
        save_file({**file, **change}, tmp_path / "odd.safetensors")
        with pytest.raises(ValueError, match=f"odd.safetensors: .*{message}"):
            convert_checkpoint(tmp_path / "odd.safetensors", tmp_path / "out", num_attention_heads=2)
    plain = {name: tensor for name, tensor in file.items() if not name.endswith("comfy_quant")}
    for note in ({"format": "mxfp8"}, {"format": "int8_tensorwise", "convrot": True}):
        header = {"_quantization_metadata": json.dumps({"layers": {key: note}})}
        save_file(plain, tmp_path / "odd.safetensors", header)
        with pytest.raises(ValueError, match=f"odd.safetensors: {key} has format '{note['format']}'"):
            convert_checkpoint(tmp_path / "odd.safetensors", tmp_path / "out", num_attention_heads=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_dtype_leaves_no_float8(original, tmp_path, dtype):
    """Those that the model keeps in float32 become float32; the values are those of the file."""
    file = {key: value.to(dtype) for key, value in original.items()}
    save_file(file, tmp_path / "float8.safetensors")
    convert_checkpoint(tmp_path / "float8.safetensors", tmp_path / "out", num_attention_heads=2, dtype=torch.bfloat16)
    tensors, want = load_file(tmp_path / "out" / WEIGHTS), to_diffusers_keys(file)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.float32}
    assert tensors["blocks.0.scale_shift_table"].dtype == torch.float32
    assert all(torch.equal(tensors[key].float(), want[key].float()) for key in want)
    convert_checkpoint(tmp_path / "float8.safetensors", tmp_path / "stored", num_attention_heads=2)
    assert {tensor.dtype for tensor in load_file(tmp_path / "stored" / WEIGHTS).values()} == {dtype}


def test_a_lora_in_8_bit_weights(tiny_pipeline, original, tmp_path):
    """Added to the product in float32 and rounded once, to bfloat16: in 8 bits it would be lost."""
    lora = random_lora(tiny_pipeline.transformer)
    save_file(as_file(lora, "comfyui"), tmp_path / "style.safetensors")
    file, truth = scaled_file(original, "old")
    plain = {key: value.to(E4M3) if is_layer(key) else value.bfloat16() for key, value in original.items()}
    for name, stored, weights in (("scaled", file, truth), ("plain", plain, to_diffusers_keys(plain))):
        save_file(stored, tmp_path / f"{name}.safetensors")
        options = {"lora": tmp_path / "style.safetensors", "num_attention_heads": 2}
        convert_checkpoint(tmp_path / f"{name}.safetensors", tmp_path / name, **options)
        tensors = load_file(tmp_path / name / WEIGHTS)
        for module, layer in lora.items():
            want = (weights[f"{module}.weight"].float() + layer.delta()).bfloat16()
            torch.testing.assert_close(tensors[f"{module}.weight"], want, rtol=0, atol=want.abs().max().item() / 200)
            assert tensors[f"{module}.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
def test_quantizing_from_disk_and_in_memory(tiny_pipeline, original, tmp_path, everything, scheme):
    tiny_pipeline.save_pretrained(tmp_path / "base")
    file = {key: value.to(E4M3) if everything or is_layer(key) else value for key, value in original.items()}
    save_file(file, tmp_path / "float8.safetensors")
    folder = convert_checkpoint(tmp_path / "float8.safetensors", tmp_path / "float", base=tmp_path / "base")
    config = QARVDConfig(scheme, outlier_alignment=4, rounding="nearest")
    quantize_folder(folder, tmp_path / "out", config)
    stored = load_file(tmp_path / "out" / WEIGHTS) if (tmp_path / "out" / WEIGHTS).is_file() else {}
    assert not any(tensor.dtype in (E4M3, E5M2) for tensor in stored.values())
    got = ARVDPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32).transformer.state_dict()
    want = ARVDPipeline.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    ).transformer.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in got)


def test_quantizing_8_bit_weights_that_are_in_memory(tiny_pipeline):
    transformer = tiny_pipeline.transformer
    linears = [m for block in transformer.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    config = QARVDConfig("w8a16", outlier_alignment=4, rounding="nearest")
    for linear in linears:
        linear.weight.data = linear.weight.data.to(E4M3)
    narrow = tiny_pipeline.calibrate(config, use_cache=False)
    for linear in linears:
        linear.weight.data = linear.weight.data.float()
    wide = tiny_pipeline.calibrate(config, use_cache=False)
    for name, layer in wide.layers.items():
        assert all(torch.equal(value, narrow.layers[name].tensors()[key]) for key, value in layer.tensors().items())
    linears[0].weight.data = linears[0].weight.data.to(E4M3)
    linears[0].weight.data.view(torch.uint8)[0, 0] = 0x7F  # NaN
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        tiny_pipeline.calibrate(config, use_cache=False)
