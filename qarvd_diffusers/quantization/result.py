"""Hold all that calibration decides, as a value and as one safetensors file: `CalibrationResult`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import PACKED_FORMAT, QARVDConfig, QuantizedModule
from ..files.atomic import atomic_file
from .qparams import LinearQParams, stored_tensors

FORMAT = f"qarvd-calibration-{PACKED_FORMAT}"
METADATA = "qarvd"  # one entry: safetensors writes several in any order, and equal results must be equal files

# Incremented when the same config gives other numbers than before, so that older cached results are not used.
# 2: layers that read the output of cross-attention are not split by their inputs.
REVISION = 2


def config_hash(config: QARVDConfig) -> str:
    """Hash the fields that decide the outcome of a calibration (the text encoder's do not)."""
    values = config.replace(modules=None, text_encoder=None, calibration_adapters=None).to_dict()
    del values["format"]  # without modules there is none
    return hashlib.blake2b(
        json.dumps([PACKED_FORMAT, REVISION, values], sort_keys=True).encode(), digest_size=20
    ).hexdigest()


@dataclass(frozen=True, eq=False)
class CalibrationResult:
    """Hold quantizer parameters and integer weights of every quantized Linear.

    Attributes:
        layers: by module name.
        config_hash: `config_hash` of the config it was made with.
    """

    layers: Mapping[str, LinearQParams]
    config_hash: str

    def modules(self) -> dict[str, QuantizedModule]:
        """Describe each layer for a checkpoint's config."""
        return {name: layer.description for name, layer in self.layers.items()}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file atomically; folders are made.

        Raises:
            OSError: the disk is full, or the path cannot be written; the message names it.
        """
        tensors = {
            f"{name}.{key}": tensor.contiguous().cpu()
            for name, layer in self.layers.items()
            for key, tensor in layer.tensors().items()
        }
        layers = {name: dataclasses.asdict(description) for name, description in self.modules().items()}
        described = {"format": FORMAT, "config_hash": self.config_hash, "layers": layers}
        with atomic_file(path, "free some space and calibrate again") as temporary:
            save_file(_unshared(tensors), temporary, {METADATA: json.dumps(described)})
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: QARVDConfig | None = None) -> CalibrationResult:
        """Read a file of `save`.

        Args:
            path: the file.
            config: raise an error for a result of another config; None accepts any.

        Raises:
            FileNotFoundError: no such file.
            ValueError: truncated, of another format or config, or with a missing, unexpected, wrong-shape or
                wrong-dtype tensor; the message names file and tensor.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such calibration result")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is truncated or not a safetensors file ({error}): calibrate again") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}: calibrate again")
        if config is not None and metadata["config_hash"] != config_hash(config):
            raise ValueError(
                f"{path} was calibrated with another config: calibrate again, or pass the config it was made with"
            )
        described = {name: QuantizedModule(**value) for name, value in metadata["layers"].items()}
        layers = {name: _layer(path, name, description, tensors) for name, description in described.items()}
        if tensors:
            raise ValueError(f"{path} holds unexpected tensors {sorted(tensors)[:5]}: calibrate again")
        return cls(layers, metadata["config_hash"])


def _layer(path: object, name: str, description: QuantizedModule, tensors: dict[str, Tensor]) -> LinearQParams:
    """Take the tensors of one layer out of `tensors`, checked against each other."""
    prefix = f"{name}."
    try:
        sizes = tensors[f"{prefix}channel_order"].numel(), tensors[f"{prefix}weight_scale"].shape[0]
    except KeyError as error:
        raise ValueError(f"{path} lacks the tensor {error}: calibrate again") from None
    fields: dict[str, Any] = {"input_scale": None, "input_zero_point": None}
    for key, (shape, dtype) in stored_tensors(*sizes, description).items():
        tensor = tensors.pop(prefix + key, None)
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            got = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{path}: {prefix}{key} is {got}, expected {dtype} {shape}: calibrate again")
        fields[key] = tensor
    return LinearQParams(description=description, **fields)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that tied layers share, which safetensors does not write twice."""
    first = {tensor.data_ptr(): key for key, tensor in reversed(tensors.items())}
    return {key: tensor if first[tensor.data_ptr()] == key else tensor.clone() for key, tensor in tensors.items()}
