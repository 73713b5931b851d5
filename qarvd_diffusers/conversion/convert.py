"""Original checkpoints of causal Wan models <-> diffusers folders, exact in both directions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from ..models import FAMILY_FIELDS, CausalFields, CausalWanTransformer3DModel
from ..serialization import atomic_directory, atomic_file
from .checkpoint import load_checkpoint
from .names import to_diffusers_keys, to_original_keys

PIPELINE_STUB = "from qarvd_diffusers import ARVDPipeline\n"
"""Content of `pipeline.py` beside a saved pipeline, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

_HEAD_DIM = 128  # of every released Wan model; the one value that tensor shapes do not tell


def load_transformer_config(path: str | Path) -> dict[str, Any]:
    """Config of a transformer as `WanTransformer3DModel` arguments, from a diffusers or an original `config.json`."""
    values = json.loads(Path(path).read_text(encoding="utf-8"))
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
    config = {new: values[old] for old, new in names.items()}
    patch_size = tuple(values.get("patch_size", (1, 2, 2)))
    return {**config, "attention_head_dim": values["dim"] // values["num_heads"], "patch_size": patch_size}


def infer_config(state_dict: Mapping[str, torch.Tensor], num_attention_heads: int | None = None) -> dict[str, Any]:
    """`WanTransformer3DModel` arguments from the shapes of its state dict (diffusers keys).

    Args:
        state_dict: tensors under diffusers keys.
        num_attention_heads: heads; None assumes the head size of every released Wan model, 128.

    Raises:
        ValueError: if a telling tensor is missing or the width does not divide into heads.
    """

    def shape(key: str) -> torch.Size:
        if key not in state_dict:
            raise ValueError(f"the checkpoint lacks {key!r}: it is incomplete, or no Wan transformer")
        return state_dict[key].shape

    dim, in_channels, *patch_size = shape("patch_embedding.weight")
    if num_attention_heads is None and dim % _HEAD_DIM:
        raise ValueError(
            f"width {dim} is no multiple of head size {_HEAD_DIM}: pass num_attention_heads, or a base folder"
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
    }


def build_transformer(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any], dtype: torch.dtype | None = None
) -> CausalWanTransformer3DModel:
    """A transformer of `config` holding the tensors of `state_dict` (diffusers keys), cast to `dtype` if given.

    Raises:
        ValueError: for missing or unexpected keys and for wrong shapes, named.
    """
    with init_empty_weights():
        model = CausalWanTransformer3DModel.from_config(dict(config))
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing, unexpected = sorted(expected.keys() - state_dict.keys()), sorted(state_dict.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint does not fit its config: missing {missing[:5]} ({len(missing)} in all), "
            f"unexpected {unexpected[:5]} ({len(unexpected)} in all)"
        )
    wrong = [
        f"{k}: {tuple(state_dict[k].shape)}, expected {s}" for k, s in expected.items() if state_dict[k].shape != s
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors have a wrong shape: {wrong[:5]}; check num_attention_heads and the base"
        )
    model.load_state_dict({k: v.to(dtype) for k, v in state_dict.items()}, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def convert_checkpoint(
    src: str | Path,
    out_dir: str | Path,
    family: str = "self-forcing",
    *,
    base: str | Path | None = None,
    weights: str | None = None,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write an original checkpoint as a diffusers folder in the portable layout (stock class names only).

    Args:
        src: original checkpoint, see `load_checkpoint`.
        out_dir: folder to create; must not exist yet. It appears only when complete.
        family: key of `FAMILY_FIELDS`; decides how the model rolls out.
        base: local diffusers folder of the bidirectional model, which lends VAE, text encoder, tokenizer and the
            transformer config; None writes the transformer and scheduler alone.
        weights: see `load_checkpoint`.
        num_attention_heads: see `infer_config`; not needed with `base`.
        dtype: cast the weights; None keeps them as stored.

    Returns:
        `out_dir`.

    Raises:
        ValueError: for an unknown family, a checkpoint that does not fit, or a base folder without a needed component.
        FileExistsError: if `out_dir` exists.
    """
    out_dir = Path(out_dir)
    if family not in FAMILY_FIELDS:
        raise ValueError(f"family is {family!r}, expected one of {', '.join(FAMILY_FIELDS)}")
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists; give a new folder or remove it first")
    state_dict = to_diffusers_keys(load_checkpoint(src, weights))
    config = _base_config(base) if base is not None else infer_config(state_dict, num_attention_heads)
    transformer = build_transformer(state_dict, config, dtype)
    with atomic_directory(out_dir) as folder:
        transformer.save_pretrained(folder / "transformer")
        _write_pipeline(folder, FAMILY_FIELDS[family], _copy_base_components(base, folder))
    return out_dir


def export_checkpoint(folder: str | Path, out: str | Path) -> Path:
    """Write the float transformer of a diffusers folder as one safetensors file under original names (`model.` prefix).

    Raises:
        ValueError: the folder has no transformer, or a quantized one, or `out` does not end in `.safetensors`.
    """
    folder, out = Path(folder), Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: expected a file name that ends in .safetensors")
    config, shards = folder / "transformer" / "config.json", sorted((folder / "transformer").glob("*.safetensors"))
    if not config.is_file() or not shards:
        raise ValueError(
            f"{config.parent} has no config.json or no safetensors: expected a diffusers folder of a Wan model"
        )
    if json.loads(config.read_text(encoding="utf-8")).get("quantization_config") is not None:
        raise ValueError(f"{folder} is quantized: the original layout holds float weights; export the float model")
    original = to_original_keys({key: tensor for shard in shards for key, tensor in load_file(shard).items()})
    with atomic_file(out) as temporary:
        save_file(original, temporary)
    return out


def _base_config(base: str | Path) -> dict[str, Any]:
    path = Path(base) / "transformer" / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: base must be a local diffusers folder of a Wan model")
    return load_transformer_config(path)


def _copy_base_components(base: str | Path | None, folder: Path) -> dict[str, list[str | None]]:
    """Copy what a causal model shares with its base; return their `model_index.json` entries."""
    names = ("vae", "text_encoder", "tokenizer")
    if base is None:
        return {name: [None, None] for name in names}
    index_path = Path(base) / "model_index.json"
    if not index_path.is_file():
        raise ValueError(f"{index_path} is missing: base must be a local diffusers folder of a Wan model")
    index = json.loads(index_path.read_text(encoding="utf-8"))
    for name in names:
        if name not in index or not (Path(base) / name).is_dir():
            raise ValueError(
                f"{base} has no component {name!r}: base must be a complete diffusers folder of a Wan model"
            )
        shutil.copytree(Path(base) / name, folder / name)  # follows links: a hub cache holds links to blobs
    return {name: index[name] for name in names}


def _write_pipeline(folder: Path, fields: CausalFields, components: Mapping[str, list[str | None]]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=fields.timestep_shift)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "ARVDPipeline",
        "_diffusers_version": diffusers.__version__,
        **components,
        "scheduler": ["diffusers", FlowMatchEulerDiscreteScheduler.__name__],
        "transformer": ["diffusers", WanTransformer3DModel.__name__],
        **fields.to_dict(),
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "pipeline.py").write_text(PIPELINE_STUB, encoding="utf-8")
