"""Write the parts of a diffusers folder in the portable layout, except the transformer.

The portable layout names only stock classes, so that plain diffusers loads every component. `pipeline.py` names the
class that runs them together.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from ..files.schema import read_json
from ..schedulers import ChunkUniPCScheduler, FewStepRenoiseScheduler, IntegerRenoiseScheduler
from .network import load_transformer_config

_SCHEDULER = ("diffusers", FlowMatchEulerDiscreteScheduler.__name__)
_TRANSFORMER = ("diffusers", WanTransformer3DModel.__name__)
FEW_STEP_SCHEDULERS = (FewStepRenoiseScheduler, IntegerRenoiseScheduler, ChunkUniPCScheduler)
PORTABLE_CLASSES = {
    "CausalWanTransformer3DModel": _TRANSFORMER,
    "WorldWanTransformer3DModel": ("qarvd_diffusers", "WorldWanTransformer3DModel"),  # there is no stock class for it
    **{kind.__name__: _SCHEDULER for kind in FEW_STEP_SCHEDULERS},
}
"""Class in memory -> library and class that `model_index.json` names."""


def base_config(base: str | Path) -> dict[str, Any]:
    """Read the transformer's config in a diffusers folder.

    Raises:
        ValueError: if there is none.
    """
    path = Path(base) / "transformer" / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: base must be a local diffusers folder of a Wan model")
    return load_transformer_config(path)


def copy_base_components(base: str | Path | None, folder: Path) -> dict[str, list[str | None]]:
    """Copy the components that a causal model shares with its base, and return their `model_index.json` entries.

    Raises:
        ValueError: if the base lacks one of them.
    """
    names = ("vae", "text_encoder", "tokenizer")
    if base is None:
        return {name: [None, None] for name in names}
    index_path = Path(base) / "model_index.json"
    if not index_path.is_file():
        raise ValueError(f"{index_path} is missing: base must be a local diffusers folder of a Wan model")
    index = read_json(index_path)
    for name in names:
        if name not in index or not (Path(base) / name).is_dir():
            raise ValueError(
                f"{base} has no component {name!r}: base must be a complete diffusers folder of a Wan model"
            )
        shutil.copytree(Path(base) / name, folder / name)  # follows links: the Hub cache contains links to blobs
    return {name: index[name] for name in names}


def write_pipeline(folder: Path, config: Mapping[str, Any], components: Mapping[str, list[str | None]]) -> None:
    """Write `model_index.json`, the scheduler and `pipeline.py` of an `ARVDPipeline`.

    Args:
        folder: folder of the pipeline.
        config: values of the pipeline's config, those of its rollout included.
        components: from `copy_base_components`; a transformer of another class than the stock one too.
    """
    index = {
        "_class_name": "ARVDPipeline",
        "_diffusers_version": diffusers.__version__,
        "transformer": _TRANSFORMER,
        **components,
        "scheduler": _SCHEDULER,
        **config,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_portable_parts(folder, "qarvd_diffusers.ARVDPipeline", config["timestep_shift"])


def write_portable_parts(folder: Path, import_path: str, timestep_shift: float | None) -> None:
    """Write `pipeline.py`, and the config of a stock scheduler in place of a few-step scheduler.

    Args:
        folder: folder of the pipeline.
        import_path: dotted name of the pipeline's class.
        timestep_shift: shift of the few-step scheduler; None for another scheduler, which is kept.
    """
    module, _, name = import_path.rpartition(".")
    (folder / "pipeline.py").write_text(f"from {module} import {name}\n", encoding="utf-8")
    if timestep_shift is not None:
        FlowMatchEulerDiscreteScheduler(shift=timestep_shift).save_pretrained(folder / "scheduler")
