"""Read a transformer's config or infer it from tensor shapes, and check it against the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from ..files.safetensors import TensorSpec
from ..files.schema import check_mapping, read_json
from ..models import CausalWanTransformer3DModel
from ..models.world import CELL, transformer_class

_HEAD_DIM = 128  # of every released Wan model; cannot be inferred from tensor shapes


def load_transformer_config(path: str | Path) -> dict[str, Any]:
    """Read `WanTransformer3DModel` arguments from a diffusers or an original `config.json`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or lacks an argument; the message names file and entry.
    """
    values = read_json(path)
    if "attention_head_dim" in values:
        return {key: value for key, value in values.items() if not key.startswith("_")}
    names = {
        "freq_dim": "freq_dim",
        "ffn_dim": "ffn_dim",
        "num_heads": "num_attention_heads",
        "num_layers": "num_layers",
        "text_dim": "text_dim",
        "in_dim": "in_channels",
        "out_dim": "out_channels",
        "eps": "eps",
    }
    kinds = dict.fromkeys((*names, "dim"), int) | {"eps": float, "patch_size": tuple[int, ...]}
    values = check_mapping(values, kinds, path, optional=("patch_size",), extra=True)
    if values["num_heads"] < 1:
        raise ValueError(f"{path}: num_heads is {values['num_heads']}, expected at least 1")
    config = {new: values[old] for old, new in names.items()}
    patch_size = values.get("patch_size", (1, 2, 2))
    return {**config, "attention_head_dim": values["dim"] // values["num_heads"], "patch_size": patch_size}


def infer_config(
    state_dict: Mapping[str, torch.Tensor | TensorSpec], num_attention_heads: int | None = None
) -> dict[str, Any]:
    """Infer `WanTransformer3DModel` arguments from the shapes of a state dict.

    Args:
        state_dict: tensors or their specs, under diffusers keys.
        num_attention_heads: number of heads; None assumes heads of 128, as in every released Wan model.

    Raises:
        ValueError: if a required tensor is missing, or the width is not a multiple of the heads.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in state_dict:
            raise ValueError(f"the checkpoint lacks {key!r}: it is incomplete, or not a Wan transformer")
        return state_dict[key].shape

    dim, in_channels, *patch_size = shape("patch_embedding.weight")
    if num_attention_heads is None and dim % _HEAD_DIM:
        raise ValueError(
            f"width {dim} is not a multiple of head size {_HEAD_DIM}: pass num_attention_heads, or a base folder"
        )
    heads = num_attention_heads or dim // _HEAD_DIM
    if dim % heads:
        raise ValueError(f"num_attention_heads is {heads}, which does not divide the width {dim}")
    blocks = {int(key.split(".")[1]) for key in state_dict if key.startswith("blocks.")}
    return {
        "patch_size": tuple(patch_size),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": in_channels,
        "out_channels": shape("proj_out.weight")[0] // torch.Size(patch_size).numel(),
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "num_layers": max(blocks) + 1,
        "cross_attn_norm": "blocks.0.norm2.weight" in state_dict,
        **control_config(state_dict),
    }


def has_controls(state_dict: Mapping[str, torch.Tensor | TensorSpec]) -> bool:
    """Tell whether a state dict under diffusers keys has layers for controls."""
    return "control_embedder.proj.weight" in state_dict


def control_config(state_dict: Mapping[str, torch.Tensor | TensorSpec]) -> dict[str, int]:
    """Return the arguments by which a transformer with controls differs from its base; empty if it has none."""
    if not has_controls(state_dict):
        return {}
    in_channels, *patch_size = state_dict["patch_embedding.weight"].shape[1:]
    values = state_dict["control_embedder.proj.weight"].shape[1]
    return {"in_channels": in_channels, "control_dim": values // (CELL * CELL * torch.Size(patch_size).numel())}


def empty_transformer(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> CausalWanTransformer3DModel:
    """Build a transformer on the meta device and check that its tensors are exactly those of `specs` (diffusers keys).

    Raises:
        ValueError: for missing or unexpected keys and wrong shapes; the message names them.
    """
    with init_empty_weights():
        model = transformer_class(config).from_config(dict(config))
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing, unexpected = sorted(expected.keys() - specs.keys()), sorted(specs.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint does not fit its config: missing {missing[:5]} ({len(missing)} in all), "
            f"unexpected {unexpected[:5]} ({len(unexpected)} in all)"
        )
    wrong = [f"{k}: {specs[k].shape}, expected {shape}" for k, shape in expected.items() if specs[k].shape != shape]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors have a wrong shape: {wrong[:5]}; check num_attention_heads and the base"
        )
    return model
