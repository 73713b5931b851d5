"""Save quantized pipelines."""

from __future__ import annotations

from pathlib import Path

import comfy.latent_formats
import torch
from comfy_api.latest import io, ui

from .. import folders
from ..compat import NodeError, output, schema, widget, work
from ..handles import PipelineHandle, PipelineType
from ..library import library
from ..report import describe

FORMATS = ["qarvd folder", "ComfyUI int8 file"]


class QARVDSaveQuantized(io.ComfyNode):
    """Save a quantized pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDSaveQuantized",
            display_name="Q-ARVD Save Quantized",
            description="Saves a quantized pipeline in output/qarvd, for Q-ARVD Load Quantized and the Python "
            "library, bit for bit. Or saves its transformer as one int8 file for ComfyUI's own samplers; the node "
            "lists what this loses.",
            search_aliases=["save", "export", "checkpoint", "int8_tensorwise"],
            is_output_node=True,
            inputs=[
                PipelineType.Input("pipeline", tooltip="A quantized pipeline."),
                widget(
                    io.String,
                    "name",
                    default="tiny-w4a8",
                    tooltip="Name of the folder in output/qarvd, or of the file.",
                ),
                widget(
                    io.Combo,
                    "format",
                    options=FORMATS,
                    default=FORMATS[0],
                    optional=True,
                    tooltip="qarvd folder: the whole pipeline, bit for bit. ComfyUI int8 file: the transformer as "
                    "int8_tensorwise in output/diffusion_models, for ComfyUI 0.27 and later.",
                ),
                widget(
                    io.Boolean,
                    "overwrite",
                    default=True,
                    optional=True,
                    tooltip="Replace a model of this name; otherwise a number is added to the name.",
                ),
            ],
            outputs=[output(io.String, "path", "Path of the saved folder or file.")],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        """Check the name before the graph runs."""
        # Checked before the model is quantized, not only when it is saved. A connected name is not known yet.
        try:
            if name is not None:
                folders.check_name(name, folders.saved_folder())
        except NodeError as error:
            return error.line
        return True

    @classmethod
    @work
    def execute(
        cls, pipeline: PipelineHandle, name: str, format: str = FORMATS[0], overwrite: bool = True
    ) -> io.NodeOutput:
        """Save, and return the path."""
        if pipeline.pipe.quantization is None:
            raise NodeError(f"{pipeline.name} is a float model.", "Connect Q-ARVD Quantize before saving.")
        if format not in FORMATS:
            raise NodeError(f"format is {format!r}.", f"Choose one of: {', '.join(FORMATS)}.")
        if format == FORMATS[1]:
            path = _free_path(
                folders.saved_folder().parent / "diffusion_models", f"{name}.safetensors", overwrite, False
            )
            losses = library().export_int8_tensorwise(pipeline.pipe.transformer, path) + _losses_of_colour(pipeline)
            return io.NodeOutput(str(path), ui=ui.PreviewText("\n".join([_saved(path), *losses])))
        path = _free_path(folders.saved_folder(), name, overwrite)
        pipeline.pipe.save_pretrained(path)
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"{_saved(path)}\n{describe(pipeline)}"))


def _saved(path: Path) -> str:
    """Say where a model was saved."""
    return f"saved {path.relative_to(folders.saved_folder().parent.resolve()).as_posix()} in the output folder"


def _losses_of_colour(pipeline: PipelineHandle) -> list[str]:
    """Describe what ComfyUI loses of the pipeline's VAE: it assumes the latents of Wan's VAE."""
    if pipeline.pipe.vae is None:
        return []
    own, core = pipeline.pipe.vae.config, comfy.latent_formats.Wan21()
    for values, wan in ((own.latents_mean, core.latents_mean), (own.latents_std, core.latents_std)):
        if len(values) != wan.numel() or not torch.allclose(torch.tensor(values), wan.flatten().float(), atol=1e-3):
            return [
                "The mean and deviation of this VAE's latents are lost: ComfyUI uses those of Wan's VAE, so colours "
                "differ. Q-ARVD To Model keeps them."
            ]
    return []


def _free_path(root: Path, name: str, overwrite: bool, is_folder: bool = True) -> Path:
    """Return the path to save a folder, or a file, as `name` inside `root`.

    Raises:
        NodeError: if the name is not valid, or saving there would conflict with what exists.
    """
    path, root = folders.check_name(name, root), root.resolve()
    for above in path.parents:
        if above == root:
            break
        if above.is_file() or (above / folders.INDEX).is_file():
            raise NodeError(
                f"The name {name!r} is inside the {'file' if above.is_file() else 'model'} "
                f"{above.relative_to(root).as_posix()}.",
                "Give a name beside it: what is inside is not listed, and is deleted when that is saved again.",
            )
    number, wanted = 2, path
    while path.exists() and not overwrite:
        path = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        number += 1
    holds_others = path.is_dir() and not (path / folders.INDEX).is_file() and any(path.iterdir())
    if path.exists() and (path.is_dir() != is_folder or holds_others):
        raise NodeError(
            f"The name {name!r} is taken by a {'folder' if path.is_dir() else 'file'} that is not a saved model.",
            "Give another name, or turn overwrite off.",
        )
    return path
