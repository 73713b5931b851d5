"""Describe a pipeline in a few lines of text."""

from __future__ import annotations

from .handles import PipelineHandle
from .library import library


def size(handle: PipelineHandle) -> str:
    """Return the size of a quantized transformer and of its quantized layers, the latter relative to bfloat16."""
    sizes = library().stored_bytes(handle.pipe.transformer)
    share = sizes["quantized"] / sizes["bfloat16"]
    return (
        f"{sizes['total'] / 1e6:.2f} MB\nquantized layers {sizes['quantized'] / 1e6:.2f} MB, {share:.3f} of bfloat16"
    )


def describe(handle: PipelineHandle) -> str:
    """Describe scheme, size and rollout of a pipeline."""
    pipe = handle.pipe
    config, transformer = pipe.quantization, pipe.transformer
    layers = library().quantized_linears(transformer)
    fields = pipe.rollout_config
    lines = [f"{handle.name}: {type(pipe).__name__}, {transformer.config.num_layers} blocks"]
    if config is None:
        stored = library().stored_bytes(transformer)["total"]
        lines.append(f"float ({transformer.dtype}), {stored / 1e6:.2f} MB")
    else:
        outliers = sum(layer.num_outliers > 0 for layer in layers.values())
        lines += [
            f"{config.scheme}, rounding {config.resolved_rounding}: "
            f"{len(layers)} layers, {outliers} with outlier channels",
            size(handle),
        ]
    window = fields.local_attention_frames
    lines += [
        f"chunks of {fields.num_frames_per_chunk} latent frames, "
        f"steps {', '.join(f'{t:g}' for t in fields.denoising_timesteps)}",
        f"attention over {'all' if window == -1 else window} latent frames, {fields.sink_frames} of them a sink",
        f"{pipe.config.width} x {pipe.config.height} pixels, {pipe.config.fps} frames per second",
    ]
    return "\n".join(lines)
