"""One file for both ecosystems: there and back bit by bit, and ComfyUI's own int8 format with what it loses."""

from __future__ import annotations

import json

import pytest
import torch
from lora_files import as_file, random_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qarvd_diffusers import QARVDConfig
from qarvd_diffusers.cli import main
from qarvd_diffusers.config import SCHEMES
from qarvd_diffusers.conversion import (
    export_int8_tensorwise,
    folder_to_single_file,
    single_file_to_folder,
    to_original_keys,
)
from qarvd_diffusers.models import CausalWanTransformer3DModel
from qarvd_diffusers.models.single_file_header import METADATA, read_single_file
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline
from qarvd_diffusers.quantization.model import quantized_linears

PROMPTS = ("a red circle moves left",)
COMFYUI = {"causal_ar": True, "num_heads": 2, "text_dim": 16}
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def quantized(pipe, scheme, **options):
    config = QARVDConfig(
        scheme, calibration_prompts=PROMPTS, calibration_chunks=1, outlier_alignment=4, rounding="nearest", **options
    )
    pipe.quantize(config, pipe.calibrate(config, use_cache=False))
    return pipe


def generate(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    text = kwargs or {"prompt": "a red circle"}
    return pipe(**text, num_chunks=1, generator=generator, output_type="latent").frames


def assert_same_tensors(first, second):
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("scheme", [*SCHEMES, None])
def test_folder_file_folder(tiny_pipeline, tmp_path, scheme):
    """Through the disk only: the same tensors, configs and video."""
    if scheme is not None:
        quantized(tiny_pipeline, scheme)
    tiny_pipeline.save_pretrained(tmp_path / "folder")
    file = folder_to_single_file(tmp_path / "folder", tmp_path / "model.safetensors")
    back = single_file_to_folder(file, tmp_path / "back", base=tmp_path / "folder")
    assert_same_tensors(tmp_path / "folder" / TRANSFORMER, back / TRANSFORMER)
    first, second = (
        json.loads((folder / "transformer" / "config.json").read_text()) for folder in (tmp_path / "folder", back)
    )
    assert first == {**second, "_diffusers_version": first["_diffusers_version"]}
    pipes = [ARVDPipeline.from_pretrained(folder, dtype=torch.float32) for folder in (tmp_path / "folder", back)]
    assert torch.equal(generate(pipes[0]), generate(pipes[1]))
    assert (pipes[1].config.height, pipes[1].config.width) == (32, 48)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", None])
def test_from_single_file(tiny_pipeline, tmp_path, scheme):
    """Through memory: the transformer alone, and a whole pipeline with its other parts from a folder."""
    if scheme is not None:
        quantized(tiny_pipeline, scheme)
    tiny_pipeline.save_pretrained(tmp_path / "folder")
    tiny_pipeline.save_single_file(tmp_path / "model.safetensors")
    alone = CausalWanTransformer3DModel.from_single_file(tmp_path / "model.safetensors")
    want = tiny_pipeline.transformer.state_dict()
    assert alone.state_dict().keys() == want.keys()
    assert all(torch.equal(value, want[key]) for key, value in alone.state_dict().items())
    pipe = ARVDPipeline.from_single_file(tmp_path / "model.safetensors", base=tmp_path / "folder", dtype=torch.float32)
    assert torch.equal(generate(pipe), generate(tiny_pipeline))
    assert (pipe.quantization is None) == (scheme is None)
    if scheme is not None:
        assert pipe.quantization.scheme == scheme and pipe.quantization.modules == tiny_pipeline.quantization.modules
    pipe.save_pretrained(tmp_path / "again")
    assert_same_tensors(tmp_path / "again" / TRANSFORMER, tmp_path / "folder" / TRANSFORMER)
    bare = ARVDPipeline.from_single_file(tmp_path / "model.safetensors", dtype=torch.float32, num_frames_per_chunk=1)
    assert bare.vae is None and bare.config.num_frames_per_chunk == 1 and bare.config.height == 32
    bare.save_single_file(tmp_path / "copy.safetensors")
    assert_same_tensors(tmp_path / "copy.safetensors", tmp_path / "model.safetensors")


@pytest.mark.parametrize("scheme", ["w8a16", None])
def test_a_converted_folder_loads_as_a_single_file(tiny_pipeline, tmp_path, scheme):
    """`qarvd convert FOLDER FILE` writes what `save_single_file` writes, and `from_single_file` reads."""
    if scheme is not None:
        quantized(tiny_pipeline, scheme)
    folder, file = tmp_path / "folder", tmp_path / "converted.safetensors"
    tiny_pipeline.save_pretrained(folder)
    assert main(["convert", str(folder), str(file)]) == 0
    tiny_pipeline.save_single_file(tmp_path / "saved.safetensors")
    assert_same_tensors(file, tmp_path / "saved.safetensors")
    headers = [read_single_file(path) for path in (file, tmp_path / "saved.safetensors")]
    assert headers[0].pipeline == headers[1].pipeline and headers[0].quantization == headers[1].quantization
    pipe = ARVDPipeline.from_single_file(file, base=folder, dtype=torch.float32)
    assert torch.equal(generate(pipe), generate(tiny_pipeline))
    want = tiny_pipeline.transformer.state_dict()
    alone = CausalWanTransformer3DModel.from_single_file(file).state_dict()
    assert alone.keys() == want.keys() and all(torch.equal(alone[key], want[key]) for key in want)


def test_names_of_the_original_releases(tiny_pipeline, tmp_path):
    """A prefix gives names without a header; a quantized model cannot have one."""
    tiny_pipeline.save_pretrained(tmp_path / "folder")
    file = str(tmp_path / "release.safetensors")
    assert main(["convert", str(tmp_path / "folder"), file, "--prefix", "model."]) == 0
    assert load_file(file).keys() == to_original_keys(tiny_pipeline.transformer.state_dict()).keys()
    assert read_single_file(file) is None
    quantized(tiny_pipeline, "w8a16").save_pretrained(tmp_path / "quantized")
    with pytest.raises(ValueError, match="is quantized: expected no prefix"):
        folder_to_single_file(tmp_path / "quantized", tmp_path / "q.safetensors", prefix="model.")


def test_stock_class_loads_the_file(tiny_pipeline, tmp_path):
    """With the config given by hand, as diffusers asks for it."""
    from diffusers import WanTransformer3DModel

    quantized(tiny_pipeline, "w4a8").save_pretrained(tmp_path / "folder")
    tiny_pipeline.save_single_file(tmp_path / "model.safetensors")
    header = read_single_file(tmp_path / "model.safetensors")
    model = WanTransformer3DModel.from_single_file(
        str(tmp_path / "model.safetensors"),
        config=str(tmp_path / "folder" / "transformer"),
        quantization_config=header.quantization,
    )  # fmt: skip
    want = tiny_pipeline.transformer.state_dict()
    assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())


