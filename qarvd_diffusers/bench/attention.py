"""Time the attention of one chunk to a cache with backends of 16 and 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import qarvd_kernels as ops
from qarvd_kernels.fa3 import attention as fa3

from ..kv_cache.storage import allocate
from .shapes import CACHED_FRAMES, Shape
from .timing import median_ms, relative_error


def _sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with one of torch's backends; tensors are `[B, tokens, heads, 128]`."""
    with sdpa_kernel(backend):
        parts = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*parts).transpose(1, 2)


def _candidates(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Build the calls by name, each on the same operands in its own dtype."""

    def quantized(x: Tensor, dtype: torch.dtype, limit: float) -> tuple[Tensor, Tensor]:
        """Quantize with one scale per head."""
        scale = x.float().abs().amax((0, 1, 3)) / limit
        codes = x.float() / scale[:, None]
        return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale

    length = key.shape[1]
    q8, k8, v8 = (quantized(x, torch.float8_e4m3fn, 448.0) for x in (query, key, value))
    k_int, v_int = (quantized(x, torch.int8, 127.0) for x in (key, value))

    def cached(*tensors: Tensor) -> list[Tensor]:
        """Lay out codes of keys and values as a cache does."""
        buffers = [allocate(x.shape, x.dtype, x.device, values=i == 1) for i, x in enumerate(tensors)]
        for buffer, codes in zip(buffers, tensors, strict=True):
            buffer[:, :length] = codes
        return buffers

    fp8, int8 = cached(k8[0], v8[0]), cached(k_int[0], v_int[0])
    scales = (q8[1], k8[1], v8[1])
    candidates = {
        "cuDNN bf16": lambda: _sdpa(SDPBackend.CUDNN_ATTENTION, query, key, value),
        "flash bf16": lambda: _sdpa(SDPBackend.FLASH_ATTENTION, query, key, value),
        "chosen 16-bit": lambda: ops.attention(query, key, value),
        "chosen fp8": lambda: ops.attention_fp8(q8[0], *fp8, *scales, length),
        "chosen int8": lambda: ops.attention_int8(query, *int8, k_int[1], v_int[1], length),
    }
    if fa3.unavailable_reason(key.device) is None:
        candidates["FlashAttention-3 fp8"] = lambda: fa3.attention_fp8(q8[0], k8[0], v8[0], *scales, length)
    return candidates


def bench_attention(shape: Shape, device: torch.device, repeats: int = 20) -> list[dict[str, Any]]:
    """Time every backend, with 3, 12 and 21 latent frames in the cache.

    Returns:
        Per cache length: `queries`, `keys`, and by backend `us` (microseconds) and `relative_error` against float32,
        or the reason of a failure in `errors`.
    """
    results = []
    for frames in CACHED_FRAMES:
        tokens, length = shape.chunk_tokens, frames * shape.frame_tokens
        query, key, value = (
            torch.randn(1, size, shape.heads, 128, device=device, dtype=torch.bfloat16)
            for size in (tokens, length, length)
        )
        rows = query[:, :64].float()  # a sample: the reference needs the whole score matrix
        operands = (x.float().transpose(1, 2) for x in (rows, key, value))
        reference = F.scaled_dot_product_attention(*operands).transpose(1, 2)
        row: dict[str, Any] = {"queries": tokens, "keys": length, "us": {}, "relative_error": {}}
        for name, call in _candidates(query, key, value).items():
            try:
                row["relative_error"][name] = relative_error(call()[:, :64].float(), reference)
                row["us"][name] = 1000 * median_ms(call, repeats)
            except (RuntimeError, ValueError) as error:
                row.setdefault("errors", {})[name] = str(error).splitlines()[0]
        results.append(row)
    return results
