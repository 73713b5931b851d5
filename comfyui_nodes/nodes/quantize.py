"""Calibrate and quantize pipelines."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from comfy_api.latest import io

from ..compat import NodeError, output, schema, widget, work
from ..handles import BitsType, CalibrationType, PipelineHandle, PipelineType, SensitivityType
from ..library import library
from ..progress import Progress
from ..report import describe, size

SCHEMES = ["w4a8", "w8a8", "w4a16", "w8a16", "w8a8_dynamic", "w4a8_dynamic"]
ROUNDINGS = ["auto", "nearest", "gptq", "adaround"]
OUTLIER_SPLITS = ["auto", "input", "mad_zscore", "iqr", "none"]
ROUNDING_INPUTS = ["float", "quantized"]


class QARVDCalibrationPrompts(io.ComfyNode):
    """Collect the prompts for calibration."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
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
        """Return the prompts, without duplicates."""
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
        """Declare inputs, outputs and texts of the node."""
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
                SensitivityType.Input(
                    "sensitivity",
                    optional=True,
                    tooltip="From Q-ARVD Sensitivity: weights of the chunks, in place of chunk_weights.",
                ),
                BitsType.Input("bits", optional=True, tooltip="From Q-ARVD Mixed Precision: layers that get 8 bits."),
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
        sensitivity: Any = None,
        bits: dict[str, int] | None = None,
    ) -> io.NodeOutput:
        """Return the quantized pipeline and its description."""
        if pipeline.pipe.quantization is not None:
            raise NodeError(
                f"{pipeline.name} is quantized already ({pipeline.pipe.quantization.scheme}).",
                "Connect a float pipeline, from Q-ARVD Load Pipeline.",
            )
        try:
            config = library().QARVDConfig(
                scheme,
                calibration_prompts=calibration,
                chunk_weights=frame_weighting if sensitivity is None else sensitivity.chunk_weights,
                outlier_detector=outlier_split,
                rounding=rounding,
                rounding_inputs=rounding_inputs,
                rounding_iterations=iterations,
                calibration_chunks=calibration_chunks,
                modules_to_not_convert=tuple(part.strip() for part in exclude_layers.split(",") if part.strip()),
                calibration_seed=seed,
                module_bits=bits or None,
            )
        except ValueError as error:
            raise NodeError(str(error), "Change that setting of Q-ARVD Quantize.") from error
        if config.needs_calibration:
            pipeline.require_text_encoder()
        progress = Progress(cls.hidden.unique_id)
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
