"""Measure quantized models: fidelity, sensitivity of chunks, bits of layers, memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from .. import folders
from ..compat import NodeError, output, schema, widget, work
from ..handles import BitsType, CalibrationType, PipelineHandle, PipelineType, SensitivityType
from ..library import library
from ..planning import NO_LIMIT, SIZES, describe, plan
from ..progress import Progress

FOUR_BITS = ["w4a8", "w4a16", "w4a8_dynamic"]
MEASURED = ["w4a8", "w8a8", "w4a16", "w8a16", "w8a8_dynamic", "w4a8_dynamic"]


def _chunks(default: int, tooltip: str) -> Any:
    """Make the input `num_chunks`."""
    return widget(io.Int, "num_chunks", default=default, min=1, max=340, tooltip=tooltip)


def _seed(default: int, tooltip: str) -> Any:
    """Make the input `first_seed`; the page would change one named `seed` after each run."""
    return widget(io.Int, "first_seed", default=default, min=0, max=2**32 - 1, optional=True, tooltip=tooltip)


def _require(pipeline: PipelineHandle, name: str, quantized: bool) -> None:
    """Raise NodeError if a pipeline has no text encoder, or is float but should be quantized, or the reverse."""
    pipeline.require_text_encoder()
    if (pipeline.pipe.quantization is not None) != quantized:
        kinds = ("float", "quantized") if quantized else ("quantized", "float")
        raise NodeError(
            f"{name} is {pipeline.name}, a {kinds[0]} model, expected a {kinds[1]} one.",
            "Connect Q-ARVD Quantize or Q-ARVD Load Quantized." if quantized else "Connect Q-ARVD Load Pipeline.",
        )


def _plots() -> Any:
    """Return the library's plots; raise NodeError if they cannot be drawn."""
    plots = library("evaluation.plots")
    if not plots.has_matplotlib():
        raise NodeError(
            "Plots need the package matplotlib, which is not installed.",
            "Run pip install matplotlib with the Python of ComfyUI, then restart it.",
        )
    return plots


