"""Load pipelines."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import comfy.model_management as management
import torch
from comfy_api.latest import io

from .. import folders
from ..compat import FAMILY, NodeError, output, schema, widget, work
from ..handles import PipelineHandle, PipelineType
from ..library import library
from ..report import describe

logger = logging.getLogger(__name__)

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AS_SAVED, NO_BASE = "as saved", "none"
SOURCE = "source.json"  # next to a converted folder: what it was converted from


def _load(path: Path, name: str, dtype: str, rollout: str = AS_SAVED, base: str = NO_BASE) -> io.NodeOutput:
    """Load a folder or file; `base` names the folder that completes a single file."""
    if dtype not in DTYPES:
        raise NodeError(f"dtype is {dtype!r}.", f"Choose one of {', '.join(DTYPES)}.")
    on_cpu = management.get_torch_device().type == "cpu"
    options = {"dtype": DTYPES[dtype] or (torch.float32 if on_cpu else torch.bfloat16)}
    lender = None if base == NO_BASE else folders.find_model(base)
    try:
        if rollout != AS_SAVED:
            options |= library("conversion.families").find_family(rollout).fields.to_dict()
        if path.is_file() and not _is_ours(path):
            path = _converted(path, rollout, lender)
        pipeline = library().ARVDPipeline
        if path.is_dir():
            pipe = pipeline.from_pretrained(str(path), **options)
        else:
            pipe = pipeline.from_single_file(path, base=lender, **options)
    except (OSError, ValueError) as error:
        raise NodeError(
            f"{name} cannot be loaded: {' '.join(str(error).split())}",
            f"Check {path}: copy or save the model again, or choose another rollout or base.",
        ) from error
    handle = PipelineHandle(pipe, name)
    return io.NodeOutput(handle, describe(handle))


def _is_ours(path: Path) -> bool:
    """Tell whether a file holds its config; an original checkpoint does not."""
    return path.suffix == ".safetensors" and library("models.single_file_header").read_single_file(path) is not None


def _converted(path: Path, rollout: str, base: Path | None) -> Path:
    """Return the diffusers folder of an original checkpoint, converted once for each content, rollout and base.

    Each conversion first removes the folders whose checkpoint or base has changed or no longer exists.
    """
    source = {"path": str(path), "rollout": rollout, "base": None if base is None else str(base)}
    home = folders.converted_folder() / _key(source)
    if not (folder := home / path.stem).exists():
        logger.info("Q-ARVD converts %s to %s", path, folder)
        _remove_outdated()
        home.mkdir(parents=True, exist_ok=True)
        (home / SOURCE).write_text(json.dumps(source), encoding="utf-8")
        library().convert_checkpoint(path, folder, "auto" if rollout == AS_SAVED else rollout, base=base)
    return folder


def _key(source: dict[str, str | None]) -> str:
    """Name the folder that `source` is converted to; the name depends on all files that the conversion reads."""
    path, base = Path(source["path"]), source["base"]
    read = [path, *sorted(path.parent.glob("lora.*")), *([] if base is None else [Path(base)])]
    facts = [library().__version__, source, [folders.stamp(file) for file in read]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _remove_outdated() -> None:
    """Remove converted folders whose checkpoint or base has changed."""
    for note in folders.converted_folder().glob(f"*/{SOURCE}"):
        try:
            current = _key(json.loads(note.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            current = None
        if current != note.parent.name:
            shutil.rmtree(note.parent, ignore_errors=True)  # Windows keeps files that are still loaded


def _presets() -> list[str]:
    """List the members of the family."""
    try:
        return library("conversion.families").available()
    except NodeError:  # the nodes are listed nevertheless; they report the missing library when they run
        return []


class QARVDLoadPipeline(io.ComfyNode):
    """Load a float or quantized pipeline from a diffusers folder or a single file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        models, files = folders.scan()
        return schema(
            node_id="QARVDLoadPipeline",
            display_name="Q-ARVD Load Pipeline",
            description="Loads an autoregressive Wan model (Self-Forcing family) from a diffusers folder or a single "
            "file in models/qarvd or models/diffusers, or the bundled model.",
            search_aliases=[*FAMILY, "causal wan", "autoregressive video", "load streaming model"],
            inputs=[
                widget(
                    io.Combo,
                    "model",
                    options=[folders.BUNDLED, *models, *files],
                    default=folders.BUNDLED,
                    tooltip="A diffusers folder with model_index.json in models/qarvd, models/diffusers or "
                    "output/qarvd, or a single file there: one that Q-ARVD wrote, or an original checkpoint, which is "
                    "converted once.",
                ),
                widget(
                    io.Combo,
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    advanced=True,
                    optional=True,
                    tooltip="Type of weights and activations. auto: bfloat16 on a GPU, float32 on the CPU.",
                ),
                widget(
                    io.Combo,
                    "rollout",
                    options=[AS_SAVED, *_presets()],
                    default=AS_SAVED,
                    advanced=True,
                    optional=True,
                    tooltip="How the model rolls out (chunk size, steps, window, positions): as saved, or like a "
                    "member of the family. For an original checkpoint: which member of the family it is.",
                ),
                widget(
                    io.Combo,
                    "base",
                    options=[NO_BASE, *models],
                    default=NO_BASE,
                    advanced=True,
                    optional=True,
                    tooltip="For a single file: the folder that provides VAE, text encoder and tokenizer.",
                ),
            ],
            outputs=[
                output(PipelineType, "pipeline", "The loaded pipeline."),
                output(io.String, "info", "Scheme, size and rollout of the pipeline."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str = "", base: str = NO_BASE, **kwargs: Any) -> str:
        """Return text that changes when the files of the model or its base change."""
        models, files = folders.scan()
        found = models | files
        return "|".join(folders.stamp(found[name]) for name in (model, base) if name in found)

    @classmethod
    @work
    def execute(cls, model: str, dtype: str = "auto", rollout: str = AS_SAVED, base: str = NO_BASE) -> io.NodeOutput:
        """Return the pipeline and its description."""
        if model == folders.BUNDLED:
            return _load(Path(library().bundled_model_path()), "tiny-arvd", dtype, rollout)
        return _load(folders.find_model(model), model, dtype, rollout, base)


class QARVDLoadQuantized(io.ComfyNode):
    """Load a quantized pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        quantized = [name for name, folder in folders.scan()[0].items() if folders.is_quantized(folder)]
        return schema(
            node_id="QARVDLoadQuantized",
            display_name="Q-ARVD Load Quantized",
            description="Loads a model saved by Q-ARVD Save Quantized or by qarvd quantize. Weights stay packed as on "
            "disk.",
            search_aliases=[*FAMILY, "w4a8", "w8a8", "int4", "int8", "load quantized video model"],
            inputs=[
                widget(
                    io.Combo,
                    "checkpoint",
                    options=quantized,
                    tooltip="A quantized model in output/qarvd, models/qarvd or models/diffusers.",
                ),
                widget(
                    io.Combo,
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    advanced=True,
                    optional=True,
                    tooltip="Type of what is not quantized. auto: bfloat16 on a GPU, float32 on the CPU.",
                ),
            ],
            outputs=[
                output(PipelineType, "pipeline", "The loaded pipeline."),
                output(io.String, "info", "Scheme, size and rollout of the pipeline."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None = None) -> bool | str:
        """Check the checkpoint before the graph runs."""
        # In place of ComfyUI's "value not in list", which does not say what to do. None: missing, which ComfyUI
        # reports, or connected and not known yet.
        try:
            if checkpoint is not None:
                cls._find(checkpoint)
        except NodeError as error:
            return error.line
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str = "", **kwargs: Any) -> str:
        """Return text that changes when the files of the checkpoint change."""
        found, _ = folders.scan()
        return folders.stamp(found[checkpoint]) if checkpoint in found else ""

    @classmethod
    def _find(cls, checkpoint: str) -> Path:
        """Return the folder of a quantized model."""
        folder = folders.find_model(checkpoint)
        if not folders.is_quantized(folder):
            raise NodeError(
                f"{checkpoint} is a float model, not a quantized one.",
                "Load it with Q-ARVD Load Pipeline and connect Q-ARVD Quantize.",
            )
        return folder

    @classmethod
    @work
    def execute(cls, checkpoint: str, dtype: str = "auto") -> io.NodeOutput:
        """Return the pipeline and its description."""
        return _load(cls._find(checkpoint), checkpoint, dtype)
