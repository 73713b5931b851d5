"""Break a fused pass down by operation, and compare each with the time that its arithmetic or its bytes need."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .shapes import TEXT_TOKENS, Shape

# Peak rates of the SXM boards, dense, from NVIDIA's data sheets: 8-bit and 16-bit operations and bytes per second.
_PEAKS = {"H200": (1979e12, 989e12, 4.8e12), "H100": (1979e12, 989e12, 3.35e12)}


class Work(NamedTuple):
    """Count the work of an operation in one pass: arithmetic operations on 8 and on 16 bits, and bytes moved."""

    ops8: float = 0.0
    ops16: float = 0.0
    bytes: float = 0.0


class Operation(NamedTuple):
    """Describe one row of the breakdown.

    Attributes:
        name: the printed name.
        pattern: regular expression that matches the names of its kernels.
        work: computes the work of one pass from the shape, the visible tokens, and whether K/V have 8 bits.
    """

    name: str
    pattern: str
    work: Callable[[Shape, int, bool], Work]


def _products(shape: Shape, tokens: int, eight: bool) -> Work:
    """Count the products of all blocks, q and out of the text attention included, the one with GELU excluded."""
    columns = sum(n for n, _ in shape.products) + 2 * shape.dim - shape.ffn
    per_token = shape.dim * (6 * shape.dim + shape.ffn)
    return Work(
        2 * shape.chunk_tokens * per_token * shape.layers, bytes=2 * shape.chunk_tokens * columns * shape.layers
    )


def _gelu_product(shape: Shape, tokens: int, eight: bool) -> Work:
    """Count the first product of the feed-forward network."""
    return Work(2 * shape.chunk_tokens * shape.dim * shape.ffn * shape.layers)


def _attention(shape: Shape, tokens: int, eight: bool) -> Work:
    """Count self-attention, in 8 or 16 bits, and attention to the text in 16 bits."""

    def operations(keys: int) -> float:
        return 4.0 * shape.chunk_tokens * keys * shape.dim * shape.layers

    own, text = operations(tokens), operations(TEXT_TOKENS)
    return Work(own, text) if eight else Work(0.0, own + text)


def _activations(bytes_per_channel: float, sites: float) -> Callable[[Shape, int, bool], Work]:
    """Make a function that counts the bytes of an operation on activations, at `sites` places per block."""

    def work(shape: Shape, tokens: int, eight: bool) -> Work:
        return Work(bytes=shape.chunk_tokens * shape.dim * bytes_per_channel * sites * shape.layers)

    return work


def _expansion(shape: Shape, tokens: int, eight: bool) -> Work:
    """Count half a byte read and one written per weight."""
    weights = shape.dim * (6 * shape.dim + 2 * shape.ffn) * shape.layers
    return Work(bytes=1.5 * weights)


OPERATIONS = (
    Operation("attention to the cache and to the prompt", r"flash|attention|sdpa|fmha", _attention),
    Operation("FFN-up with GELU to int8", r"gemm_kernel<.*\(qarvd::Output\)2", _gelu_product),
    Operation("the other matrix products", r"gemm_kernel", _products),
    # The residual sum reads two tensors and writes one. That the first norm of a pass adds nothing is ignored.
    Operation("residual + norm + modulation to int8", r"norm_quantize|rows_kernel.*Kind\)[12]", _activations(7, 3)),
    Operation("attention output to int8", r"quantize_static|rows_kernel", _activations(3, 2)),
    Operation("q/k norm, RoPE, K/V append", r"append", _activations(12, 1)),
    Operation("4-bit weights to 8 bits", r"expand_int4", _expansion),
    Operation("norm of the text query", r"layer_norm|rms_norm", _activations(4, 1)),
)


def breakdown(run: Callable[[], object], shape: Shape, chunk: int, eight: bool) -> list[dict[str, Any]]:
    """Profile one fused pass, and sum its kernels by operation.

    Args:
        run: one pass.
        shape: its sizes.
        chunk: index of its chunk, from 0.
        eight: whether K/V and attention have 8 bits.

    Returns:
        Rows of `operation`, `calls` and `ms`, in the order of `OPERATIONS`, then the rest. If the GPU's peak rates are
        known also `floor_ms`: the least time at those rates, of arithmetic or bytes, whichever is more.
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
    """Sum kernels `(name, calls, ms)` as `breakdown` does, for `tokens` visible tokens and a GPU of name `device`."""
    peaks = next((rates for name, rates in _PEAKS.items() if name in device), None)
    rows, rest = [], list(kernels)
    for operation in OPERATIONS:
        matching = [kernel for kernel in rest if re.search(operation.pattern, kernel[0])]
        rest = [kernel for kernel in rest if kernel not in matching]
        if not matching:
            continue
        row = _row(operation.name, matching)
        if peaks is not None:
            row["floor_ms"] = _least_ms(operation.work(shape, tokens, eight), peaks)
        rows.append(row)
    return [*rows, _row("the rest", rest)]


def _row(operation: str, kernels: list[tuple[str, int, float]]) -> dict[str, Any]:
    """Sum the calls and milliseconds of kernels."""
    return {"operation": operation, "calls": sum(k[1] for k in kernels), "ms": sum(k[2] for k in kernels)}


def _least_ms(work: Work, peaks: tuple[float, float, float]) -> float:
    """Compute the milliseconds that work takes at the peak rates."""
    return 1000 * max(work.ops8 / peaks[0] + work.ops16 / peaks[1], work.bytes / peaks[2])
