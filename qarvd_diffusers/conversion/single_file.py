"""Write one safetensors file that diffusers and ComfyUI both load, and turn it into a folder again.

Tensors have original Wan names. A header holds what the JSON files of a folder hold. The tensors of a quantized Linear
follow its original name: `blocks.0.self_attn.q.weight_packed`, `.weight_scale` and so on. Folder and file hold the
same tensors, bit for bit.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qarvd_kernels import unpack_weight

from ..config import QARVDConfig
from ..files.atomic import atomic_directory, atomic_file
from ..files.safetensors import TensorSpec, write_shards, write_tensors
from ..files.schema import read_json
from ..models.single_file_header import SingleFileHeader, comfyui_metadata, read_single_file
from ..models.world import transformer_class
from ..quantization.model import quantized_linears, unwrapped
from ..rollout.config import RolloutConfig
from .checkpoint import STEM, folder_tensors
from .folder import PORTABLE_CLASSES, copy_base_components, write_pipeline
from .names import to_diffusers_keys, to_original_keys

_PIPELINE_FIELDS = (*RolloutConfig.names(), "height", "width", "max_sequence_length", "fps")


def pipeline_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a pipeline's config that a single file stores."""
    return {name: config[name] for name in _PIPELINE_FIELDS if name in config}


def save_single_file(transformer: nn.Module, pipeline: Mapping[str, Any], path: str | Path) -> Path:
    """Write a transformer, float or quantized, as one safetensors file under original names.

    Args:
        transformer: a `CausalWanTransformer3DModel` or stock Wan transformer without adapters.
        pipeline: the pipeline's config, or just the values of `RolloutConfig`.
        path: ends in `.safetensors`; appears when it is complete.

    Raises:
        ValueError: for another suffix, or if an adapter is attached.
    """
    transformer = unwrapped(transformer)
    state_dict = transformer.state_dict()
    if any(".base_layer." in key for key in state_dict):
        raise ValueError(
            "the transformer carries adapters, which a single file cannot hold: call unload_lora_weights() first"
        )
    specs = {name: TensorSpec.of(tensor) for name, tensor in state_dict.items()}
    header = _header(transformer.config, pipeline).to_metadata()
    return _write(path, specs, state_dict.__getitem__, header)


def folder_to_single_file(folder: str | Path, out: str | Path, prefix: str = "") -> Path:
    """Write the transformer of a diffusers folder, float or quantized, as one safetensors file under original names.

    Tensors are copied one by one. `from_single_file` reads the file if it has no prefix and `model_index.json` says
    how the model rolls out; another float model is written without a header.

    Args:
        folder: diffusers folder of a Wan model.
        out: ends in `.safetensors`; appears when it is complete.
        prefix: put before every name; the original training code expects `model.`.

    Raises:
        ValueError: if `folder` is not a diffusers folder of a Wan model, if it is quantized and there is a prefix, or
            for another suffix of `out`.
    """
    folder = Path(folder)
    path, index = folder / "transformer" / "config.json", folder / "model_index.json"
    if not path.is_file() or not list(path.parent.glob("*.safetensors")):
        raise ValueError(
            f"{path.parent} has no config.json or no safetensors: expected a diffusers folder of a Wan model"
        )
    header = _header(read_json(path), read_json(index) if index.is_file() else {})
    if header.quantization is not None and (prefix or not index.is_file()):
        raise ValueError(f"{folder} is quantized: expected no prefix, and a model_index.json of the pipeline")
    described = not prefix and (header.quantization is not None or header.pipeline)
    return _write(out, *folder_tensors(path.parent), header.to_metadata() if described else {}, prefix)


def export_checkpoint(folder: str | Path, out: str | Path) -> Path:
    """Call `folder_to_single_file(folder, out, prefix="model.")`; deprecated."""
    warnings.warn(
        'export_checkpoint is deprecated: use folder_to_single_file(folder, out, prefix="model.") instead',
        DeprecationWarning,
        stacklevel=2,
    )
    return folder_to_single_file(folder, out, prefix="model.")


def _header(transformer: Mapping[str, Any], pipeline: Mapping[str, Any]) -> SingleFileHeader:
    """Build the header from the configs of a transformer and of its pipeline."""
    config = {key: value for key, value in transformer.items() if not key.startswith("_")}
    quantization = config.pop("quantization_config", None)
    if isinstance(quantization, Mapping):
        quantization = QARVDConfig.from_dict(quantization)
    return SingleFileHeader(config, quantization, pipeline_fields(pipeline))


