"""Time whole videos from the prompt to the frames, text encoder and VAE included."""

from __future__ import annotations

import copy
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from ..bundled import bundled_model_path
from ..models.transformer_causal_wan import CausalWanTransformer3DModel
from ..pipelines.pipeline_arvd import ARVDPipeline
from ..vae.streaming import StreamingVAEDecoder, optimize_vae
from .shapes import WINDOW_FRAMES, Shape, random_transformer
from .transformer import kv_cache_of, quantized
from .vae import random_vae

WARM_UP = 4  # chunks; the first three compile


def random_pipeline(shape: Shape, transformer: CausalWanTransformer3DModel, device: torch.device) -> ARVDPipeline:
    """Build a pipeline with random weights: the sizes of UMT5-XXL and Wan's VAE, or small ones for the toy shape."""
    large = shape.heads > 1
    height, width = (8 * size for size in shape.latent_size)
    text_config = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    if large:
        text_config = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    dtype = next(transformer.patch_embedding.parameters()).dtype
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # an encoder of 5.7e9 parameters must not be built in float32 first
    try:
        with torch.device(device):
            text_encoder = UMT5EncoderModel(
                UMT5Config(vocab_size=256384, feed_forward_proj="gated-gelu", **text_config)
            )
    finally:
        torch.set_default_dtype(default)
    return ARVDPipeline(
        transformer=transformer,
        tokenizer=AutoTokenizer.from_pretrained(Path(bundled_model_path()) / "tokenizer"),
        text_encoder=text_encoder.eval(),
        vae=random_vae(shape, device, dtype),
        height=height,
        width=width,
        num_frames_per_chunk=shape.chunk_frames,
        local_attention_frames=WINDOW_FRAMES,
    )


def _pipeline(whole: ARVDPipeline, name: str, transformer: CausalWanTransformer3DModel, shape: Shape) -> ARVDPipeline:
    """Build the pipeline of variant `name`; a float one decodes as diffusers does, frame by frame."""
    vae = copy.deepcopy(whole.vae)
    fields = {key: whole.config[key] for key in ("height", "width", "num_frames_per_chunk", "local_attention_frames")}
    pipe = ARVDPipeline(**{**whole.components, "vae": vae, "transformer": transformer}, **fields)
    pipe.set_progress_bar_config(disable=True)
    if name.startswith("w"):
        pipe.transformer = quantized(transformer, shape, _scheme(name))
        optimize_vae(vae)
        return pipe
    pipe.make_decoder = lambda: StreamingVAEDecoder(vae, frames_at_once=1)
    if name == "bf16-compiled":
        pipe.transformer.set_attention_backend("_native_cudnn")
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return pipe


def _scheme(name: str) -> str:
    """Return what of a variant's name selects the pipeline."""
    return name.partition("-")[0] if name.startswith("w") else name


def _arguments(name: str) -> dict[str, Any]:
    """Return the arguments of `stream` for variant `name`."""
    _, *options = name.split("-") if name.startswith("w") else [name]
    return {
        "kv_cache": kv_cache_of(options),
        **({"overlap_decoding": True} if "overlap" in options else {}),
    }


def time_stream(pipe: ARVDPipeline, num_chunks: int, **arguments: Any) -> dict[str, float]:
    """Time one video, from the prompt to frames on the device: seconds, frames per second, latencies of the chunks."""
    cuda = pipe._execution_device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    arrivals, frames = [], 0
    for chunk in pipe.stream("a red circle moves left", num_chunks=num_chunks, output_type="pt", **arguments):
        if cuda:
            torch.cuda.current_stream().synchronize()  # these frames are complete; concurrent decoding continues
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
    on_result: Callable[[dict[str, Any]], None] = lambda result: None,
) -> list[dict[str, Any]]:
    """Time whole videos of `lengths` chunks with every variant, after a short video to warm up.

    Neighboring variants of one scheme share a pipeline. Peak memory covers the text encoder, the VAE and the
    transformer of the variant.

    Returns:
        Per variant: `name`, `setup_s` (weights, quantization, compilation and warm-up), and by number of frames the
        result of `time_stream`; or `error`.
    """
    whole, pipe, built, results = None, None, None, []
    for name in variants:
        result: dict[str, Any] = {"name": name}
        start = time.perf_counter()
        try:
            if built != _scheme(name):
                pipe = built = None
                _release(device)
                transformer = random_transformer(shape, device, torch.bfloat16)
                whole = whole or random_pipeline(shape, transformer, device)
                pipe, built = _pipeline(whole, name, transformer, shape), _scheme(name)
                whole.transformer = transformer = None
            time_stream(pipe, WARM_UP, **_arguments(name))
            result["setup_s"] = time.perf_counter() - start
            for num_chunks in lengths:
                timed = time_stream(pipe, num_chunks, **_arguments(name))
                result[str(timed["frames"])] = timed
        except (ImportError, RuntimeError, ValueError, TypeError) as error:
            result["error"] = f"{type(error).__name__}: {error}"
        results.append(result)
        on_result(result)
    return results


def _release(device: torch.device) -> None:
    """Free compiled code and cached memory."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
