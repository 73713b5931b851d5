"""Hold all that calibration decides, as a value and as one safetensors file: `CalibrationResult`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import PACKED_FORMAT, QARVDConfig, QuantizedModule
from ..files.atomic import atomic_file
from ..files.safetensors import TensorSpec, check_specs, open_tensors, read_specs
from ..files.schema import check_mapping, parse_json
from .qparams import LinearQParams, check_values, stored_tensors

FORMAT = f"qarvd-calibration-{PACKED_FORMAT}"
_DESCRIBED = {"format": str, "config_hash": str, "layers": dict[str, QuantizedModule]}
REMEDY = "calibrate again"
METADATA = "qarvd"  # one entry: safetensors writes several in any order, and equal results must be equal files

# Incremented when the same config gives other numbers than before, so that older cached results are not used.
# 2: layers that read the output of cross-attention are not split by their inputs.
# 3: activations have a scale per token by default.
REVISION = 3


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
        with open_tensors(path) as file:
            described: dict[str, Any] = parse_json((file.metadata() or {}).get(METADATA, "{}"), f"{path}: {METADATA}")
            if described.get("format") != FORMAT:
                raise ValueError(f"{path} has format {described.get('format')!r}, expected {FORMAT!r}: {REMEDY}")
            values = check_mapping(described, _DESCRIBED, f"{path}: {METADATA}")
            if config is not None and values["config_hash"] != config_hash(config):
                raise ValueError(
                    f"{path} was calibrated with another config: calibrate again, or pass the config it was made with"
                )
            modules = values["layers"]
            check_specs(path, _expected_tensors(path, modules), read_specs(path), REMEDY)
            layers = {name: _layer(name, description, file.get_tensor) for name, description in modules.items()}
        check_values(layers, path, config is not None and config.recipe.clamp_zero_points)
        return cls(layers, values["config_hash"])


def require_layers(layers: Mapping[str, LinearQParams], linears: Mapping[str, nn.Linear], source: object) -> None:
    """Check that layers read from `source` are those of a model, by name and size.

    Raises:
        ValueError: they are not; the message names the first one that differs.
    """
    found = {name: (len(layer.weight_scale), len(layer.channel_order)) for name, layer in layers.items()}
    expected = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    if differing := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
        name = differing[0]
        raise ValueError(
            f"{source}: {len(differing)} layers are not the model's, the first is {name} of size {found.get(name)}, "
            f"expected {expected.get(name)}: {REMEDY}"
        )


def _expected_tensors(path: str | os.PathLike[str], modules: Mapping[str, QuantizedModule]) -> dict[str, TensorSpec]:
    """Return the tensors of all layers; their sizes are those of the order and the scales that the file has."""
    found, expected = read_specs(path), {}
    for name, description in modules.items():
        order, scale = (
            tuple(getattr(found.get(f"{name}.{key}"), "shape", ())) for key in ("channel_order", "weight_scale")
        )
        if len(order) != 1 or len(scale) != 2 or not 0 <= description.num_outliers <= order[0]:
            raise ValueError(
                f"{path}: channel_order and weight_scale of {name} are {list(order)} and {list(scale)}, expected [K] "
                f"and [N, 2] with K of at least {description.num_outliers}: {REMEDY}"
            )
        for key, (shape, dtype) in stored_tensors(order[0], scale[0], description).items():
            expected[f"{name}.{key}"] = TensorSpec(shape, dtype)
    return expected


def _layer(name: str, description: QuantizedModule, fetch: Callable[[str], Tensor]) -> LinearQParams:
    """Read the tensors of one layer, which have been checked."""
    fields: dict[str, Any] = {"input_scale": None, "input_zero_point": None}
    fields |= {key: fetch(f"{name}.{key}") for key in stored_tensors(2, 1, description)}
    return LinearQParams(description=description, **fields)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that tied layers share, which safetensors does not write twice."""
    first = {tensor.data_ptr(): key for key, tensor in reversed(tensors.items())}
    return {key: tensor if first[tensor.data_ptr()] == key else tensor.clone() for key, tensor in tensors.items()}
