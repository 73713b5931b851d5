"""Time the matrix products of a transformer block: our integer product and torch's 16-bit and 8-bit ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import qarvd_kernels as ops

from .timing import median_ms, rotating

OUTLIERS = 128
# Sets of operands: enough that none is still in a 60 MB cache at its next turn.
SETS = 4


def _candidates(n: int, k: int, rows: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Build the calls by name, on one set of random operands."""
    x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
    w = torch.randn(n, k, device=device, dtype=torch.bfloat16) / k**0.5
    bias = torch.randn(n, device=device)
    codes = torch.randint(-128, 128, (rows, k), device=device, dtype=torch.int8)
    weight = torch.randint(-127, 128, (n, k), device=device, dtype=torch.int8)
    ratio, scale = torch.rand(n, device=device) + 1, torch.rand(n, device=device) / (100 * k)
    ours = (codes, weight, OUTLIERS, ratio, scale, bias, None, None, None)
    out = (torch.full((2,), 0.01, device=device), torch.full((2,), 10, dtype=torch.int32, device=device), OUTLIERS)
    x8, w8, one = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn), torch.ones((), device=device)
    row, column = torch.ones(rows, 1, device=device), torch.ones(1, n, device=device)
    b16 = bias.bfloat16()
    return {
        "bf16": lambda: F.linear(x, w, b16),
        "fp8 tensorwise": lambda: torch._scaled_mm(x8, w8.t(), one, one, bias=b16, out_dtype=torch.bfloat16),
        # Its accumulators keep 14 bits; the call above sums them in float32 at intervals.
        "fp8 tensorwise, fast": lambda: torch._scaled_mm(
            x8, w8.t(), one, one, bias=b16, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        "fp8 rowwise": lambda: torch._scaled_mm(x8, w8.t(), row, column, bias=b16, out_dtype=torch.bfloat16),
        "int8, int32 out": lambda: torch._int_mm(codes, weight.t()),
        "dual-scale int8": lambda: ops.dual_scale_gemm(*ours, torch.bfloat16),
        "dual-scale int8, gelu to int8": lambda: ops.dual_scale_gemm_gelu(*ours, *out),
    }


def bench_gemm(
    products: Iterable[tuple[int, int]], rows: int, device: torch.device, repeats: int = 30
) -> list[dict[str, Any]]:
    """Time every kernel at every product `(N, K)` of `rows` rows.

    Returns:
        Per product: `M`, `N`, `K`, and by kernel `us` (microseconds) or in `errors` the reason why it cannot run.
    """
    results = []
    for n, k in products:
        sets = [_candidates(n, k, rows, device) for _ in range(SETS)]
        row: dict[str, Any] = {"M": rows, "N": n, "K": k, "us": {}}
        for name in sets[0]:
            try:
                row["us"][name] = 1000 * median_ms(rotating([one[name] for one in sets]), repeats)
            except (RuntimeError, ValueError) as error:
                row.setdefault("errors", {})[name] = str(error).splitlines()[0]
        results.append(row)
    return results
