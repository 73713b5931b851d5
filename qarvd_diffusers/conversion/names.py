"""Translate names of Wan parameters between original files, diffusers and adapters."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")

_TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    # LingBot-World's controls, like the injectors of its blocks
    "patch_embedding_wancamctrl": "control_embedder.proj",
    "c2ws_hidden_states_layer1": "control_embedder.linear_1",
    "c2ws_hidden_states_layer2": "control_embedder.linear_2",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_BLOCK = {
    **{f"self_attn.{old}": f"attn1.{new}" for old, new in _ATTENTION.items()},
    **{f"cross_attn.{old}": f"attn2.{new}" for old, new in _ATTENTION.items()},
    "norm3": "norm2",  # the norm before cross attention; the other two have no parameters
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
    "cam_injector_layer1": "injector.linear_1",
    "cam_injector_layer2": "injector.linear_2",
    "cam_scale_layer": "injector.scale",
    "cam_shift_layer": "injector.shift",
}
# Tensors of a module: those of float layers, and those that `QARVDLinear` stores instead of a weight.
LEAVES = (
    "weight",
    "bias",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "channel_scale",
    "channel_order",
    "input_scale",
    "input_zero_point",
    # 8-bit weights of ComfyUI, in its older and its newer spelling
    "scale_weight",
    "scale_input",
    "comfy_quant",
)
_DIFFUSERS_ONLY = re.compile(r"condition_embedder\.|attn[12]\.to_|proj_out\.|ffn\.net\.")
_ADAPTER = re.compile(r"[._]lora[._]|\.lokr_|\.hada_|\.diff(_[bm])?$")
_OTHER_WAN = {"an image-to-video network": re.compile(r"[kv]_img\.|img_emb\."), "a VACE network": re.compile(r"vace_")}


def without_wrappers(key: str) -> str:
    """Remove the prefixes of training wrappers (FSDP, activation checkpointing, torch.compile) from a key."""
    return _WRAPPERS.sub("", key)


def _rename(key: str, top: Mapping[str, str], block: Mapping[str, str]) -> str | None:
    """Return the new name of `key`, None if no rule matches."""
    match = re.fullmatch(r"(blocks\.\d+\.)(.+)", key)
    prefix, rest, table = (match[1], match[2], block) if match else ("", key, top)
    module, dot, leaf = rest.rpartition(".")
    if dot and leaf in LEAVES:
        return f"{prefix}{table[module]}.{leaf}" if module in table else None
    return f"{prefix}{table[rest]}" if rest in table else None


def _known(name: str) -> str | None:
    return _rename(name, _TOP, _BLOCK)


def original_names(keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Map keys that end in the name of a Wan parameter to their prefix and that name.

    Prefixes of training wrappers belong neither to the prefix nor to the name.
    """
    plain = {key: without_wrappers(key) for key in keys}
    prefixes = {key: split_known(name, _known) for key, name in plain.items()}
    return {key: (prefix, plain[key][len(prefix) :]) for key, prefix in prefixes.items() if prefix is not None}


