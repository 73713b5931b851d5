"""Read and write the header of a single safetensors file, which replaces the JSON files of a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from ..config import QARVDConfig
from ..files.safetensors import DOWNLOAD, TensorSpec, read_metadata, read_specs
from ..files.schema import check_mapping, parse_json
from ..quantization.stored_model import build_empty, check_tensors

METADATA = "qarvd"
VERSION = 1
_ENTRIES = {
    "version": int,
    "transformer": dict[str, Any],
    "quantization_config": dict[str, Any] | None,
    "pipeline": dict[str, Any],
}


def comfyui_metadata(transformer: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata by which ComfyUI recognizes a causal Wan model, and sizes that tensor shapes do not show.

    Args:
        transformer: arguments of `WanTransformer3DModel`.
    """
    values = {
        "causal_ar": True,
        "num_heads": transformer["num_attention_heads"],
        "text_dim": transformer["text_dim"],
    }
    return {"config": json.dumps({"transformer": values}), "format": "pt"}


@dataclass(frozen=True, eq=False)
class SingleFileHeader:
    """Describe the model in a single file.

    Attributes:
        transformer: arguments of `WanTransformer3DModel`.
        quantization: config of a quantized model, or None.
        pipeline: values of the pipeline's config: those of `RolloutConfig`, sizes, fps.
    """

    transformer: Mapping[str, Any]
    quantization: QARVDConfig | None
    pipeline: Mapping[str, Any]

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata for the header of a safetensors file."""
        config = None if self.quantization is None else self.quantization.to_dict()
        values = {
            "version": VERSION,
            "transformer": dict(self.transformer),
            "quantization_config": config,
            "pipeline": dict(self.pipeline),
        }
        return {**comfyui_metadata(self.transformer), METADATA: json.dumps(values, sort_keys=True)}


def read_single_file(path: str | os.PathLike[str]) -> SingleFileHeader | None:
    """Read the header of a single file; return None for a safetensors file that Q-ARVD did not write.

    Raises:
        ValueError: the file is truncated, or its header is damaged or of a newer version.
    """
    text = read_metadata(path).get(METADATA)
    if text is None:
        return None
    try:
        values: dict[str, Any] = parse_json(text, METADATA)
        version = values.get("version", VERSION)
        checked = values if version != VERSION else check_mapping(values, _ENTRIES, METADATA)
    except ValueError as error:
        raise ValueError(
            f"{path}: its header entry {METADATA!r} is damaged ({error}); download the file again"
        ) from error
    if version != VERSION:
        raise ValueError(
            f"{path}: is of layout version {version}, this version of qarvd_diffusers reads {VERSION}: update it"
        )
    header, config = (
        SingleFileHeader(checked["transformer"], None, checked["pipeline"]),
        checked["quantization_config"],
    )
    if config is None:
        return header
    try:
        quantization = QARVDConfig.from_dict(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return SingleFileHeader(header.transformer, quantization, header.pipeline)


def check_single_file(path: str, header: SingleFileHeader) -> dict[str, tuple[TensorSpec, Path]]:
    """Check the tensors of a single file against its header, before memory is taken for them; return them.

    Raises:
        ValueError: the header makes no model, or the file does not hold exactly its tensors; the message names them.
    """
    specs = convert_wan_transformer_to_diffusers(dict(read_specs(path)))
    found = {name: (spec, Path(path)) for name, spec in specs.items()}
    values = {**header.transformer, "quantization_config": header.quantization}
    model = build_empty(WanTransformer3DModel, values, found, f"{path}: {METADATA}: transformer")
    check_tensors(model, found, path)
    if surplus := sorted(specs.keys() - model.state_dict().keys()):
        raise ValueError(
            f"{path} does not fit its header: tensors {len(surplus)} unexpected ({surplus[0]}): {DOWNLOAD}"
        )
    return found
