"""Read LoRA files in every common naming, check them against a model, and merge them into float weights."""

from __future__ import annotations

import collections
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .names import common_prefix, diffusers_module, is_linear

logger = logging.getLogger(__name__)

DIFFERENCES = "lora_differences"
"""Prefix of a parameter's name in `peft.to_peft`, if the tensor is a difference that is added to it."""

# down/up (kohya), A/B (PEFT); PEFT appends the adapter's name, older diffusers "_layer".
_FACTOR = re.compile(r"(.+?)[._]lora[._](A|B|down|up)(?:\.(?!weight|bias)\w+)?(?:\.(weight|bias))?")
_DIFFERENCE = re.compile(rf"(?:.+\.)?{DIFFERENCES}\.(.+?)(?:\.lora_difference)?")
_DOWN = ("A", "down")
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "lora_mid": "LoCon with a middle factor",
    "reshape_weight": "a reshaped weight",
    "set_weight": "a replaced weight",
}
_ENDINGS = {".alpha": "alpha", ".diff": "diff", ".diff_b": "diff_b", ".diff_m": "diff_m"}
_TEXT_ENCODER = re.compile(r"lora_te\d*_.*|(.*[._])?(text_encoders?|text_model|cond_stage_model|te\d?)[._].*")
_LARGEST_ALPHA = 1e6
_LARGEST_LEFT_OUT = 0.01  # relative to what is applied; with more left out, it would be another adapter
_IMAGE = re.compile(r"[kv]_img|img_emb|image_embedder|add_[kv]_proj")


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """Hold what is added to a module: `alpha / rank * up @ down`, and differences of weight and bias.

    Attributes:
        down: `[rank, K]` with K inputs (in a convolution, those of a whole kernel), None without factors.
        up: `[N, rank]`, None without factors.
        alpha: None means the rank, which is no scaling.
        bias: `[N]` or None, added without scaling.
        diff: shape of the weight, or None; added without scaling.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None
    bias: Tensor | None = None
    diff: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of columns of `up`, 0 without factors."""
        return 0 if self.down is None else self.down.shape[0]

    @property
    def scale(self) -> float:
        """Factor of `up @ down`."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank

    def delta(self) -> Tensor | None:
        """Return the total addition to the weight, float32 `[N, K]` or shaped like `diff`; None if there is none."""
        if self.down is None:
            return None if self.diff is None else self.diff.float()
        product = (self.up.float() @ self.down.float()) * self.scale
        return product if self.diff is None else self.diff.float() + product.reshape(self.diff.shape)

    def size(self) -> float:
        """Return the sum of the Frobenius norms of all additions, without computing the product of the factors."""
        norms = [tensor.float().norm().item() for tensor in (self.diff, self.bias) if tensor is not None]
        if self.down is not None:
            up, down = self.up.float(), self.down.float()
            norms.append(abs(self.scale) * ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt().item())
        return sum(norms)


def read_lora(state_dict: Mapping[str, Tensor], source: str = "the LoRA") -> dict[str, LoraLayer]:
    """Sort a LoRA state dict by module or bare parameter, under diffusers names.

    Tensors of a text encoder, and others that Wan has no module for, are left out with one warning that states their
    number and size.

    Args:
        state_dict: original Wan, diffusers, PEFT, kohya or ComfyUI names: pairs of factors, `.alpha`, and differences
            of weights, biases and modulation (`.diff`, `.diff_b`, `.diff_m`).
        source: name of the file in errors.

    Raises:
        ValueError: for another kind of adapter, half a pair, factors of different ranks, values that are not finite,
            or a file of which more than a small part does not belong to Wan's modules.
    """
    find = _module_finder(state_dict)
    parts: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
    strange: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
    for key, tensor in state_dict.items():
        if _TEXT_ENCODER.fullmatch(key):
            strange[key][""] = tensor
            continue
        _check_tensor(key, tensor, source)
        name, part = _split(key)
        module = None if name is None else find(name)
        if module is None:
            strange[name or key][part] = tensor
        elif part in parts[module]:
            raise ValueError(f"{source}: two tensors are the {part!r} of {module}, the second is {key!r}")
        else:
            parts[module][part] = tensor
    layers = {module: _layer(module, found, source) for module, found in parts.items()}
    if not layers and not strange:
        raise ValueError(f"{source}: holds no LoRA tensors")
    if strange:
        _leave_out(strange, layers, source)
    return layers


def _module_finder(keys: Mapping[str, Any]) -> Callable[[str], str | None]:
    """Return `diffusers_module`; if it knows none of the names, a version that first removes their common prefix."""
    names = {_split(key)[0] for key in keys if not _TEXT_ENCODER.fullmatch(key)} - {None}
    if any(diffusers_module(name) for name in names):
        return diffusers_module
    prefix = common_prefix(names, diffusers_module)
    return lambda name: diffusers_module(name.removeprefix(prefix))


def _check_tensor(key: str, tensor: Tensor, source: str) -> None:
    kind = next((kind for mark, kind in _OTHER_KINDS.items() if mark in key), None)
    if kind is not None:
        raise ValueError(
            f"{source}: {key!r} belongs to {kind}, which is more than a product of two factors and is not supported; "
            "export it as a plain LoRA"
        )
    if not (tensor.is_floating_point() or key.endswith(".alpha")):
        raise ValueError(f"{source}: {key!r} is {tensor.dtype}, expected floats: the file is damaged")
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise ValueError(f"{source}: {key!r} holds NaN or infinity: the file is damaged, or its training diverged")


def _split(key: str) -> tuple[str | None, str]:
    """Return a tensor's module, by its name in the file, and which part of the LoRA the tensor is."""
    if match := _DIFFERENCE.fullmatch(key):
        module, dot, leaf = match[1].rpartition(".")
        return (module, "diff_b" if leaf == "bias" else "diff") if leaf in ("weight", "bias") else (match[1], "diff")
    if match := _FACTOR.fullmatch(key):
        part = "down" if match[2] in _DOWN else "up"
        return match[1], part if match[3] != "bias" else f"{part}_bias"
    name, dot, ending = key.rpartition(".")
    part = _ENDINGS.get(dot + ending)
    if part == "diff_m":  # of the modulation, which is a parameter and not a module
        return f"{name}.modulation", "diff"
    return (None, "") if part is None else (name, part)


