"""The header by which one safetensors file tells all that a folder's JSON files tell."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import QARVDConfig
from ..files.safetensors import read_metadata

METADATA = "qarvd"
VERSION = 1


def comfyui_metadata(transformer: Mapping[str, Any]) -> dict[str, str]:
    """How ComfyUI tells a causal Wan model from an ordinary one, and what shapes of tensors do not tell it.

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
    """What a single file says of itself.

    Attributes:
        transformer: arguments of `WanTransformer3DModel`.
        quantization: config of a quantized model, or None.
        pipeline: values of the pipeline's config: those of `RolloutConfig`, sizes, fps.
    """

    transformer: Mapping[str, Any]
    quantization: QARVDConfig | None
    pipeline: Mapping[str, Any]

    def to_metadata(self) -> dict[str, str]:
        """Texts for the header of a safetensors file."""
        config = None if self.quantization is None else self.quantization.to_dict()
        values = {
            "version": VERSION,
            "transformer": dict(self.transformer),
            "quantization_config": config,
            "pipeline": dict(self.pipeline),
        }
        return {**comfyui_metadata(self.transformer), METADATA: json.dumps(values, sort_keys=True)}


def read_single_file(path: str | os.PathLike[str]) -> SingleFileHeader | None:
    """The header of a single file; None if it is a safetensors file without ours.

    Raises:
        ValueError: the file is truncated, its header damaged, or of a newer version.
    """
    text = read_metadata(path).get(METADATA)
    if text is None:
        return None
    try:
        values = json.loads(text)
        version, config = values["version"], values["quantization_config"]
        header = SingleFileHeader(values["transformer"], None, values["pipeline"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: its header entry {METADATA!r} is damaged ({error}); download the file again"
        ) from error
    if version != VERSION:
        raise ValueError(
            f"{path}: is of layout version {version}, this version of qarvd_diffusers reads {VERSION}: update it"
        )
    if config is None:
        return header
    try:
        quantization = QARVDConfig.from_dict(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return SingleFileHeader(header.transformer, quantization, header.pipeline)
