"""Calibrate, quantize and save pipelines."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import comfy.latent_formats
import comfy.utils
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from .. import folders
from ..compat import NodeError, output, schema, stop_if_interrupted, widget, work
from ..handles import CalibrationType, PipelineHandle, PipelineType
from ..library import library
from ..report import describe, size

SCHEMES = ["w4a8", "w8a8", "w4a16", "w8a16", "w8a8_dynamic", "w4a8_dynamic"]
ROUNDINGS = ["auto", "nearest", "gptq", "adaround"]
OUTLIER_SPLITS = ["auto", "input", "mad_zscore", "iqr", "none"]
ROUNDING_INPUTS = ["float", "quantized"]
FORMATS = ["qarvd folder", "ComfyUI int8 file"]


class QARVDCalibrationPrompts(io.ComfyNode):
    """Collect the prompts for calibration."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QARVDCalibrationPrompts",
            display_name="Q-ARVD Calibration Prompts",
            description="Holds the prompts for calibration, one per line. Describe videos like those you will "
            "generate.",
            search_aliases=["calibration", "quantization prompts"],
            inputs=[
                widget(
                    io.String,
                    "text",
                    multiline=True,
                    default="",
                    tooltip="One prompt per line; lines that start with # are ignored.",
                ),
                widget(
                    io.Int,
                    "count",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Number of prompts to pick at random; 0 takes all.",
                ),
                widget(io.Int, "seed", default=0, min=0, max=2**32 - 1, tooltip="Decides which prompts count picks."),
            ],
            outputs=[output(CalibrationType, "calibration", "The prompts, for Q-ARVD Quantize.")],
        )

    @classmethod
    @work
    def execute(cls, text: str, count: int, seed: int) -> io.NodeOutput:
        lines = (line.strip() for line in text.splitlines())
        prompts = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
        if not prompts:
            raise NodeError(
                "There is no calibration prompt in the text.",
                "Write one prompt per line, or leave calibration of Q-ARVD Quantize unconnected for the model's own "
                "prompts.",
            )
        if 0 < count < len(prompts):
            prompts = random.Random(seed).sample(prompts, count)
        return io.NodeOutput(tuple(prompts))


