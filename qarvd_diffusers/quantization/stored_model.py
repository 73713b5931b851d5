"""Check a stored model before memory is taken for it: its config by type and size, and its tensors by name and shape.

diffusers and transformers take any value of a config, only log what a file lacks, and go on with weights that were
never set.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import QARVDConfig
from ..files.safetensors import DOWNLOAD, TensorSpec, check_finite
from ..files.schema import check_value
from .linear import QARVDLinear
from .model import install_empty_modules, quantized_linears

Stored = Mapping[str, tuple[TensorSpec, Path]]  # tensors of files: name -> shape and dtype, file

_NAMED = 5
_LEAST = 2**16  # what a size that no tensor has may be: positions of a table, time steps
_VALUES_BELOW = 2**30  # bytes of a model whose values are looked at
_TABLES = 2**29  # bytes of tables that a config may ask for, besides the tensors of its files


def build_empty(cls: type, values: Mapping[str, Any], found: Stored, where: object) -> nn.Module:
    """Build a model of diffusers on the meta device from its config; packed layers are empty ones.

    Args:
        cls: its class; the annotations of its constructor say what a config may hold.
        values: the config. Keys that begin with `_` and unknown ones, which diffusers ignores, are left out.
        found: the tensors of its files, which bound the sizes in the config.
        where: the config's file, for errors.

    Raises:
        ValueError: a value of another type, a size beyond the files, or values that make no model; the message names
            file and entry.
    """
    check_arguments(cls, values, where)
    _check_stored_sizes(values, found, where)
    try:
        config = values.get("quantization_config")
        if isinstance(config, Mapping) and config.get("quant_method") == QARVDConfig.quant_method:
            config = QARVDConfig.from_dict(config)
        with torch.device("meta"):
            model: nn.Module = cls.from_config(  # type: ignore[attr-defined]
                {name: value for name, value in values.items() if name != "quantization_config"}
            )
        if isinstance(config, QARVDConfig) and config.modules is not None:
            install_empty_modules(model, config.modules)
    except Exception as error:  # there is nothing else than the config that it could come from
        raise ValueError(f"{where}: no {cls.__name__} can be built from it ({error}): {DOWNLOAD}") from error
    _check_latents(model.config, where)  # type: ignore[arg-type]
    tables = sum(tensor.nbytes for tensor in model.buffers())
    if tables > _TABLES:
        raise ValueError(f"{where}: asks for tables of {tables} bytes, expected at most {_TABLES}: {DOWNLOAD}")
    return model


def build_encoder(cls: type, values: Mapping[str, Any], found: Stored, where: object) -> nn.Module | None:
    """Build a model of transformers on the meta device from its config; None if another library has quantized it.

    Raises:
        ValueError: as `build_empty`.
    """
    if values.get("quantization_config") is not None:
        return None
    _check_stored_sizes(values, found, where)
    try:
        config = cls.config_class.from_dict(dict(values))  # type: ignore[attr-defined]
        with torch.device("meta"):
            model: nn.Module = cls(config)
    except Exception as error:  # as above
        raise ValueError(f"{where}: no {cls.__name__} can be built from it ({error}): {DOWNLOAD}") from error
    return model


def check_sizes(values: Mapping[str, Any], where: object, limit: int, layers: int | None = None) -> None:
    """Check the integers of a config, in lists too: at most `limit`, and numbers of layers at most `layers`.

    Raises:
        ValueError: one is beyond; the message names `where` and entry.
    """
    for name, value in values.items():
        most = layers if layers is not None and ("layers" in name or "blocks" in name) else limit
        for size in value if isinstance(value, list | tuple) else [value]:
            if isinstance(size, int) and not name.startswith("_") and abs(size) > most:
                raise ValueError(f"{where}: {name} is {size}, expected at most {most}: {DOWNLOAD}")


def _check_stored_sizes(values: Mapping[str, Any], found: Stored, where: object) -> None:
    """Check the sizes in a config against the tensors of its files."""
    if found:
        elements = sum(math.prod(spec.shape) for spec, _ in found.values())
        check_sizes(values, where, max(_LEAST, elements), len(found))


def check_arguments(cls: type, values: Mapping[str, Any], where: object) -> None:
    """Check the values of a config by the annotations of a constructor; without annotations, nothing is checked.

    Raises:
        ValueError: a value of another type; the message names `where` and entry.
    """
    init = cls.__init__  # type: ignore[misc]
    hints = typing.get_type_hints(init)
    for name, parameter in inspect.signature(init).parameters.items():
        if name in values and name in hints and not (values[name] is None and parameter.default is None):
            check_value(values[name], hints[name], f"{where}: {name}")


def check_tensors(model: nn.Module, found: Stored, folder: object) -> None:
    """Compare a model with the tensors of its files, which may hold more: an encoder is loaded from both halves.

    Raises:
        ValueError: a tensor is missing, of another shape or kind, or of another dtype in a packed layer; or the files
            hold a quantized model. The message names file and tensor.
    """
    state = model.state_dict(keep_vars=True)
    packed = {f"{name}.{key}" for name, layer in quantized_linears(model).items() for key in _exact(layer)}
    for name, tensor in state.items():
        spec, holder = found.get(name, (None, None))
        if spec is not None and not _fits(tensor, spec, name in packed):
            raise ValueError(f"{holder}: {name} is {spec}, expected {TensorSpec.of(tensor)}: {DOWNLOAD}")
    loaded = {id(tensor) for name, tensor in state.items() if name in found}
    missing = sorted(name for name, tensor in state.items() if name not in found and id(tensor) not in loaded)
    if not missing or getattr(model, "_checkpoint_conversion_mapping", None):
        return
    source = next((file for _, file in found.values()), folder)
    if not packed and any(name.endswith(".weight_packed") for name in found):
        raise ValueError(
            f"{source} holds a quantized model, {folder}/config.json lacks its quantization_config: {DOWNLOAD}"
        )
    listed = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
    raise ValueError(
        f"{source if len({path for _, path in found.values()}) == 1 else folder}: {len(missing)} tensors of "
        f"{type(model).__name__} are missing ({listed}): {DOWNLOAD}"
    )


@torch.no_grad()
def check_float_values(model: nn.Module, found: Stored, folder: object) -> None:
    """Check that the floats of a model below 1 GB are finite; raise ValueError that names file and tensor."""
    if sum(tensor.nbytes for tensor in model.parameters()) < _VALUES_BELOW:
        for name, tensor in model.named_parameters():
            if tensor.is_floating_point() and not tensor.is_meta:
                check_finite(tensor, f"{found[name][1] if name in found else folder}: {name}")


def _exact(layer: QARVDLinear) -> list[str]:
    """List the parameters of a packed layer whose dtype is part of the format."""
    return [name for name, _ in layer.named_parameters() if name != "bias"]


def _fits(tensor: Tensor, spec: TensorSpec, exact: bool) -> bool:
    """Return whether a stored tensor can have become this one: floats of any dtype are cast."""
    same = tensor.dtype == spec.dtype if exact else tensor.dtype.is_floating_point == spec.dtype.is_floating_point
    return same and tuple(tensor.shape) == tuple(spec.shape)


def _check_latents(config: Mapping[str, Any], where: object) -> None:
    """Check what the config of Wan's VAE says of its latents: mean and scale per channel, and how small they are."""
    if "temperal_downsample" not in config or "latents_std" not in config:
        return
    channels = config["z_dim"]
    if not len(config["latents_mean"]) == len(config["latents_std"]) == channels or min(config["latents_std"]) <= 0:
        raise ValueError(f"{where}: latents_mean and latents_std do not have z_dim ({channels}) numbers, std > 0")
    expected = {
        "scale_factor_temporal": 2 ** sum(config["temperal_downsample"]),
        "scale_factor_spatial": 2 ** (len(config["dim_mult"]) - 1) * (config["patch_size"] or 1),
    }
    for name, factor in expected.items():
        if config[name] != factor:
            raise ValueError(f"{where}: {name} is {config[name]}, expected {factor}, that of its layers: {DOWNLOAD}")