def test_names_and_header(tiny_pipeline, tmp_path):
    quantized(tiny_pipeline, "w8a8").save_single_file(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    assert {
        "blocks.0.self_attn.q.weight_packed",
        "blocks.0.self_attn.q.weight_scale",
        "blocks.1.ffn.2.bias",
        "head.head.weight",
    } <= keys
    assert json.loads(metadata["config"]) == {"transformer": COMFYUI}
    stored = json.loads(metadata[METADATA])
    assert stored["version"] == 1 and stored["pipeline"]["num_frames_per_chunk"] == 3
    assert "blocks.0.attn1.to_q" in stored["quantization_config"]["modules"]
    assert "circle" not in metadata[METADATA]  # prompts may be private


def test_faults_are_named(tiny_pipeline, tmp_path):
    pipe, path = quantized(tiny_pipeline, "w8a16"), tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"model\.pt: expected a file name that ends in \.safetensors"):
        pipe.save_single_file(tmp_path / "model.pt")
    pipe.save_single_file(path)
    tensors, metadata = load_file(path), safe_open(path, "pt").metadata()
    save_file(
        {k: v for k, v in tensors.items() if k != "blocks.0.ffn.0.weight_scale"},
        tmp_path / "less.safetensors",
        metadata,
    )
    with pytest.raises(ValueError, match=r"1 tensors .* missing \(blocks.0.ffn.net.0.proj.weight_scale\)"):
        ARVDPipeline.from_single_file(tmp_path / "less.safetensors")
    save_file(
        tensors,
        tmp_path / "newer.safetensors",
        {METADATA: json.dumps({"version": 9, "transformer": {}, "pipeline": {}, "quantization_config": None})},
    )
    with pytest.raises(ValueError, match="layout version 9, this version of qarvd_diffusers reads 1"):
        ARVDPipeline.from_single_file(tmp_path / "newer.safetensors")
    save_file(tensors, tmp_path / "broken.safetensors", {METADATA: "{}"})
    with pytest.raises(ValueError, match="header entry 'qarvd' is damaged"):
        ARVDPipeline.from_single_file(tmp_path / "broken.safetensors")
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"qarvd convert plain\.safetensors FOLDER --family NAME"):
        ARVDPipeline.from_single_file(tmp_path / "plain.safetensors")
    data = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.safetensors: holds .* bytes of tensors, its header lists"):
        ARVDPipeline.from_single_file(tmp_path / "cut.safetensors")
    pipe.load_lora_weights(as_file(random_lora(pipe.transformer), "diffusers"))
    with pytest.raises(ValueError, match="carries adapters"):
        pipe.save_single_file(path)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("detector", ["none", "mad_zscore"])
