"""Read tile sizes from `configs.json`: measured where it names date and device, else estimated; no run-time tuning.

Per class of GPUs: `gemm` holds `[BLOCK_M, BLOCK_N, BLOCK_K, STRIPE, warps, stages]` per shape `NxK` with a default,
two for fewer rows (a text prompt) and one for the residual epilogue, which needs registers; `attention` holds `[query
rows, warps, stages]` per head dimension.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

_FILE = Path(__file__).with_name("configs.json")
_FEW_ROWS, _SOME_ROWS = 64, 768
_INTERPRETED_GEMM, _INTERPRETED_ATTENTION = (16, 16, 32, 4, 1, 1), (16, 1, 1)


@cache
def table() -> dict:
    """Return the whole file."""
    return json.loads(_FILE.read_text(encoding="utf-8"))


def architecture(capability: tuple[int, int]) -> str:
    """Return the class of GPUs that share tile sizes: same tensor cores, similar size of shared memory."""
    return {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm80", (10, 3): "sm80"}.get(capability, "sm89")


@cache
def gemm_config(device: int, m: int, n: int, k: int, residual: bool) -> tuple[int, ...]:
    """Return the tile of a product `[m, k] @ [k, n]` on the GPU of this index."""
    if device < 0:
        return _INTERPRETED_GEMM
    entries = table()[architecture(torch.cuda.get_device_capability(device))]["gemm"]
    if m <= _SOME_ROWS:
        return tuple(entries["few_rows" if m <= _FEW_ROWS else "some_rows"])
    return tuple(entries["residual"] if residual else entries.get(f"{n}x{k}", entries["default"]))


@cache
def attention_config(device: int, head_dim: int) -> tuple[int, ...]:
    """Return the tile for heads of this size on the GPU of this index."""
    if device < 0:
        return _INTERPRETED_ATTENTION
    entries = table()[architecture(torch.cuda.get_device_capability(device))]["attention"]
    return tuple(entries[str(head_dim)])
