"""Check and describe the quantized Linears of a model, and load their stored tensors under strict keys."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..config import QuantizedModule
from .as_linear import float_linears, part, quantized_class, require_all_experts, set_part, stacked
from .linear import QARVDLinear

_ALIGNMENT = 64  # bytes, what torch's CPU allocator gives
_NAMED = 5  # names listed in an error, at most


def quantized_linears(model: nn.Module) -> dict[str, QARVDLinear]:
    """Find every quantized Linear, by its name without the parts that LoRA layers or `torch.compile` add."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, QARVDLinear)
    }


def describe_modules(model: nn.Module) -> dict[str, QuantizedModule]:
    """Describe each quantized Linear for `config.json`, from which `install_empty_modules` rebuilds it."""
    return {name: module.description for name, module in quantized_linears(model).items()}


def install_empty_modules(model: nn.Module, modules: Mapping[str, QuantizedModule]) -> None:
    """Replace the named float Linears of `model` by empty quantized ones on the meta device.

    Raises:
        ValueError: a name is not a Linear of this model.
    """
    linears, empty = dict(float_linears(model)), {}
    require_all_experts(modules, linears, "config.json")
    for name, description in modules.items():
        linear = linears.get(name)
        if linear is None:
            raise ValueError(
                f"config.json lists the quantized module {name!r}, but this {type(model).__name__} has no such "
                "Linear: the config belongs to another architecture or size."
            )
        empty[name] = quantized_class(linear)(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            description=description,
            device="meta",
            dtype=linear.weight.dtype,
        )
    for name, layer in stacked(empty).items():
        set_part(model, name, layer)


def check_keys(model: nn.Module, loaded_keys: list[str], source: str) -> None:
    """Check that a checkpoint has exactly the tensors of `model`.

    Raises:
        ValueError: tensors are missing or unexpected; the message names them.
    """
    expected, loaded = set(model.state_dict()), set(loaded_keys)
    faults = [
        f"{len(names)} {kind} ({', '.join(sorted(names)[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
        for kind, names in (("missing", expected - loaded), ("unexpected", loaded - expected))
        if names
    ]
    if faults:
        raise ValueError(
            f"{source} does not fit its config.json: tensors {' and '.join(faults)}. The file is "
            "truncated, edited or from another model; download or quantize it again."
        )


def assign_stored_tensor(
    model: nn.Module, name: str, stored: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None
) -> None:
    """Put a stored tensor into its quantized module, unchanged except for the bias, which takes the model's dtype.

    Raises:
        ValueError: the stored dtype is not the one of the empty parameter.
    """
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    if parameter_name == "bias":
        stored = stored if dtype is None else stored.to(dtype)
    elif stored.dtype != (expected := getattr(module, parameter_name).dtype):
        raise ValueError(
            f"{name} is stored as {stored.dtype}, expected {expected}: the file was cast or edited. Download or "
            "quantize it again."
        )
    setattr(module, parameter_name, nn.Parameter(stored.to(device), requires_grad=False))


def check_loaded(model: nn.Module, source: str) -> None:
    """Check that a file supplied every tensor; a missing one would fail at the first forward, without its name.

    Raises:
        ValueError: tensors are missing; the message names the first.
    """
    absent = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if absent:
        raise ValueError(
            f"{source}: {len(absent)} tensors are missing (first: {absent[0]}). The file is truncated or a shard is "
            "missing; download it again."
        )


def align_float_tensors(model: nn.Module) -> None:
    """Copy float parameters that a file mapping left unaligned: CPU matrix products round differently there.

    Otherwise the outputs of a saved and a reloaded model would differ in their last bits.
    """
    for module in model.modules():
        if not isinstance(module, QARVDLinear):
            for parameter in module.parameters(recurse=False):
                if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
                    parameter.data = parameter.data.clone()


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Count the bytes of a model as stored.

    Returns:
        `quantized`: the quantized Linears with scales, zero-points, order and bias; `bfloat16`: the same layers as
        bfloat16 weight and bias; `total`: all parameters of the model.
    """
    layers = quantized_linears(model).values()
    return {
        "quantized": sum(p.nbytes for layer in layers for p in layer.parameters()),
        "bfloat16": sum(
            2 * (layer.in_features * layer.out_features + (0 if layer.bias is None else layer.out_features))
            for layer in layers
        ),
        "total": sum(p.nbytes for p in model.parameters()),
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrapper of `torch.compile`, which would show in the name of every layer."""
    return getattr(model, "_orig_mod", model)


def base_layer_name(model: nn.Module, name: str) -> str:
    """Return the name under which a layer is stored: adapters (PEFT) wrap it, and keep it as `base_layer`."""
    try:
        return f"{name}.base_layer" if hasattr(part(unwrapped(model), name), "base_layer") else name
    except AttributeError:  # an expert is no module of a float model
        return name
