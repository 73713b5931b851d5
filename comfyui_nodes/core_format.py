"""Quantized transformers as ComfyUI's own int8 files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .library import library


def metadata(pipe: Any) -> dict[str, str]:
    """How ComfyUI tells a causal Wan model from an ordinary one, and what tensor shapes do not tell it."""
    config = pipe.transformer.config
    values = {"causal_ar": True, "num_heads": config.num_attention_heads, "text_dim": config.text_dim}
    return {"config": json.dumps({"transformer": values}), "format": "pt"}


def export_int8(pipe: Any, path: Path) -> list[str]:
    """Write the transformer under Wan's original names, its quantized layers as `int8_tensorwise`.

    Args:
        pipe: a quantized pipeline.
        path: the safetensors file; it appears when it is complete.

    Returns:
        What the format cannot hold, one line each.
    """
    layers = library().quantized_linears(pipe.transformer)
    named: dict[str, torch.Tensor] = {
        name: tensor
        for name, tensor in pipe.transformer.state_dict().items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }
    extra, exact = {}, 0
    for name, layer in layers.items():
        codes, scale, is_exact = _int8(layer)
        named[f"{name}.weight"] = codes
        extra[name] = scale
        exact += is_exact
    original = library().to_original_keys(named, prefix="")
    modules = dict(zip(named, original, strict=True))
    for name, scale in extra.items():
        module = modules[f"{name}.weight"].removesuffix(".weight")
        original[f"{module}.weight_scale"] = scale
        marker = json.dumps({"format": "int8_tensorwise"}).encode()
        original[f"{module}.comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with library("serialization").atomic_file(path) as temporary:
        save_file(
            {key: tensor.contiguous().cpu() for key, tensor in original.items()}, temporary, metadata=metadata(pipe)
        )
    config = pipe.quantization
    losses = [
        "lost: the rounding of the outlier channels' own scale" if exact < len(layers) else "weights: exact",
        f"weights kept exactly: {exact} of {len(layers)} layers; the others were rounded again to one int8 scale per row",
    ]
    if config.resolved_scheme.weight_bits == 4:
        losses.append("lost: 4-bit storage; int8_tensorwise takes 8 bits per weight")
    if config.resolved_scheme.activation == "static":
        losses.append("lost: calibrated activation scales; ComfyUI finds symmetric ones per token at run time")
    if config.resolved_scheme.activation == "none":
        losses.append("lost: float activations; int8_tensorwise always quantizes them to 8 bits")
    return losses


def _int8(layer: Any) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Codes int8 `[N, K]`, scale float32 `[N, 1]`, and whether they are the layer's weight exactly."""
    weight = copy.deepcopy(layer).float().weight
    scale = layer.weight_scale[:, 1:].float()
    codes = weight / scale.clamp_min(torch.finfo(torch.float32).tiny)
    if (
        layer.num_outliers == 0
        and codes.abs().max() <= 127.5
        and torch.equal(codes.round().clamp(-127, 127) * scale, weight)
    ):
        return codes.round().to(torch.int8), scale, True
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale, False