def _alpha(tensor: Tensor, where: str) -> float:
    """Read the one number of an alpha; raise ValueError for anything else, and for one beyond all use."""
    if tensor.numel() != 1 or tensor.is_complex() or abs(alpha := float(tensor)) > _LARGEST_ALPHA:
        raise ValueError(f"{where} is {tensor.flatten()[:3].tolist()}, expected one number: the file is damaged")
    return alpha


def _layer(module: str, parts: Mapping[str, Tensor], source: str) -> LoraLayer:
    factors = [name for name in ("down", "up") if name in parts]
    if len(factors) == 1 or "down_bias" in parts or (not factors and not {"diff", "diff_b"} & parts.keys()):
        raise ValueError(
            f"{source}: {module} has {sorted(parts)}, expected the pair of down (A) and up (B), or a difference: the "
            "file is truncated or edited"
        )
    # Some exporters add hundreds of zero differences; without them, nothing needs to be added.
    nonzero = {name: parts[name] for name in ("diff", "diff_b") if name in parts and bool(parts[name].float().any())}
    layer = LoraLayer(bias=nonzero.get("diff_b"), diff=nonzero.get("diff"))
    if layer.diff is not None and is_linear(module) and layer.diff.ndim < 2:
        raise ValueError(f"{source}: the difference of {module} is {tuple(layer.diff.shape)}, expected [out, in]")
    if factors:
        down, up = parts["down"], parts["up"]
        if not _is_pair(down, up):
            raise ValueError(
                f"{source}: the factors of {module} are {tuple(down.shape)} and {tuple(up.shape)}, expected [rank, "
                "in] and [out, rank]: the two have different ranks"
            )
        alpha = _alpha(parts["alpha"], f"{source}: the alpha of {module}") if "alpha" in parts else None
        layer = replace(layer, down=down.flatten(1), up=up.flatten(1), alpha=alpha)
    if "up_bias" in parts:  # scaled as `up` is
        bias = parts["up_bias"] * layer.scale
        layer = replace(layer, bias=bias if layer.bias is None else bias + layer.bias)
    return layer


def _is_pair(down: Tensor | None, up: Tensor | None) -> bool:
    """Tell whether two factors, of a Linear or a convolution, have the same rank."""
    matrices = down is not None and up is not None and min(down.ndim, up.ndim) > 1
    return matrices and down.shape[0] == math.prod(up.shape[1:])


