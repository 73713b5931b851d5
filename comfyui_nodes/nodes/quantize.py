"""Nodes that calibrate, quantize and save."""

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
from ..compat import NodeError, schema, stop_if_interrupted, widget, work
from ..handles import CalibrationType, PipelineHandle, PipelineType
from ..library import library
from ..report import describe, size

SCHEMES = ["w4a8", "w8a8", "w4a16", "w8a16", "w8a8_dynamic", "w4a8_dynamic"]
ROUNDINGS = ["auto", "nearest", "gptq", "adaround"]
OUTLIER_SPLITS = ["auto", "input", "mad_zscore", "iqr", "none"]
ROUNDING_INPUTS = ["float", "quantized"]
FORMATS = ["qarvd folder", "ComfyUI int8 file"]


class QARVDCalibrationPrompts(io.ComfyNode):
    """Prompts whose videos the ranges are measured on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QARVDCalibrationPrompts",
            display_name="Q-ARVD Calibration Prompts",
            description="Prompts for calibration, one a line: describe videos like those you will generate.",
            search_aliases=["calibration", "quantization prompts"],
            inputs=[
                widget(
                    io.String,
                    "text",
                    multiline=True,
                    default="",
                    tooltip="One prompt a line; lines that start with # are left out.",
                ),
                widget(
                    io.Int,
                    "count",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Take this many of them at random; 0 takes all.",
                ),
                widget(
                    io.Int, "seed", default=0, min=0, max=2**32 - 1, tooltip="Which ones, where count takes a part."
                ),
            ],
            outputs=[CalibrationType.Output(display_name="calibration")],
        )

    @classmethod
    @work
    def execute(cls, text: str, count: int, seed: int) -> io.NodeOutput:
        lines = (line.strip() for line in text.splitlines())
        prompts = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
        if not prompts:
            raise NodeError(
                "There is no calibration prompt in the text.",
                "Write one prompt a line, or leave the calibration input of Q-ARVD Quantize open for the model's own.",
            )
        if 0 < count < len(prompts):
            prompts = random.Random(seed).sample(prompts, count)
        return io.NodeOutput(tuple(prompts))


class QARVDQuantize(io.ComfyNode):
    """A float pipeline to a quantized one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QARVDQuantize",
            display_name="Q-ARVD Quantize",
            description="Quantizes the transformer: 4- or 8-bit weights, 8-bit or float activations, calibrated on rollouts "
            "weighted by how much each chunk of the video matters. The float pipeline stays as it is. Results are kept by "
            "content: the same calibration is never done twice.",
            search_aliases=["quantization", "calibrate", "int4", "int8", "w4a8", "gptq", "adaround"],
            inputs=[
                PipelineType.Input("pipeline", tooltip="A float pipeline."),
                widget(
                    io.Combo,
                    "scheme",
                    options=SCHEMES,
                    default="w4a8",
                    tooltip="w4a8: 4-bit weights, 8-bit activations. a16: float activations. dynamic: scales found "
                    "at run time. w8a16 and w8a8_dynamic need no calibration.",
                ),
                CalibrationType.Input(
                    "calibration", optional=True, tooltip="Prompts; without it the model's own, else general ones."
                ),
                widget(
                    io.Combo,
                    "frame_weighting",
                    options=["published", "uniform"],
                    default="published",
                    optional=True,
                    tooltip="How much each chunk counts in calibration: early chunks more (as published), or all alike.",
                ),
                widget(
                    io.Combo,
                    "outlier_split",
                    options=OUTLIER_SPLITS,
                    default="auto",
                    optional=True,
                    tooltip="How outlier channels, which get a scale of their own, are found. input: by weights and "
                    "calibration videos, for static activations. mad_zscore, iqr: by weights. none: one scale. auto: input "
                    "for w8a8, else mad_zscore.",
                ),
                widget(
                    io.Combo,
                    "rounding",
                    options=ROUNDINGS,
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="auto: gptq (closed form) for 4-bit weights, nearest for 8-bit ones. adaround: gradient descent, "
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
                    tooltip="Steps of adaround; other roundings do not use it.",
                ),
                widget(
                    io.Int,
                    "calibration_chunks",
                    default=7,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Chunks of every calibration video; schemes without calibration do not use it.",
                ),
                widget(
                    io.String,
                    "exclude_layers",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Names, or leading or trailing parts of names, of layers that stay float; commas between them.",
                ),
                widget(
                    io.Int,
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    optional=True,
                    tooltip="Noise of the calibration videos.",
                ),
                widget(
                    io.Combo,
                    "rounding_inputs",
                    options=ROUNDING_INPUTS,
                    default="float",
                    optional=True,
                    advanced=True,
                    tooltip="Layers are rounded for the inputs that they get in the float model, or behind the blocks "
                    "quantized before them.",
                ),
            ],
            outputs=[PipelineType.Output(display_name="pipeline"), io.String.Output(display_name="report")],
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
                "Change exclude_layers or the calibration prompts, or load the model again.",
            ) from error
        _own_parameters(handle.pipe.transformer, pipeline.pipe.transformer)
        handle.load("transformer")  # it lies there already: now ComfyUI knows, and can unload it
        progress.show(size(handle))
        return io.NodeOutput(handle, describe(handle))


