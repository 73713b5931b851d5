"""Turn a LoRA into the state dict and the `LoraConfig` arguments that PEFT takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .lora import DIFFERENCES, LoraLayer
from .names import is_linear, weight_name


def to_peft(lora: Mapping[str, LoraLayer], prefix: str = "transformer.") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a state dict and `LoraConfig` arguments for diffusers' `load_lora_adapter`, all keys with a prefix.

    Ranks and alphas are listed per layer, so PEFT infers nothing. Differences of parameters that PEFT has no layer for
    follow `DIFFERENCES` in the key, under the name of the parameter.
    """
    pairs = {name: _one_pair(layer) for name, layer in lora.items() if is_linear(name)}
    pairs = _all_or_no_biases({name: layer for name, layer in pairs.items() if layer.down is not None})
    tensors = {}
    for name, layer in pairs.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = layer.down
        tensors[f"{prefix}{name}.lora_B.weight"] = layer.up
        if layer.bias is not None:
            tensors[f"{prefix}{name}.lora_B.bias"] = layer.bias / layer.scale if layer.scale else layer.bias
    for name, layer in lora.items():
        if name not in pairs:
            added = {weight_name(name): layer.delta(), f"{name}.bias": layer.bias}
            tensors |= {f"{prefix}{DIFFERENCES}.{key}": tensor for key, tensor in added.items() if tensor is not None}
    return tensors, {f"{prefix}{key}": value for key, value in _peft_config(pairs).items()}


def _peft_config(pairs: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """Return the `LoraConfig` arguments of some pairs."""
    alphas = {name: layer.rank if layer.alpha is None else layer.alpha for name, layer in pairs.items()}
    rank, alpha = next(((layer.rank, alphas[name]) for name, layer in pairs.items()), (1, 1))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": layer.rank for name, layer in pairs.items() if layer.rank != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": list(pairs),
        "lora_bias": any(layer.bias is not None for layer in pairs.values()),
    }


def _all_or_no_biases(pairs: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """Add zero biases if some layers have a bias: in PEFT, all layers of an adapter have one, or none has."""
    if all(layer.bias is None for layer in pairs.values()):
        return dict(pairs)
    return {
        name: layer if layer.bias is not None else replace(layer, bias=layer.up.new_zeros(layer.up.shape[0]))
        for name, layer in pairs.items()
    }


def _one_pair(layer: LoraLayer) -> LoraLayer:
    """Write the difference as two more factors, one of which is the identity: exact, at full rank."""
    if layer.diff is None:
        return layer
    diff = layer.diff.flatten(1)
    diff = diff.float() if layer.down is not None or diff.dtype.itemsize == 1 else diff
    identity = torch.eye(min(diff.shape), dtype=diff.dtype, device=diff.device)
    down, up = (diff, identity) if diff.shape[0] < diff.shape[1] else (identity, diff)
    if layer.down is not None:
        down, up = torch.cat([layer.down.float(), down]), torch.cat([layer.up.float() * layer.scale, up], dim=1)
    return replace(layer, down=down, up=up, alpha=None, diff=None)


def with_bias_pairs(
    pairs: dict[str, Tensor],
    metadata: dict[str, Any],
    biases: Mapping[str, Tensor],
    linears: Mapping[str, tuple[int, int]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Add a pair of zeros for every layer of which the adapter changes only the bias.

    An adapter without any pair gets one as well, because PEFT registers an adapter in its layers.

    Args:
        pairs: tensors from `to_peft`, without differences.
        metadata: `LoraConfig` arguments from `to_peft`.
        biases: `[out]` by name, of layers.
        linears: `(out, in)` of every layer.

    Returns:
        Pairs and metadata, completed.
    """
    prefix = "transformer."
    added = [key.removesuffix(".bias") for key in biases] or ([] if pairs else [next(iter(linears))])
    if not added:
        return pairs, metadata
    some = next(iter([*biases.values(), *pairs.values()]), torch.zeros(()))
    for name in added:
        rows, columns = linears[name]
        pairs[f"{prefix}{name}.lora_A.weight"] = some.new_zeros(1, columns)
        pairs[f"{prefix}{name}.lora_B.weight"] = some.new_zeros(rows, 1)
        for pattern in ("rank_pattern", "alpha_pattern"):
            metadata[f"{prefix}{pattern}"] = {**metadata.get(f"{prefix}{pattern}", {}), f"^{name}": 1}
    metadata[f"{prefix}target_modules"] = [*metadata.get(f"{prefix}target_modules", ()), *added]
    if biases:
        metadata[f"{prefix}lora_bias"] = True
        for key in [key for key in pairs if key.endswith(".lora_B.weight")]:
            module = key.removesuffix(".lora_B.weight")
            zero = pairs[key].new_zeros(pairs[key].shape[0])
            pairs.setdefault(f"{module}.lora_B.bias", biases.get(f"{module.removeprefix(prefix)}.bias", zero))
    return pairs, metadata