def _leave_out(strange: Mapping[str, Mapping[str, Tensor]], layers: Mapping[str, LoraLayer], source: str) -> None:
    """Warn about tensors that a Wan model has no module for; raise ValueError if they are not small."""
    text = [name for name in strange if _TEXT_ENCODER.fullmatch(name)]
    other = {name: parts for name, parts in strange.items() if name not in set(text)}
    count = sum(len(parts) for parts in other.values())
    first = [f"{name} ({', '.join(sorted(parts))})".removesuffix(" ()") for name, parts in other.items()][:3]
    if not layers:
        raise ValueError(
            f"{source}: none of its {count + len(text)} tensors belongs to a LoRA of this model family (first: "
            f"{first or text[:3]}): it was made for another architecture, or is not a LoRA"
        )
    size, applied = math.hypot(*map(_size, other.values())), math.hypot(*(layer.size() for layer in layers.values()))
    if size > _LARGEST_LEFT_OUT * applied:
        kind = "an image-to-video" if any(map(_IMAGE.search, other)) else "another kind of"
        raise ValueError(
            f"{source}: {count} tensors of size {size:.3g} belong to modules that this model family does not have "
            f"(first: {first}), and {len(layers)} of size {applied:.3g} to modules that it has: the LoRA was made for "
            f"{kind} model, and would not work here"
        )
    groups = [f"{len(text)} of a text encoder, which is not adapted here"] if text else []
    groups += (
        [f"{count} of modules that the model does not have (first: {first}), of size {size:.3g}"] if other else []
    )
    logger.warning(
        "%s: %d tensors are left out: %s. What is applied has size %.3g (Frobenius norm).",
        source,
        count + len(text),
        " and ".join(groups),
        applied,
    )


def _size(parts: Mapping[str, Tensor]) -> float:
    """Return the size of any tensors as `LoraLayer.size` does; two matching factors count as a pair."""
    if _is_pair(parts.get("down"), parts.get("up")):
        return _layer("", {name: tensor for name, tensor in parts.items() if name != "down_bias"}, "").size()
    return math.hypot(*(tensor.float().norm().item() for name, tensor in parts.items() if name != "alpha"))


def check_fit(lora: Mapping[str, LoraLayer], sizes: Mapping[str, tuple[int, ...]], source: str = "the LoRA") -> None:
    """Check that a LoRA was made for the layers and sizes of a model.

    Args:
        lora: from `read_lora`.
        sizes: shape of every weight by the name of its module (`(out, in)` of a Linear), of other parameters by their
            own.
        source: name of the file in errors.

    Raises:
        ValueError: if not; the message names the layers and both sizes.
    """
    weights = {module: layer for module, layer in lora.items() if layer.down is not None or layer.diff is not None}
    biases = {f"{module}.bias": layer.bias for module, layer in lora.items() if layer.bias is not None}
    absent = [name for name in (*weights, *biases) if name not in sizes]
    if absent:
        blocks = {int(name.split(".")[1]) for name in sizes if name.startswith("blocks.")}
        raise ValueError(
            f"{source}: adapts {len(absent)} layers that the model does not have (first: {absent[:3]}); the model has "
            f"{len(blocks)} blocks: the LoRA was made for a model of another size"
        )
    wrong = {}
    for name, layer in weights.items():
        shape = tuple(sizes[name])
        if layer.down is not None and (size := (layer.up.shape[0], layer.down.shape[1])) != _matrix(shape):
            wrong[name] = size
        if layer.diff is not None and _matrix(layer.diff.shape) != _matrix(shape):
            wrong[name] = tuple(layer.diff.shape)
    wrong |= {name: tuple(bias.shape) for name, bias in biases.items() if tuple(bias.shape) != tuple(sizes[name])}
    if wrong:
        name, size = next(iter(wrong.items()))
        raise ValueError(
            f"{source}: {len(wrong)} layers have another size than the model's (first: {name} is {size} here, "
            f"{tuple(sizes[name])} in the model): the LoRA was made for a model of another size"
        )


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Remove leading ones from a shape and flatten all but the first dimension, in which files differ."""
    shape = tuple(shape)
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def merge_lora(
    weight: Tensor, bias: Tensor | None, layer: LoraLayer, scale: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Add an adapter to a weight (`[N, K]` or any shape) and a bias, in float32; dtypes are kept.

    Raises:
        ValueError: if the adapter has a bias and the layer has none.
    """
    delta = layer.delta()
    merged = weight if delta is None else (weight.float() + delta.reshape(weight.shape) * scale).to(weight.dtype)
    if layer.bias is None:
        return merged, bias
    if bias is None:
        raise ValueError("the LoRA adds a bias to a layer without one: it was made for another model")
    return merged, (bias.float() + layer.bias.float() * scale).to(bias.dtype)