def to_diffusers_keys(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Rename original keys, with any prefix and training wrappers, to `WanTransformer3DModel` keys.

    Values are passed through: tensors, including those of quantized layers, or stand-ins for them.

    Raises:
        ValueError: for keys that no Wan transformer has, or two keys of the same parameter.
    """
    names = original_names(state_dict)
    if unknown := [key for key in state_dict if key not in names]:
        raise ValueError(_explain_unknown(state_dict, unknown))
    renamed: dict[str, T] = {}
    for key, tensor in state_dict.items():
        name = _known(names[key][1])
        if name in renamed:
            raise ValueError(f"key {key!r} and another key both name the parameter {names[key][1]!r}")
        renamed[name] = tensor
    return renamed


def _explain_unknown(keys: Iterable[str], unknown: list[str]) -> str:
    """Say what a state dict with unknown keys is, and the remedy."""
    if sum(bool(_DIFFUSERS_ONLY.search(key)) for key in keys) > len(unknown) / 2:
        return (
            f"these are diffusers names already (first: {unknown[:3]}), and only original names are converted: save "
            "the file as FOLDER/transformer/diffusion_pytorch_model.safetensors next to its config.json, and load "
            "FOLDER"
        )
    if sum(bool(_ADAPTER.search(key)) for key in unknown) > len(unknown) / 2:
        return (
            f"{len(unknown)} keys do not belong to an original Wan transformer: {unknown[:3]}; this is an adapter: "
            "pass it with lora="
        )
    kind = next((kind for kind, mark in _OTHER_WAN.items() if any(map(mark.search, unknown))), None)
    return f"{len(unknown)} keys do not belong to an original Wan transformer: {unknown[:5]}; " + (
        f"this is {kind}, which is not supported"
        if kind is not None
        else "merge adapters and drop other networks (VAE, text encoder, critic) before converting"
    )


def to_original_keys(state_dict: Mapping[str, T], prefix: str = "model.") -> dict[str, T]:
    """Rename `WanTransformer3DModel` keys to original ones with a prefix; the inverse of `to_diffusers_keys`.

    Raises:
        ValueError: for keys that no Wan transformer has.
    """
    top = {new: old for old, new in _TOP.items()}
    block = {new: old for old, new in _BLOCK.items()}
    names = {key: _rename(key, top, block) for key in state_dict}
    if unknown := [key for key, name in names.items() if name is None]:
        raise ValueError(
            f"{len(unknown)} keys do not belong to a diffusers Wan transformer: {unknown[:5]}; unload or merge "
            "adapters, and leave out other networks, before writing original names"
        )
    return {prefix + name: state_dict[key] for key, name in names.items()}


def _spellings(table: Mapping[str, str]) -> dict[str, str]:
    """Map original and diffusers names of modules, with dots and with underscores, to diffusers names."""
    both = {**{new: new for new in table.values()}, **table}
    return {**{name.replace(".", "_"): new for name, new in both.items()}, **both}


_TOP_SPELLINGS, _BLOCK_SPELLINGS = _spellings(_TOP), _spellings(_BLOCK)
_ADAPTER_PREFIX = re.compile(
    r"((base_model\.model|generator|transformer|diffusion_model|model|module|pipe|dit)\.|"
    r"lora_(unet|transformer)_+|lycoris_)+"
)
_NO_LINEAR = ("patch_embedding", "norm2", "norm_q", "norm_k", "scale_shift_table")


def diffusers_module(name: str) -> str | None:
    """Return the diffusers name of a module or bare parameter that an adapter file calls `name`, None if Wan has none.

    Known spellings are original names and diffusers names with the prefixes of PEFT, ComfyUI, DiffSynth and diffusers,
    and those of kohya, which have underscores instead of dots.
    """
    name = without_wrappers(name)
    name = name[prefix.end() :] if (prefix := _ADAPTER_PREFIX.match(name)) else name
    match = re.fullmatch(r"blocks[._](\d+)[._](.+)", name)
    if match is None:
        return _TOP_SPELLINGS.get(name)
    module = _BLOCK_SPELLINGS.get(match[2])
    return None if module is None else f"blocks.{match[1]}.{module}"


def common_prefix(names: Iterable[str], known: Callable[[str], object | None]) -> str:
    """Return the prefix, up to a dot, before a known name in at least half of `names`; empty if there is none."""
    counts = collections.Counter(split_known(name, known) for name in names)
    prefix, count = max(
        ((prefix, count) for prefix, count in counts.items() if prefix is not None),
        key=lambda item: item[1],
        default=("", 0),
    )
    return prefix if 2 * count >= counts.total() else ""


def split_known(name: str, known: Callable[[str], object | None]) -> str | None:
    """Return the shortest prefix, up to a dot, after which the rest of `name` is known; None if there is none."""
    starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
    return next((name[:start] for start in starts if known(name[start:]) is not None), None)


def is_linear(module: str) -> bool:
    """Tell whether a module (diffusers name) is a Linear, and not a norm, a convolution or a bare parameter."""
    return module.rpartition(".")[2] not in _NO_LINEAR


def weight_name(module: str) -> str:
    """Return the name of the adapted parameter: a module's weight, or the bare parameter itself."""
    return module if module.endswith("scale_shift_table") else f"{module}.weight"
