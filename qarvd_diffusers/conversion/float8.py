"""Read 8-bit weights as ComfyUI stores them: codes with a `scale_weight`, or in newer files a `weight_scale`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..files.safetensors import TensorSpec
from ..files.schema import check_value, parse_json

_SCALES = ("scale_weight", "weight_scale")
_NOTES = ("scale_input", "input_scale", "comfy_quant")  # how ComfyUI computes; not part of the weight
_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
_CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def is_float8(dtype: torch.dtype) -> bool:
    """Tell whether a dtype is an 8-bit float."""
    return dtype.is_floating_point and dtype.itemsize == 1


def find_scales(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Map weights stored in 8 bits with a scale to their scale; all names are diffusers names of a float transformer.

    Raises:
        ValueError: if a scale is neither one number nor one per output channel, or its weight does not have 8 bits.
    """
    scales = {}
    for name, spec in specs.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in _SCALES or f"{module}.weight_packed" in specs:
            continue
        weight = specs.get(f"{module}.weight")
        if weight is None or weight.dtype not in _CODES:
            stored = "missing" if weight is None else weight.dtype
            raise ValueError(f"{name} scales a weight that is {stored}, expected one of 8 bits: use the bfloat16 file")
        if spec.shape not in ((), (1,), (1, 1), (weight.shape[0],), (weight.shape[0], 1)):
            raise ValueError(
                f"{name} is {spec.shape} for a weight {weight.shape}, expected one scale, or one per output channel: "
                "scales of blocks are not supported, use the bfloat16 file"
            )
        scales[f"{module}.weight"] = name
    return scales


def without_scales(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the parameters of a float transformer: leave out scales and entries on how ComfyUI computes."""
    modules = {name.rpartition(".")[0] for name in specs if name.endswith(".weight")}
    return {
        name: spec
        for name, spec in specs.items()
        if (parts := name.rpartition("."))[0] not in modules or parts[2] not in (*_SCALES, *_NOTES)
    }


def check_formats(source: str, notes: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> None:
    """Check by ComfyUI's metadata of each layer that its weight is codes times a scale.

    Args:
        source: name of the file in errors.
        notes: `comfy_quant` entries, bytes of JSON.
        header: metadata of the file's header, which may hold all entries as `_quantization_metadata`.

    Raises:
        ValueError: for another format; the message names the layer.
    """
    try:
        layers = {
            name: parse_json(bytes(note.to(torch.uint8).flatten().tolist()), name) for name, note in notes.items()
        }
        others = parse_json(header.get("_quantization_metadata", "{}"), "_quantization_metadata").get("layers", {})
        layers |= check_value(others, dict[str, Any], "_quantization_metadata: layers")
        formats = {
            name: (note.get("format"), {**note, **note.get("params", {})}.get("convrot"))
            for name, note in layers.items()
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{source}: the metadata of its 8-bit weights is damaged ({error}); download the file again"
        ) from error
    for name, (stored, rotated) in formats.items():
        if stored not in _FORMATS or rotated:
            raise ValueError(
                f"{source}: {name} has format {stored!r}{' with rotated weights' if rotated else ''}, expected one of "
                f"{', '.join(_FORMATS)}: use the bfloat16 file"
            )


def scaled(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply codes `[N, ...]` by one scale, or one per row, in float32."""
    return codes.float() * scale.float().reshape(-1, *(1,) * (codes.ndim - 1))