class QARVDQuantize(io.ComfyNode):
    """Quantize a float pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QARVDQuantize",
            display_name="Q-ARVD Quantize",
            description="Quantizes the transformer: 4- or 8-bit weights, 8-bit or float activations, calibrated on "
            "rollouts weighted by the sensitivity of each chunk. The input pipeline stays float. Calibrations are "
            "cached: the same one never runs twice.",
            search_aliases=["quantization", "calibrate", "int4", "int8", "w4a8", "gptq", "adaround"],
            inputs=[
                PipelineType.Input("pipeline", tooltip="A float pipeline."),
                widget(
                    io.Combo,
                    "scheme",
                    options=SCHEMES,
                    default="w4a8",
                    tooltip="w4a8: 4-bit weights, 8-bit activations. a16: float activations. dynamic: scales computed "
                    "at run time. w8a16 and w8a8_dynamic need no calibration.",
                ),
                CalibrationType.Input(
                    "calibration",
                    optional=True,
                    tooltip="Prompts; unconnected, the model's own, or else general ones.",
                ),
                widget(
                    io.Combo,
                    "frame_weighting",
                    display_name="chunk_weights",
                    options=["published", "uniform"],
                    default="published",
                    optional=True,
                    tooltip="Weight of each chunk in calibration losses. published: by measured sensitivity, early "
                    "chunks more. uniform: all the same.",
                ),
                widget(
                    io.Combo,
                    "outlier_split",
                    options=OUTLIER_SPLITS,
                    default="auto",
                    optional=True,
                    tooltip="How outlier channels, which get a scale of their own, are detected. input: from weights "
                    "and calibration videos, for static activations. mad_zscore, iqr: from weights. none: one scale. "
                    "auto: input for w8a8, else mad_zscore.",
                ),
                widget(
                    io.Combo,
                    "rounding",
                    options=ROUNDINGS,
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="auto: gptq for 4-bit weights, nearest for 8-bit weights. adaround: gradient descent, "
                    "slow.",
                ),
                widget(
                    io.Int,
                    "iterations",
                    default=2000,
                    min=1,
                    max=100000,
                    optional=True,
                    advanced=True,
                    tooltip="Steps of adaround per layer group; other roundings do not use it.",
                ),
                widget(
                    io.Int,
                    "calibration_chunks",
                    default=7,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Chunks per calibration video; schemes without calibration do not use it.",
                ),
                widget(
                    io.String,
                    "exclude_layers",
                    display_name="modules_to_not_convert",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Layers that stay float, separated by commas: names, or the first or last parts of names.",
                ),
                widget(
                    io.Int,
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    optional=True,
                    tooltip="Seed of the noise of the calibration videos.",
                ),
                widget(
                    io.Combo,
                    "rounding_inputs",
                    options=ROUNDING_INPUTS,
                    default="float",
                    optional=True,
                    advanced=True,
                    tooltip="Round a layer for its inputs in the float model, or for its inputs after the quantized "
                    "blocks before it.",
                ),
            ],
            outputs=[
                output(PipelineType, "pipeline", "The quantized pipeline."),
                output(io.String, "report", "Scheme, size and rollout of the pipeline."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @work
    def execute(
        cls,
        pipeline: PipelineHandle,
        scheme: str,
        calibration: tuple[str, ...] | None = None,
        frame_weighting: str = "published",
        outlier_split: str = "auto",
        rounding: str = "auto",
        iterations: int = 2000,
        calibration_chunks: int = 7,
        exclude_layers: str = "",
        seed: int = 0,
        rounding_inputs: str = "float",
    ) -> io.NodeOutput:
        if pipeline.pipe.quantization is not None:
            raise NodeError(
                f"{pipeline.name} is quantized already ({pipeline.pipe.quantization.scheme}).",
                "Connect a float pipeline, from Q-ARVD Load Pipeline.",
            )
        try:
            config = library().QARVDConfig(
                scheme,
                calibration_prompts=calibration,
                chunk_weights=frame_weighting,
                outlier_detector=outlier_split,
                rounding=rounding,
                rounding_inputs=rounding_inputs,
                rounding_iterations=iterations,
                calibration_chunks=calibration_chunks,
                modules_to_not_convert=tuple(part.strip() for part in exclude_layers.split(",") if part.strip()),
                calibration_seed=seed,
            )
        except ValueError as error:
            raise NodeError(str(error), "Change that setting of Q-ARVD Quantize.") from error
        progress = _Progress(cls.hidden.unique_id)
        pipeline.load("text_encoder", "transformer")
        handle = pipeline.with_transformer(_shared_copy(pipeline.pipe.transformer), f"{pipeline.name} {scheme}")
        try:
            result = pipeline.pipe.calibrate(config, progress=progress)
            handle.pipe.quantize(config, result)
        except ValueError as error:
            raise NodeError(
                f"Quantization failed: {error}",
                "Change modules_to_not_convert (exclude_layers) or the calibration prompts, or load the model again.",
            ) from error
        _own_parameters(handle.pipe.transformer, pipeline.pipe.transformer)
        handle.load("transformer")  # it is on the device already: now ComfyUI knows it, and can unload it
        progress.show(size(handle))
        return io.NodeOutput(handle, describe(handle))


class _Progress:
    """Show the progress of calibration in the node, as a bar and text with the loss; stop if the user asks to."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._bar = comfy.utils.ProgressBar(1, node_id=node_id)
        self._text = ""

    def __call__(self, text: str, step: int, steps: int) -> None:
        stop_if_interrupted()
        self._bar.update_absolute(step, steps)
        if text != self._text:
            self._text = text
            self.show(f"{text} ({step}/{steps})")

    def show(self, text: str) -> None:
        """Replace the text in the node."""
        server = PromptServer.instance
        server.send_progress_text(text, self._node_id, server.client_id)


def _shared_copy(module: torch.nn.Module) -> torch.nn.Module:
    """Copy the module tree around the same parameters: the float weights are not in memory twice."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def _own_parameters(module: torch.nn.Module, other: torch.nn.Module) -> None:
    """Copy the parameters that `module` still shares with `other`, so that either can be unloaded alone."""
    shared = {id(parameter) for parameter in other.parameters()}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) in shared:
                setattr(part, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))


class QARVDSaveQuantized(io.ComfyNode):
    """Save a quantized pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
