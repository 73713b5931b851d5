"""A diffusers folder in the portable layout: what lies around the transformer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from .network import load_transformer_config

PIPELINE_STUB = "from qarvd_diffusers import ARVDPipeline\n"
"""Content of `pipeline.py` beside a saved pipeline, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""


def base_config(base: str | Path) -> dict[str, Any]:
    """The transformer's config in a diffusers folder."""
    path = Path(base) / "transformer" / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: base must be a local diffusers folder of a Wan model")
    return load_transformer_config(path)


def copy_base_components(base: str | Path | None, folder: Path) -> dict[str, list[str | None]]:
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


def write_pipeline(folder: Path, fields: Mapping[str, Any], components: Mapping[str, list[str | None]]) -> None:
    """Write `model_index.json`, the scheduler and the stub.

    Args:
        folder: where to.
        fields: values of the pipeline's config, those of `RolloutConfig` among them.
        components: from `copy_base_components`.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=fields["timestep_shift"])
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "ARVDPipeline",
        "_diffusers_version": diffusers.__version__,
        **components,
        "scheduler": ["diffusers", FlowMatchEulerDiscreteScheduler.__name__],
        "transformer": ["diffusers", WanTransformer3DModel.__name__],
        **fields,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "pipeline.py").write_text(PIPELINE_STUB, encoding="utf-8")