def _write(
    path: str | Path,
    specs: Mapping[str, TensorSpec],
    fetch: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
    prefix: str = "",
) -> Path:
    """Write tensors, given under diffusers names, under original names."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a file name that ends in .safetensors")
    names = to_original_keys({name: name for name in specs}, prefix)
    stored = {key: specs[name] for key, name in names.items()}
    with atomic_file(path) as temporary:
        write_tensors(temporary, stored, lambda key: fetch(names[key]), metadata)
    return path


def single_file_to_folder(path: str | Path, out_dir: str | Path, base: str | Path | None = None) -> Path:
    """Turn a single file into a diffusers folder with the same tensors, bit for bit, and the same configs.

    Args:
        path: a file that `save_single_file` or `folder_to_single_file` wrote.
        out_dir: folder to create; must not exist yet.
        base: local diffusers folder that provides VAE, text encoder and tokenizer; None writes none of them.

    Raises:
        ValueError: if the file has no header of Q-ARVD, or is damaged.
        FileExistsError: if `out_dir` exists.
    """
    path, out_dir = Path(path), Path(out_dir)
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists; give a new folder or remove it first")
    header = read_single_file(path)
    if header is None:
        raise ValueError(f"{path}: has no header with its config: convert it with a family name instead")
    specs, fetch = folder_tensors(path)
    names = to_diffusers_keys({key: key for key in specs})
    stored = PORTABLE_CLASSES[transformer_class(header.transformer).__name__]
    config = {"_class_name": stored[1], **header.transformer}
    if header.quantization is not None:
        config["quantization_config"] = header.quantization.to_dict()
    with atomic_directory(out_dir) as folder:
        write_pipeline(folder, header.pipeline, {**copy_base_components(base, folder), "transformer": stored})
        write_shards(
            folder / "transformer", STEM, [{n: specs[key] for n, key in names.items()}], lambda n: fetch(names[n])
        )
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "transformer" / "config.json").write_text(text, encoding="utf-8")
    return out_dir


def export_int8_tensorwise(transformer: nn.Module, path: str | Path) -> list[str]:
    """Write a quantized transformer for ComfyUI's own int8 layers (`int8_tensorwise`, ComfyUI 0.27 and later).

    The format has one symmetric int8 grid per output channel, and activations are quantized per token at run time.
    Whatever else the model has is lost.

    Args:
        transformer: a quantized transformer without adapters.
        path: ends in `.safetensors`; appears when it is complete.

    Returns:
        One sentence for each loss.

    Raises:
        ValueError: if the model is float, or for another suffix.
    """
    transformer = unwrapped(transformer)
    layers = quantized_linears(transformer)
    if not layers:
        raise ValueError("the transformer is float: quantize it, or use the float file in ComfyUI")
    if "control_dim" in transformer.config:
        raise ValueError("ComfyUI's own layers have no controls: leave int8_tensorwise out")
    tensors = {
        name: tensor
        for name, tensor in transformer.state_dict().items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }
    exact = 0
    marker = torch.tensor(list(json.dumps({"format": "int8_tensorwise"}).encode()), dtype=torch.uint8)
    for name, layer in layers.items():
        codes, scale, same = _one_grid(layer)
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale, f"{name}.comfy_quant": marker}
        exact += same
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    _write(path, specs, tensors.__getitem__, comfyui_metadata(transformer.config))
    return _losses(layers, exact)


def _one_grid(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return int8 `[N, K]` and float32 `[N, 1]` whose product is a layer's weight, and whether it is exact."""
    order, count = layer.channel_order.long(), layer.num_outliers
    scaled = layer.channel_scale is not None and bool((layer.channel_scale != 1).any())
    if count in (0, layer.in_features) and layer.rotation == 1 and not scaled:
        group = int(count == 0)
        codes = unpack_weight(layer.weight_packed, layer.weight_bits).to(torch.int16)
        if layer.group:
            factors = layer.weight_zero_point.to(torch.int16).repeat_interleave(layer.group, dim=1)
            codes = ((factors & 15) + 1) * (codes - (factors >> 4))
        else:
            codes = codes - layer.weight_zero_point[:, group, None]
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
            f"{len(layers) - exact} layers were rounded again to one symmetric int8 grid per output channel: the "
            "separate scale of the outlier channels, zero-points and learned rounding are lost there."
        )
    if any(layer.weight_bits == 4 for layer in layers.values()):
        lost.append("4-bit storage is lost: the format takes 8 bits per weight.")
    kinds = {
        "static": "Calibrated activation scales are lost: ComfyUI finds symmetric ones per token at run time.",
        "dynamic": "The separate activation scale of the outlier channels is lost: ComfyUI has one per token.",
        "token": "Rotated blocks of channels are lost: their weights were rounded again, without the rotation.",
        "none": "Float activations are lost: ComfyUI quantizes the inputs of these layers to 8 bits.",
    }
    return [*lost, kinds[some.activation]]
