"""What a fused pass is made of: its kernels by operation, each beside the time that its arithmetic or its bytes need."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .shapes import TEXT_TOKENS, Shape

# Peak rates of the SXM boards, dense, from NVIDIA's data sheets: 8-bit and 16-bit operations and bytes per second.
_PEAKS = {"H200": (1979e12, 989e12, 4.8e12), "H100": (1979e12, 989e12, 3.35e12)}


class Work(NamedTuple):
    """What an operation must do in one pass: operations on 8 and on 16 bits, and bytes."""

    ops8: float = 0.0
    ops16: float = 0.0
    bytes: float = 0.0


class Operation(NamedTuple):
    """One row of the breakdown.

    Attributes:
        name: what is printed.
        pattern: of the names of its kernels.
        work: of one pass, from the shape, the number of visible tokens and whether K/V have 8 bits.
    """

    name: str
    pattern: str
    work: Callable[[Shape, int, bool], Work]


def _products(shape: Shape, tokens: int, eight: bool) -> Work:
    columns = (
        sum(n for n, _ in shape.products) + 2 * shape.dim - shape.ffn
    )  # text q and out too; not the one with GELU
    per_token = shape.dim * (6 * shape.dim + shape.ffn)
    return Work(
        2 * shape.chunk_tokens * per_token * shape.layers, bytes=2 * shape.chunk_tokens * columns * shape.layers
    )


def _gelu_product(shape: Shape, tokens: int, eight: bool) -> Work:
    return Work(2 * shape.chunk_tokens * shape.dim * shape.ffn * shape.layers)


def _attention(shape: Shape, tokens: int, eight: bool) -> Work:
    def operations(keys: int) -> float:
        return 4.0 * shape.chunk_tokens * keys * shape.dim * shape.layers

    own, text = operations(tokens), operations(TEXT_TOKENS)
    return Work(own, text) if eight else Work(0.0, own + text)


def _activations(bytes_per_channel: float, sites: float) -> Callable[[Shape, int, bool], Work]:
    def work(shape: Shape, tokens: int, eight: bool) -> Work:
        return Work(bytes=shape.chunk_tokens * shape.dim * bytes_per_channel * sites * shape.layers)

    return work


def _expansion(shape: Shape, tokens: int, eight: bool) -> Work:
    weights = shape.dim * (6 * shape.dim + 2 * shape.ffn) * shape.layers
    return Work(bytes=1.5 * weights)


OPERATIONS = (
    Operation("attention to the cache and to the prompt", r"flash|attention|sdpa|fmha", _attention),
    Operation("FFN-up with GELU to int8", r"gemm_kernel<.*\(qarvd::Output\)2", _gelu_product),
    Operation("the other matrix products", r"gemm_kernel", _products),
    # A sum reads two tensors and writes one; the first norm of a pass has nothing to add, which is left out.
    Operation("residual + norm + modulation to int8", r"norm_quantize|rows_kernel.*Kind\)[12]", _activations(7, 3)),
    Operation("attention output to int8", r"quantize_static|rows_kernel", _activations(3, 2)),
    Operation("q/k norm, RoPE, K/V append", r"append", _activations(12, 1)),
    Operation("4-bit weights to 8 bits", r"expand_int4", _expansion),
    Operation("norm of the text query", r"layer_norm|rms_norm", _activations(4, 1)),
)


def breakdown(run: Callable[[], object], shape: Shape, chunk: int, eight: bool) -> list[dict[str, Any]]:
    """Kernels of one fused pass over chunk `chunk` (0-based) by operation, in the order of `OPERATIONS`, then the rest.

    Args:
        eight: K/V and attention have 8 bits.

    Returns:
        Rows of `operation`, `calls`, `ms`, and where the GPU's peak rates are known `floor_ms`: what the operation takes at
        least at those rates (its arithmetic or its bytes, whichever is more).
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.self_device_time_total > 0]
    kernels = [(e.key, e.count, e.self_device_time_total / 1000) for e in events]
    return summarize(kernels, shape, (chunk + 1) * shape.chunk_tokens, eight, torch.cuda.get_device_name())


def summarize(
    kernels: list[tuple[str, int, float]], shape: Shape, tokens: int, eight: bool, device: str
) -> list[dict[str, Any]]:
    """`breakdown` of kernels `(name, calls, ms)`; `tokens` are visible, `device` is the GPU's name."""
    peaks = next((rates for name, rates in _PEAKS.items() if name in device), None)
    rows, left = [], list(kernels)
    for operation in OPERATIONS:
        mine = [kernel for kernel in left if re.search(operation.pattern, kernel[0])]
        left = [kernel for kernel in left if kernel not in mine]
        if not mine:
            continue
        row = {"operation": operation.name, "calls": sum(k[1] for k in mine), "ms": sum(k[2] for k in mine)}
        if peaks is not None:
            work = operation.work(shape, tokens, eight)
            arithmetic = work.ops8 / peaks[0] + work.ops16 / peaks[1]
            row["floor_ms"] = 1000 * max(arithmetic, work.bytes / peaks[2])
        rows.append(row)
    rows.append({"operation": "the rest", "calls": sum(k[1] for k in left), "ms": sum(k[2] for k in left)})
    return rows
