"""8-bit weights as ComfyUI stores them: numbers in 8 bits beside a scale, `scale_weight` in older files, `weight_scale` in newer."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from ..files.safetensors import TensorSpec

_SCALES = ("scale_weight", "weight_scale")
_NOTES = ("scale_input", "input_scale", "comfy_quant")  # how ComfyUI is to compute; not what the weight is
_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
_CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def is_float8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def find_scales(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Weight -> its scale, for those tensors of a float transformer (diffusers names) that are stored in 8 bits with one.

    Raises:
        ValueError: a scale is neither one number nor one per output channel, or its weight is not of 8 bits; named.
    """
    found = {}
    for name, spec in specs.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in _SCALES or f"{module}.weight_packed" in specs:
            continue
        weight = specs.get(f"{module}.weight")
        if weight is None or weight.dtype not in _CODES:
            stored = "missing" if weight is None else weight.dtype
            raise ValueError(
                f"{name} scales a weight that is {stored}, expected one of 8 bits: take the bfloat16 file"
            )
        if spec.shape not in ((), (1,), (1, 1), (weight.shape[0],), (weight.shape[0], 1)):
            raise ValueError(
                f"{name} is {spec.shape} for a weight {weight.shape}, expected one scale, or one per output channel: scales of "
                "blocks are not supported, take the bfloat16 file"
            )
        found[f"{module}.weight"] = name
    return found


def without_scales(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The parameters of a float transformer: without what `find_scales` found, and without notes on how to compute."""
    beside = {name.rpartition(".")[0] for name in specs if name.endswith(".weight")}
    return {
        name: spec
        for name, spec in specs.items()
        if (parts := name.rpartition("."))[0] not in beside or parts[2] not in (*_SCALES, *_NOTES)
    }


def check_formats(source: str, notes: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> None:
    """Refuse weights that are more than codes times a scale, by what ComfyUI notes of each layer.

    Args:
        source: what to call the file in errors.
        notes: `comfy_quant` entries, bytes of JSON.
        header: texts in the header of the file, where all notes may stand as `_quantization_metadata`.

    Raises:
        ValueError: names the layer and its format.
    """
    try:
        found = {name: json.loads(bytes(note.to(torch.uint8).flatten().tolist())) for name, note in notes.items()}
        found |= json.loads(header.get("_quantization_metadata", "{}")).get("layers", {})
        said = {
            name: (note.get("format"), {**note, **note.get("params", {})}.get("convrot"))
            for name, note in found.items()
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{source}: its notes on 8-bit weights are damaged ({error}); download the file again"
        ) from error
    for name, (stored, rotated) in said.items():
        if stored not in _FORMATS or rotated:
            raise ValueError(
                f"{source}: {name} is of format {stored!r}{' with rotated weights' if rotated else ''}, expected one of "
                f"{', '.join(_FORMATS)}: take the bfloat16 file"
            )


def scaled(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes `[N, ...]` times one scale or one per row, in float32."""
    return codes.float() * scale.float().reshape(-1, *(1,) * (codes.ndim - 1))