def test_int8_tensorwise(tiny_pipeline, tmp_path, scheme, detector):
    """What ComfyUI multiplies (codes times scale) is our weight: exactly on one grid, within half a step otherwise."""
    transformer = quantized(tiny_pipeline, scheme, outlier_detector=detector).transformer
    losses = export_int8_tensorwise(transformer, tmp_path / "int8.safetensors")
    tensors, layers = load_file(tmp_path / "int8.safetensors"), quantized_linears(transformer)
    with safe_open(tmp_path / "int8.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == {"transformer": COMFYUI}
    exact = 0
    for name, layer in layers.items():
        (key,) = to_original_keys({f"{name}.weight": 0}, prefix="")
        codes, scale = tensors[key], tensors[f"{key}_scale"]
        marker = bytes(tensors[f"{key.removesuffix('.weight')}.comfy_quant"].tolist())
        assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (layer.out_features, 1))
        assert json.loads(marker) == {"format": "int8_tensorwise"}
        error = (codes.float() * scale - layer.dequantized()).abs()
        exact += bool((error < 1e-6).all())
        assert (error <= scale * 0.5001 + 1e-6).all()
        assert torch.equal(tensors[f"{key.removesuffix('.weight')}.bias"], layer.bias)
    floats = [key for key, tensor in tensors.items() if tensor.is_floating_point() and "_scale" not in key]
    assert "head.head.weight" in floats and "blocks.0.modulation" in floats
    assert losses[0].startswith(f"{exact} of {len(layers)}") or exact >= int(losses[0].split()[0])
    if detector == "none":  # one grid per row, unless channels were scaled or rotated
        own = [
            m for m in layers.values() if m.rotation == 1 and (m.channel_scale is None or (m.channel_scale == 1).all())
        ]
        assert exact >= len(own) == int(losses[0].split()[0])
    assert any("4-bit storage" in loss for loss in losses) == ("w4" in scheme)


def test_int8_tensorwise_of_a_float_model(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="the transformer is float"):
        export_int8_tensorwise(tiny_pipeline.transformer, tmp_path / "int8.safetensors")


def test_command_line(tiny_pipeline, tmp_path, capsys):
    quantized(tiny_pipeline, "w4a16").save_pretrained(tmp_path / "folder")
    file, int8 = str(tmp_path / "model.safetensors"), str(tmp_path / "int8.safetensors")
    assert main(["convert", str(tmp_path / "folder"), file]) == 0
    assert main(["convert", file, str(tmp_path / "back"), "--base", str(tmp_path / "folder")]) == 0
    assert_same_tensors(tmp_path / "folder" / TRANSFORMER, tmp_path / "back" / TRANSFORMER)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "folder"), int8, "--int8-tensorwise", "--json"]) == 0
    assert "Float activations are lost" in json.loads(capsys.readouterr().out)["losses"][-1]
