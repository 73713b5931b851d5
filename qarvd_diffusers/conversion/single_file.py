"""One file for both ecosystems: original key names, packed tensors, and a header instead of a folder's JSON files.

The tensors of a quantized Linear stand under its original name: `blocks.0.self_attn.q.weight_packed`, `.weight_scale` and
so on, beside the float tensors of all other layers, bits unchanged. Folder and file hold the same information.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import QARVDConfig
from ..files.atomic import atomic_directory, atomic_file
from ..files.safetensors import TensorSpec, write_shards, write_tensors
from ..models.single_file_header import SingleFileHeader, comfyui_metadata, read_single_file
from ..quantization.model import quantized_linears, unwrapped
from ..quantization.packing import unpack
from ..rollout.config import RolloutConfig
from .convert import STEM, folder_tensors
from .folder import copy_base_components, write_pipeline
from .names import to_diffusers_keys, to_original_keys

_PIPELINE_FIELDS = (*RolloutConfig.names(), "height", "width", "max_sequence_length", "fps")


def pipeline_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those values of a pipeline's config that are stored."""
    return {name: config[name] for name in _PIPELINE_FIELDS if name in config}


def save_single_file(transformer: nn.Module, pipeline: Mapping[str, Any], path: str | Path) -> Path:
    """Write a transformer, float or quantized, as one safetensors file under original names.

    Args:
        transformer: a `CausalWanTransformer3DModel` or stock Wan transformer without adapters.
        pipeline: the pipeline's config, or just the values of `RolloutConfig`.
        path: ends in `.safetensors`; appears when it is complete.

    Raises:
        ValueError: another suffix, or an adapter is attached.
    """
    transformer = unwrapped(transformer)
    state_dict = transformer.state_dict()
    if any(".base_layer." in key for key in state_dict):
        raise ValueError(
            "the transformer carries adapters, which a single file does not hold: unload_lora_weights() first"
        )
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    quantization = config.pop("quantization_config", None)
    if isinstance(quantization, Mapping):
        quantization = QARVDConfig.from_dict(quantization)
    header = SingleFileHeader(config, quantization, pipeline_fields(pipeline))
    original = to_original_keys(state_dict, prefix="")
    specs = {key: TensorSpec.of(tensor) for key, tensor in original.items()}
    with atomic_file(_safetensors(path)) as temporary:
        write_tensors(temporary, specs, original.__getitem__, header.to_metadata())
    return Path(path)


def folder_to_single_file(folder: str | Path, out: str | Path) -> Path:
    """The transformer of a diffusers folder, float or quantized, as one file; tensors are copied one by one.

    Raises:
        ValueError: `folder` is no diffusers folder of a Wan model, or `out` does not end in `.safetensors`.
    """
    folder, out = Path(folder), _safetensors(out)
    if not (folder / "transformer" / "config.json").is_file():
        raise ValueError(f"{folder / 'transformer'} has no config.json: expected a diffusers folder of a Wan model")
    config, index = _json(folder / "transformer" / "config.json"), _json(folder / "model_index.json")
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    quantization = config.pop("quantization_config", None)
    quantization = None if quantization is None else QARVDConfig.from_dict(quantization)
    header = SingleFileHeader(config, quantization, pipeline_fields(index))
    specs, fetch = folder_tensors(folder / "transformer")
    names = to_original_keys({name: name for name in specs}, prefix="")
    with atomic_file(out) as temporary:
        write_tensors(
            temporary, {key: specs[n] for key, n in names.items()}, lambda k: fetch(names[k]), header.to_metadata()
        )
    return out


def single_file_to_folder(path: str | Path, out_dir: str | Path, base: str | Path | None = None) -> Path:
    """Inverse of `folder_to_single_file`: the same tensors, bit by bit, and the same configs.

    Args:
        path: a file that `save_single_file` or `folder_to_single_file` wrote.
        out_dir: folder to create; must not exist yet.
        base: local diffusers folder that lends VAE, text encoder and tokenizer; None writes none.

    Raises:
        ValueError: the file has no header of ours, or is damaged.
        FileExistsError: if `out_dir` exists.
    """
    path, out_dir = Path(path), Path(out_dir)
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists; give a new folder or remove it first")
    header = read_single_file(path)
    if header is None:
        raise ValueError(f"{path}: has no header that tells its config; convert it with a family name instead")
    specs, fetch = folder_tensors(path)
    names = to_diffusers_keys({key: key for key in specs})
    config = {"_class_name": "WanTransformer3DModel", **header.transformer}
    if header.quantization is not None:
        config["quantization_config"] = header.quantization.to_dict()
    with atomic_directory(out_dir) as folder:
        write_pipeline(folder, header.pipeline, copy_base_components(base, folder))
        write_shards(
            folder / "transformer", STEM, [{n: specs[key] for n, key in names.items()}], lambda n: fetch(names[n])
        )
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "transformer" / "config.json").write_text(text, encoding="utf-8")
    return out_dir


