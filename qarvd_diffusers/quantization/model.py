"""What is on disk: packed tensors in safetensors under strict keys, folders that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..config import QuantizedModule
from .linear import QARVDLinear

_ALIGNMENT = 64  # bytes, what torch's CPU allocator gives
_NAMED = 5  # names shown in an error before it says how many more there are


def quantized_linears(model: nn.Module) -> dict[str, QARVDLinear]:
    """Every quantized Linear by its name in `model`; neither a LoRA layer around it nor `torch.compile` shows in the name."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, QARVDLinear)
    }


def describe_modules(model: nn.Module) -> dict[str, QuantizedModule]:
    """What `config.json` must say of each quantized Linear so that `install_empty_modules` can rebuild it."""
    return {
        name: QuantizedModule(module.num_outliers, module.weight_bits, module.activation)
        for name, module in quantized_linears(model).items()
    }


def install_empty_modules(model: nn.Module, modules: Mapping[str, QuantizedModule]) -> None:
    """Replace the named float Linears of `model` by empty quantized ones on the meta device.

    Raises:
        ValueError: a name is not a Linear of this model.
    """
    for name, description in modules.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"config.json lists the quantized module {name!r}, but this {type(model).__name__} has no such Linear: "
                "the config belongs to another architecture or size."
            )
        empty = QARVDLinear.empty(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            description=description,
            device="meta",
            dtype=linear.weight.dtype,
        )
        model.set_submodule(name, empty)


def check_keys(model: nn.Module, loaded_keys: list[str], source: str) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of `model`, naming what is missing and what is surplus."""
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
    """Put a stored tensor into its quantized module: bits unchanged, except the bias, which takes the model's dtype.

    Raises:
        ValueError: the stored dtype is not the one of the empty parameter.
    """
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    if parameter_name == "bias":
        stored = stored if dtype is None else stored.to(dtype)
    elif stored.dtype != (expected := getattr(module, parameter_name).dtype):
        raise ValueError(
            f"{name} is stored as {stored.dtype}, expected {expected}: the file was cast or edited. Download or quantize "
            "it again."
        )
    setattr(module, parameter_name, nn.Parameter(stored.to(device), requires_grad=False))


def check_loaded(model: nn.Module, source: str) -> None:
    """Refuse a model with tensors that no file supplied; they would fail at the first forward without a name."""
    absent = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if absent:
        raise ValueError(
            f"{source}: {len(absent)} tensors are missing (first: {absent[0]}). The file is truncated or a shard is "
            "missing; download it again."
        )


def align_float_tensors(model: nn.Module) -> None:
    """Copy float parameters that a file mapping left at odd addresses: the CPU's matrix product rounds differently there.

    Without it a reloaded model would equal the saved one in every stored bit and yet differ in its last output bits.
    """
    for module in model.modules():
        if not isinstance(module, QARVDLinear):
            for parameter in module.parameters(recurse=False):
                if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
                    parameter.data = parameter.data.clone()


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of a model as stored.

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
    """The model itself, where `torch.compile` has put it into a wrapper that shows in the name of every layer."""
    return getattr(model, "_orig_mod", model)


def base_layer_name(model: nn.Module, name: str) -> str:
    """Where the layer called `name` really is: adapters (PEFT) put it into a module of their own, as `base_layer`."""
    return f"{name}.base_layer" if hasattr(unwrapped(model).get_submodule(name), "base_layer") else name
