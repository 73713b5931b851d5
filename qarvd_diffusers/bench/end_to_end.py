"""Whole videos: prompt in, frames out, text encoder and VAE included."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from ..bundled import bundled_model_path
from ..models.transformer_causal_wan import CausalWanTransformer3DModel
from ..pipelines.pipeline_arvd import ARVDPipeline
from ..pipelines.streaming_vae import StreamingVAEDecoder, optimize_vae
from .shapes import CHUNK_FRAMES, Shape, random_transformer
from .transformer import quantized

_WINDOW = 21  # latent frames: the length the family is trained at


def random_pipeline(shape: Shape, transformer: CausalWanTransformer3DModel, device: torch.device) -> ARVDPipeline:
    """A pipeline of real sizes with random weights: UMT5-XXL's shape and Wan's VAE, or small ones for the toy shape."""
    large = shape.heads > 1
    vae_config = {} if large else {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    text_config = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    if large:
        text_config = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    dtype = next(transformer.patch_embedding.parameters()).dtype
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # an encoder of 5.7e9 parameters does not pass through float32 first
    try:
        with torch.device(device):
            text_encoder = UMT5EncoderModel(
                UMT5Config(vocab_size=256384, feed_forward_proj="gated-gelu", **text_config)
            )
            vae = AutoencoderKLWan(**vae_config)
    finally:
        torch.set_default_dtype(default)
    return ARVDPipeline(
        transformer=transformer,
        tokenizer=AutoTokenizer.from_pretrained(Path(bundled_model_path()) / "tokenizer"),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        height=480 if large else 32,
        width=832 if large else 48,
        local_attention_frames=_WINDOW,
    )


def _configure(pipe: ARVDPipeline, name: str, shape: Shape, compile_vae: bool) -> dict[str, Any]:
    """Turn a float pipeline into the variant `name`; returns the arguments of its streams."""
    if name.startswith("w"):
        scheme, _, attention = name.partition("-")
        pipe.transformer = quantized(pipe.transformer, shape, scheme)
        optimize_vae(pipe.vae, compile_vae)
        return {"kv_cache": "fp8"} if attention else {}
    pipe.make_decoder = lambda: StreamingVAEDecoder(pipe.vae, frames_at_once=1)  # as diffusers decodes
    if name == "bf16-compiled":
        pipe.transformer.set_attention_backend("_native_cudnn")
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return {}


def time_stream(pipe: ARVDPipeline, num_chunks: int, **arguments: Any) -> dict[str, float]:
    """One video, from the prompt to frames on the device: seconds, frames per second, latencies of the chunks."""
    cuda = pipe._execution_device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    arrivals, frames = [], 0
    for chunk in pipe.stream("a red circle moves left", num_chunks=num_chunks, output_type="pt", **arguments):
        if cuda:
            torch.cuda.synchronize()
        arrivals.append(time.perf_counter() - start)
        frames += chunk.frames.shape[1]
    gaps = [after - before for before, after in itertools.pairwise(arrivals)] or arrivals
    return {
        "frames": frames,
        "seconds": arrivals[-1],
        "frames_per_second": frames / arrivals[-1],
        "first_frame_s": arrivals[0],
        "chunk_p50_s": statistics.median(gaps),
        "chunk_p95_s": sorted(gaps)[max(0, -(-95 * len(gaps) // 100) - 1)],
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
    }


def bench_end_to_end(
    shape: Shape,
    variants: Sequence[str],
    device: torch.device,
    lengths: Sequence[int] = (7, 27),
    compile_vae: bool = True,
    on_result: Callable[[dict[str, Any]], None] = lambda result: None,
) -> list[dict[str, Any]]:
    """Time whole videos of 7 and 27 chunks (81 and 321 frames) with every variant, after one that warms up.

    Returns:
        Per variant: `name`, and by number of frames what `time_stream` tells; or `error`.
    """
    transformer = random_transformer(shape, device, torch.bfloat16)
    whole = random_pipeline(shape, transformer, device)
    results = []
    for name in variants:
        result: dict[str, Any] = {"name": name}
        try:
            components = {
                **whole.components,
                "transformer": copy.deepcopy(transformer),
                "vae": copy.deepcopy(whole.vae),
            }
            fields = {key: whole.config[key] for key in ("height", "width", "local_attention_frames")}
            pipe = ARVDPipeline(**components, **fields)
            pipe.set_progress_bar_config(disable=True)
            arguments = _configure(pipe, name, shape, compile_vae)
            time_stream(pipe, _WINDOW // CHUNK_FRAMES, **arguments)
            for num_chunks in lengths:
                timed = time_stream(pipe, num_chunks, **arguments)
                result[str(timed["frames"])] = timed
            del pipe, components
        except (ImportError, RuntimeError, ValueError, TypeError) as error:
            result["error"] = f"{type(error).__name__}: {error}"
        results.append(result)
        on_result(result)
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results
