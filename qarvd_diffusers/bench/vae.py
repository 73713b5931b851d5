"""Time decoding a chunk with Wan's VAE: as diffusers does it, and with fused modules on channels-last weights."""

from __future__ import annotations

import time
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from ..vae.streaming import StreamingVAEDecoder, optimize_vae
from .shapes import Shape
from .timing import median_ms, relative_error

VAE_VARIANTS = ("frame by frame", "together", "frame by frame, optimized", "together, optimized")


def random_vae(shape: Shape, device: torch.device, dtype: torch.dtype) -> AutoencoderKLWan:
    """Build a VAE with random weights, of Wan's sizes or small for the toy shape."""
    config = {} if shape.heads > 1 else {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    torch.manual_seed(0)
    with torch.device(device):
        return AutoencoderKLWan(**config).to(dtype).eval()


@torch.no_grad()
def bench_vae(shape: Shape, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Time every variant on the same latents.

    Returns:
        Per variant: `name`, median `ms` of a chunk in the middle of a video, `first_two_s` (seconds of the first two
        chunks), `peak_bytes`, and `relative_error` against the first variant.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    latents = torch.randn(
        3, 1, 16, shape.chunk_frames, *shape.latent_size, generator=generator, device=device, dtype=dtype
    )
    results, reference = [], None
    for name in VAE_VARIANTS:
        vae = random_vae(shape, device, dtype)
        if name.endswith("optimized"):
            optimize_vae(vae)
        decoder = StreamingVAEDecoder(
            vae, frames_at_once=1 if name.startswith("frame by frame") else shape.chunk_frames
        )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        pixels = torch.cat([decoder.decode(piece) for piece in latents[:2]], dim=2).float().cpu()
        first = time.perf_counter() - start
        reference = pixels if reference is None else reference
        results.append(
            {
                "name": name,
                "ms": median_ms(lambda decoder=decoder: decoder.decode(latents[2]), repeats),
                "first_two_s": first,
                "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
                "relative_error": relative_error(pixels, reference),
            }
        )
    return results
