"""LoRA files: read every common way of naming their tensors, check them against a model, merge them into float weights."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .names import diffusers_module

# down/up (kohya), A/B (PEFT); PEFT puts the adapter's name behind, older diffusers "_layer".
_FACTOR = re.compile(r"(.+?)[._]lora[._](A|B|down|up)(?:\.(?!weight|bias)\w+)?(?:\.(weight|bias))?")
_DOWN = ("A", "down")
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "reshape_weight": "a reshaped weight",
}


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """What one Linear of K input and N output channels gets added: `alpha / rank * up @ down`.

    Attributes:
        down: `[rank, K]`.
        up: `[N, rank]`.
        alpha: None means the rank: no scaling.
        bias: `[N]` or None, added without scaling.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float | None = None
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def delta(self) -> torch.Tensor:
        """The whole addition to the weight, float32 `[N, K]`."""
        return (self.up.float() @ self.down.float()) * self.scale


def read_lora(state_dict: Mapping[str, torch.Tensor], source: str = "the LoRA") -> dict[str, LoraLayer]:
    """Sort a LoRA state dict by module, under diffusers names.

    Args:
        state_dict: original Wan, diffusers, PEFT, kohya or ComfyUI names.
        source: what to call the file in errors.

    Raises:
        ValueError: for another kind of adapter, modules that Wan does not have, half a pair, or factors whose ranks differ.
    """
    parts: dict[str, dict[str, torch.Tensor]] = collections.defaultdict(dict)
    strange = []
    for key, tensor in state_dict.items():
        _refuse_other_kinds(key, source)
        name, part = _split(key)
        module = None if name is None else diffusers_module(name)
        if module is None:
            # Some exporters add differences of norms and biases that are all zero.
            if not (key.endswith((".diff", ".diff_b")) and not tensor.any()):
                strange.append(key)
        elif part in parts[module]:
            raise ValueError(f"{source}: two tensors are the {part!r} of {module}, the second is {key!r}")
        else:
            parts[module][part] = tensor
    if strange:
        raise ValueError(
            f"{source}: {len(strange)} tensors do not belong to a LoRA of this model family (first: {strange[:3]}): it was "
            "made for another architecture (another model, image-to-video, VACE), or is no LoRA"
        )
    layers = {module: _layer(module, found, source) for module, found in parts.items()}
    if not layers:
        raise ValueError(f"{source}: holds no LoRA tensors")
    return layers


def _refuse_other_kinds(key: str, source: str) -> None:
    kind = next((kind for mark, kind in _OTHER_KINDS.items() if mark in key), None)
    if kind is not None:
        raise ValueError(
            f"{source}: {key!r} belongs to {kind}, which is more than a product of two factors and is not supported; export "
            "it as a plain LoRA"
        )


def _split(key: str) -> tuple[str | None, str]:
    """Module as the file calls it, and which part of its LoRA the tensor is."""
    if match := _FACTOR.fullmatch(key):
        part = "down" if match[2] in _DOWN else "up"
        return match[1], part if match[3] != "bias" else f"{part}_bias"
    for ending, part in ((".alpha", "alpha"), (".diff_b", "diff_b")):
        if key.endswith(ending):
            return key.removesuffix(ending), part
    return None, ""


def _layer(module: str, parts: Mapping[str, torch.Tensor], source: str) -> LoraLayer:
    missing = [name for name in ("down", "up") if name not in parts]
    if missing or "down_bias" in parts:
        raise ValueError(
            f"{source}: {module} has {sorted(parts)}, expected the pair of down (A) and up (B): the file is cut or edited"
        )
    down, up = parts["down"], parts["up"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise ValueError(
            f"{source}: the factors of {module} are {tuple(down.shape)} and {tuple(up.shape)}, expected [rank, in] and "
            "[out, rank] of one rank: the file mixes LoRAs of different ranks"
        )
    layer = LoraLayer(down, up, float(parts["alpha"]) if "alpha" in parts else None, parts.get("diff_b"))
    if "up_bias" in parts:  # that of `up` itself: scaled with it
        layer = replace(layer, bias=parts["up_bias"] * layer.scale)
    return layer


def check_fit(lora: Mapping[str, LoraLayer], sizes: Mapping[str, tuple[int, int]], source: str = "the LoRA") -> None:
    """Refuse a LoRA that was made for other layers or another size.

    Args:
        lora: from `read_lora`.
        sizes: `(out, in)` channels of every Linear of the model.
        source: what to call the file in errors.

    Raises:
        ValueError: names the layers and both sizes.
    """
    absent = [module for module in lora if module not in sizes]
    if absent:
        blocks = {int(name.split(".")[1]) for name in sizes if name.startswith("blocks.")}
        raise ValueError(
            f"{source}: adapts {len(absent)} layers that the model does not have (first: {absent[:3]}); the model has "
            f"{len(blocks)} blocks: the LoRA was made for a model of another size"
        )
    wrong = {name: (layer.up.shape[0], layer.down.shape[1]) for name, layer in lora.items()}
    wrong = {name: size for name, size in wrong.items() if size != tuple(sizes[name])}
    if wrong:
        name, size = next(iter(wrong.items()))
        raise ValueError(
            f"{source}: {len(wrong)} layers have another size than the model's (first: {name} is {size} here, "
            f"{tuple(sizes[name])} in the model): the LoRA was made for a model of another size"
        )


def merge_lora(
    weight: torch.Tensor, bias: torch.Tensor | None, layer: LoraLayer, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight `[N, K]` and bias with an adapter added: computed in float32, returned in the given dtypes."""
    merged = (weight.float() + layer.delta() * scale).to(weight.dtype)
    if layer.bias is None:
        return merged, bias
    if bias is None:
        raise ValueError("the LoRA adds a bias to a layer without one: it was made for another model")
    return merged, (bias.float() + layer.bias.float() * scale).to(bias.dtype)


def to_peft(
    lora: Mapping[str, LoraLayer], prefix: str = "transformer."
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict and `LoraConfig` arguments, both with keys behind `prefix`, as diffusers' `load_lora_adapter` takes them.

    Ranks and alphas are told layer by layer, so that nothing is left to be guessed.
    """
    if any(
        layer.bias is not None for layer in lora.values()
    ):  # PEFT knows biases for all layers of an adapter, or none
        lora = {
            name: layer if layer.bias is not None else replace(layer, bias=layer.up.new_zeros(layer.up.shape[0]))
            for name, layer in lora.items()
        }
    tensors = {}
    for name, layer in lora.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = layer.down
        tensors[f"{prefix}{name}.lora_B.weight"] = layer.up
        if layer.bias is not None:
            tensors[f"{prefix}{name}.lora_B.bias"] = layer.bias / layer.scale if layer.scale else layer.bias
    alphas = {name: layer.rank if layer.alpha is None else layer.alpha for name, layer in lora.items()}
    first = next(iter(lora))
    config = {
        "r": lora[first].rank,
        "lora_alpha": alphas[first],
        "rank_pattern": {f"^{name}": layer.rank for name, layer in lora.items() if layer.rank != lora[first].rank},
        "alpha_pattern": {f"^{name}": alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        "target_modules": list(lora),
        "lora_bias": any(layer.bias is not None for layer in lora.values()),
    }
    return tensors, {f"{prefix}{key}": value for key, value in config.items()}