class _Progress:
    """Calibration's progress in the node: one bar, its text with the loss, and a look at the stop button."""

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
        """Text in the node, in the place of what was there."""
        server = PromptServer.instance
        server.send_progress_text(text, self._node_id, server.client_id)


def _shared_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of the module tree around the same parameters: the float weights are not in memory twice."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def _own_parameters(module: torch.nn.Module, other: torch.nn.Module) -> None:
    """Give `module` copies of what it still shares with `other`, so that either can be unloaded alone."""
    shared = {id(parameter) for parameter in other.parameters()}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) in shared:
                setattr(part, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))


class QARVDSaveQuantized(io.ComfyNode):
    """A quantized pipeline to disk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QARVDSaveQuantized",
            display_name="Q-ARVD Save Quantized",
            description="Saves a quantized pipeline in output/qarvd, where Q-ARVD Load Quantized and the Python library find "
            "it, bit for bit; or its transformer as one int8 file for ComfyUI's own samplers, which loses what the output "
            "lists.",
            search_aliases=["save", "export", "checkpoint", "int8_tensorwise"],
            is_output_node=True,
            inputs=[
                PipelineType.Input("pipeline", tooltip="A quantized pipeline."),
                widget(io.String, "name", default="tiny-w4a8", tooltip="Folder in output/qarvd, or file."),
                widget(
                    io.Combo,
                    "format",
                    options=FORMATS,
                    default=FORMATS[0],
                    optional=True,
                    tooltip="qarvd folder: everything, exactly. ComfyUI int8 file: the transformer as int8_tensorwise in "
                    "output/diffusion_models, for ComfyUI 0.27 and later.",
                ),
                widget(
                    io.Boolean,
                    "overwrite",
                    default=True,
                    optional=True,
                    tooltip="Replace what is there under this name; otherwise a number is added to the name.",
                ),
            ],
            outputs=[io.String.Output(display_name="path")],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        # Before the model is quantized, and not only when it is to be saved. A connected name is not known yet.
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
    """What ComfyUI does not know of the pipeline's VAE, whose latents it takes for Wan's."""
    if pipeline.pipe.vae is None:
        return []
    own, core = pipeline.pipe.vae.config, comfy.latent_formats.Wan21()
    for values, wan in ((own.latents_mean, core.latents_mean), (own.latents_std, core.latents_std)):
        if len(values) != wan.numel() or not torch.allclose(torch.tensor(values), wan.flatten().float(), atol=1e-3):
            return [
                "The mean and deviation of this VAE's latents are lost: ComfyUI takes those of Wan's VAE, which gives other "
                "colours. Q-ARVD To Model keeps them."
            ]
    return []


def _free_path(root: Path, name: str, overwrite: bool, is_folder: bool = True) -> Path:
    """Where to save a folder, or a file, under `name`, inside `root`.

    Raises:
        NodeError: the name cannot be used, or saving there would be in the way of what is there.
    """
    path, root = folders.check_name(name, root), root.resolve()
    for above in path.parents:
        if above == root:
            break
        if above.is_file() or (above / folders.INDEX).is_file():
            raise NodeError(
                f"The name {name!r} is inside the {'file' if above.is_file() else 'model'} "
                f"{above.relative_to(root).as_posix()}.",
                "Give a name beside it: what is inside is not listed, and goes when that is saved again.",
            )
    number, wanted = 2, path
    while path.exists() and not overwrite:
        path = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        number += 1
    holds_others = path.is_dir() and not (path / folders.INDEX).is_file() and any(path.iterdir())
    if path.exists() and (path.is_dir() != is_folder or holds_others):
        raise NodeError(
            f"The name {name!r} is taken by a {'folder' if path.is_dir() else 'file'} that is no saved model.",
            "Give another name, or turn overwrite off.",
        )
    return path