def _images(paths: list[Path]) -> torch.Tensor:
    """Read pictures of one size as images `[n, height, width, 3]` in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in paths]).float() / 255


def _shown(text: str, paths: list[Path]) -> dict[str, Any]:
    """Return what the node shows: text, and pictures in the output folder."""
    root = Path(folder_paths.get_output_directory()).resolve()
    images = [
        {"filename": path.name, "subfolder": path.parent.relative_to(root).as_posix(), "type": "output"}
        for path in paths
    ]
    return {**ui.PreviewText(text).as_dict(), "images": images}


def _folder(name: str) -> Path:
    """Return a folder in `output/qarvd_reports`; raise NodeError for a name that is no folder name."""
    return folders.check_name(name, Path(folder_paths.get_output_directory()) / "qarvd_reports")


class QARVDEvaluate(io.ComfyNode):
    """Compare a quantized model with its float model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDEvaluate",
            display_name="Q-ARVD Evaluate",
            description="Generates videos with a float and a quantized model from the same noise, and measures how "
            "far they differ, chunk by chunk: PSNR, SSIM, latent error, flicker, motion, with plots and a page in "
            "output/qarvd_reports.",
            search_aliases=["fidelity", "psnr", "ssim", "benchmark", "quality", "evaluate quantization"],
            is_output_node=True,
            inputs=[
                PipelineType.Input("reference", tooltip="The float pipeline."),
                PipelineType.Input("pipeline", tooltip="The quantized pipeline."),
                CalibrationType.Input("prompts", tooltip="One video each; not those that were calibrated on."),
                _chunks(7, "Chunks of each video."),
                widget(io.String, "name", default="evaluation", tooltip="Folder in output/qarvd_reports; replaced."),
                _seed(0, "Seed of the first prompt's noise; each further prompt has the next one."),
            ],
            outputs=[
                output(io.Image, "plots", "A plot of each measure over the chunks."),
                output(io.String, "report", "The measures as a table."),
                output(io.String, "page", "Path of the page with plots and videos."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @work
    def execute(
        cls,
        reference: PipelineHandle,
        pipeline: PipelineHandle,
        prompts: tuple[str, ...],
        num_chunks: int,
        name: str,
        first_seed: int = 0,
    ) -> io.NodeOutput:
        """Generate, compare, and return plots and tables."""
        _require(reference, "reference", quantized=False)
        _require(pipeline, "pipeline", quantized=True)
        folder, fidelity, report_room = _folder(name), library("evaluation.fidelity"), library("evaluation.report")
        _plots()
        progress, total = Progress(cls.hidden.unique_id), 2 * len(prompts) * num_chunks
        done, rollouts, described = 0, [], []
        for handle in (reference, pipeline):

            def step(handle: PipelineHandle = handle) -> None:
                nonlocal done
                done += 1
                progress(f"generating with {handle.name}", done, total)

            handle.load("text_encoder", "transformer", "vae")
            try:
                rollouts.append(fidelity.roll_out(handle.pipe, prompts, num_chunks, first_seed, step))
            except FloatingPointError as error:
                raise NodeError(f"{handle.name} failed: {error}.", "Quantize with another scheme or dtype.") from error
            described.append(fidelity.describe(handle.pipe, rollouts[-1], prompts, None))
            gc.collect()
        report = report_room.strict_json(fidelity.join(*rollouts, *described, first_seed))
        names = (reference.name, pipeline.name)
        fps = int(reference.pipe.config.get("fps") or 16)
        files = report_room.write_report(folder, report, *rollouts, prompts, fps, names=names)
        pictures = [Path(files[key]) for key in report_room.METRICS if key in files]
        text = library("cli.evaluate").render({**report, "files": files})
        return io.NodeOutput(_images(pictures), text, files["page"], ui=_shown(text, pictures))


class QARVDSensitivity(io.ComfyNode):
    """Measure how sensitive each chunk is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDSensitivity",
            display_name="Q-ARVD Sensitivity",
            description="Measures the error of the whole video that quantizing each chunk causes. Q-ARVD Quantize "
            "weighs the chunks by it. The pipeline stays float.",
            search_aliases=["chunk weights", "frame weighting", "sensitivity"],
            is_output_node=True,
            inputs=[
                PipelineType.Input("pipeline", tooltip="A float pipeline."),
                CalibrationType.Input("prompts", tooltip="Prompts to measure on, all different."),
                widget(io.Combo, "scheme", options=MEASURED, default="w4a8", tooltip="As in Q-ARVD Quantize."),
                _chunks(7, "Chunks of each video; the same as calibration_chunks of Q-ARVD Quantize."),
                CalibrationType.Input(
                    "calibration", optional=True, tooltip="Prompts to calibrate on; unconnected, the model's own."
                ),
                _seed(20_000, "Seed of the first prompt's noise; away from those of calibration."),
            ],
            outputs=[
                output(SensitivityType, "sensitivity", "For Q-ARVD Quantize."),
                output(io.String, "report", "Sensitivity and weight of each chunk."),
                output(io.Image, "plot", "Sensitivity over the chunks, with the fitted decay."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @work
    def execute(
        cls,
        pipeline: PipelineHandle,
        prompts: tuple[str, ...],
        scheme: str,
        num_chunks: int,
        calibration: tuple[str, ...] | None = None,
        first_seed: int = 20_000,
    ) -> io.NodeOutput:
        """Measure, and return the result, a table and a plot."""
        _require(pipeline, "pipeline", quantized=False)
        plots = _plots()
        pipeline.load("text_encoder", "transformer")
        try:
            config = library().QARVDConfig(scheme, calibration_prompts=calibration, calibration_chunks=num_chunks)
            result = library().measure_sensitivity(
                pipeline.pipe,
                config,
                prompts,
                num_chunks=num_chunks,
                seed=first_seed,
                progress=Progress(cls.hidden.unique_id),
            )
        except (ValueError, FloatingPointError) as error:
            raise NodeError(
                f"Sensitivity cannot be measured: {error}.", "Change the prompts or the scheme."
            ) from error
        path = _folder("sensitivity") / f"{cls.hidden.unique_id.replace(':', '_')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        plots.plot_sensitivity(result, path)
        weights = result.chunk_weights if min(result.sensitivity) > 0 else [None] * len(result.sensitivity)
        rows = [
            (k + 1, f"{s:.4e}", w and f"{w:.4f}")
            for k, (s, w) in enumerate(zip(result.sensitivity, weights, strict=True))
        ]
        text = library("cli.common").table(("chunk", "sensitivity", "weight"), rows)
        return io.NodeOutput(result, text, _images([path]), ui=_shown(text, [path]))


class QARVDMixedPrecision(io.ComfyNode):
    """Choose the layers that get 8 bits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDMixedPrecision",
            display_name="Q-ARVD Mixed Precision",
            description="Chooses the layers of a 4-bit scheme that get 8 bits: those whose 4-bit weights cause the "
            "largest error per byte. The pipeline stays float.",
            search_aliases=["mixed bits", "layer bits", "int4 int8"],
            is_output_node=True,
            inputs=[
                PipelineType.Input("pipeline", tooltip="A float pipeline."),
                widget(
                    io.Combo, "scheme", options=FOUR_BITS, default="w4a8", tooltip="The same as in Q-ARVD Quantize."
                ),
                widget(
                    io.Float,
                    "budget",
                    default=0.1,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the weights that may get 8 bits.",
                ),
                CalibrationType.Input(
                    "prompts", optional=True, tooltip="Prompts to measure on; unconnected, four of calibration."
                ),
                CalibrationType.Input(
                    "calibration", optional=True, tooltip="Prompts to calibrate on; unconnected, the model's own."
                ),
                widget(
                    io.Int,
                    "calibration_chunks",
                    default=7,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Chunks per calibration video; the same as in Q-ARVD Quantize.",
                ),
            ],
            outputs=[
                output(BitsType, "bits", "For Q-ARVD Quantize."),
                output(io.String, "report", "The layers that get 8 bits."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @work
    def execute(
        cls,
        pipeline: PipelineHandle,
        scheme: str,
        budget: float,
        prompts: tuple[str, ...] | None = None,
        calibration: tuple[str, ...] | None = None,
        calibration_chunks: int = 7,
    ) -> io.NodeOutput:
        """Measure, and return the layers' bits."""
        _require(pipeline, "pipeline", quantized=False)
        pipeline.load("text_encoder", "transformer", "vae")
        try:
            config = library().QARVDConfig(
                scheme, calibration_prompts=calibration, calibration_chunks=calibration_chunks
            )
            chosen = library("calibration.mixed_precision").choose_bits(
                pipeline.pipe, config, budget, prompts, progress=Progress(cls.hidden.unique_id)
            )
        except (ValueError, FloatingPointError) as error:
            raise NodeError(f"Bits cannot be chosen: {error}.", "Change the scheme, budget or prompts.") from error
        bits = dict(chosen.module_bits)
        text = "\n".join([f"{len(bits)} layers get 8 bits:", *sorted(bits)])
        return io.NodeOutput(bits, text, ui=ui.PreviewText(text))


class QARVDPlan(io.ComfyNode):
    """Estimate the GPU memory of a stream."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDPlan",
            display_name="Q-ARVD Plan",
            description="Estimates the GPU memory that a stream needs, by component, and the settings of Q-ARVD "
            "Stream Generate that fit. Nothing is loaded to the GPU.",
            search_aliases=["vram", "memory estimate", "how much memory"],
            is_output_node=True,
            inputs=[
                PipelineType.Input("pipeline", tooltip="Any pipeline."),
                widget(io.Combo, "memory", options=SIZES, default=NO_LIMIT, tooltip="GPU memory to fit into."),
                widget(io.Int, "width", default=0, min=0, max=8192, step=16, tooltip="Pixels; 0: the model's own."),
                widget(io.Int, "height", default=0, min=0, max=8192, step=16, tooltip="Pixels; 0: the model's own."),
            ],
            outputs=[output(io.String, "plan", "GB by component and phase, and the settings that fit.")],
        )

    @classmethod
    @work
    def execute(cls, pipeline: PipelineHandle, memory: str, width: int = 0, height: int = 0) -> io.NodeOutput:
        """Return the estimate."""
        config = pipeline.pipe.config
        found = plan(pipeline, memory, (width or config.width, height or config.height), with_text=True)
        text = f"{pipeline.name}\n{describe(found)}"
        return io.NodeOutput(text, ui=ui.PreviewText(text))