def export_int8_tensorwise(transformer: nn.Module, path: str | Path) -> list[str]:
    """Write a quantized transformer for ComfyUI's own int8 layers (`int8_tensorwise`, ComfyUI 0.27 and later).

    The format knows one symmetric int8 grid per output channel and quantizes activations per token at run time: what
    Q-ARVD knows beyond that is lost.

    Args:
        transformer: a quantized transformer without adapters.
        path: ends in `.safetensors`; appears when it is complete.

    Returns:
        What was lost, one sentence each.

    Raises:
        ValueError: the model is float, or another suffix.
    """
    transformer = unwrapped(transformer)
    layers = quantized_linears(transformer)
    if not layers:
        raise ValueError("the transformer is float: quantize it, or give ComfyUI the float file")
    tensors = {
        name: tensor
        for name, tensor in transformer.state_dict().items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }
    named = {name: f"{name}.weight" for name in layers}
    original = to_original_keys({**{key: key for key in tensors}, **{key: key for key in named.values()}}, prefix="")
    back = {new: old for old, new in original.items()}
    result = {back[key]: tensor for key, tensor in tensors.items()}
    exact = 0
    marker = torch.tensor(list(json.dumps({"format": "int8_tensorwise"}).encode()), dtype=torch.uint8)
    for name, layer in layers.items():
        module = back[named[name]].removesuffix(".weight")
        codes, scale, same = _one_grid(layer)
        result |= {f"{module}.weight": codes, f"{module}.weight_scale": scale, f"{module}.comfy_quant": marker}
        exact += same
    specs = {key: TensorSpec.of(tensor) for key, tensor in result.items()}
    with atomic_file(_safetensors(path)) as temporary:
        write_tensors(temporary, specs, result.__getitem__, comfyui_metadata(transformer.config))
    return _losses(layers, exact)


def _one_grid(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """int8 `[N, K]` and float32 `[N, 1]` whose product is a layer's weight, and whether it is so exactly."""
    order, count = layer.channel_order.long(), layer.num_outliers
    if count in (0, layer.in_features):
        group = int(count == 0)
        codes = (
            unpack(layer.weight_packed, layer.weight_bits).to(torch.int16) - layer.weight_zero_point[:, group, None]
        )
        if codes.min() >= -128 and codes.max() <= 127:
            plain = torch.empty_like(codes, dtype=torch.int8)
            plain[:, order] = codes.to(torch.int8)
            return plain, layer.weight_scale[:, group, None].clone(), True
    weight = layer.dequantized().float()
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale, False


def _losses(layers: Mapping[str, Any], exact: int) -> list[str]:
    some = next(iter(layers.values()))
    lost = [f"{exact} of {len(layers)} layers keep their integer weights exactly."]
    if exact < len(layers):
        lost.append(
            f"{len(layers) - exact} layers were rounded again to one symmetric int8 grid per output channel: the separate scale "
            "of the outlier channels, zero-points and learned rounding are lost there."
        )
    if any(layer.weight_bits == 4 for layer in layers.values()):
        lost.append("4-bit storage is lost: the format takes 8 bits per weight.")
    kinds = {
        "static": "Calibrated activation scales are lost: ComfyUI finds symmetric ones per token at run time.",
        "dynamic": "The separate activation scale of the outlier channels is lost: ComfyUI has one per token.",
        "none": "Float activations are lost: ComfyUI quantizes the inputs of these layers to 8 bits.",
    }
    return [*lost, kinds[some.activation]]


def _safetensors(path: str | Path) -> Path:
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: expected a file name that ends in .safetensors")
    return Path(path)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
