"""Store keys and values in a float dtype, or in 8 bits with one static scale per sample and head."""

from __future__ import annotations

import torch

import qarvd_kernels as ops

STORAGES: dict[str, torch.dtype | None] = {
    "auto": None,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""Names of the storage dtypes; `auto` is the dtype of the pass."""

_ROOM_MULTIPLE = 16  # tokens; TMA loads need rows of 16 codes
_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # largest code
_SMALLEST_SCALE = 1e-12  # a head that is zero everywhere must not divide by zero


def check_storage(storage: str) -> str:
    """Return the name.

    Raises:
        ValueError: if it names no storage.
    """
    if storage not in STORAGES:
        raise ValueError(f"kv_cache is {storage!r}, expected one of {', '.join(STORAGES)}")
    return storage


def allocate(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, values: bool) -> torch.Tensor:
    """Allocate zeros `[B, at least tokens, heads, head_dim]` for keys, or for values, of shape `(B, tokens, heads,
    head_dim)`.

    If the device's 8-bit attention needs it, the tokens of the values are innermost in memory. Only the strides
    differ: code that reads or writes by index need not know.
    """
    batch, tokens, heads, head_dim = shape
    if not ops.tokens_innermost(device, head_dim, dtype):
        return torch.zeros(shape, device=device, dtype=dtype)
    room = -(-tokens // _ROOM_MULTIPLE) * _ROOM_MULTIPLE
    if not values:
        return torch.zeros(batch, room, heads, head_dim, device=device, dtype=dtype)
    return torch.zeros(batch, heads, head_dim, room, device=device, dtype=dtype).permute(0, 3, 1, 2)


def is_quantized(dtype: torch.dtype) -> bool:
    """Whether tensors of a storage dtype need a scale."""
    return dtype in _LIMITS


def fit_scale(tensor: torch.Tensor, dtype: torch.dtype, margin: float) -> torch.Tensor:
    """Return the scale `[B, heads]` float32 that represents `margin` times the largest value of `[B, tokens, heads,
    head_dim]`.

    Each sample has its own scale, so that its codes do not depend on the other samples of the batch.
    """
    largest = torch.linalg.vector_norm(tensor.detach(), torch.inf, dim=(1, 3)).float()  # one kernel
    return (largest * (margin / _LIMITS[dtype])).clamp_min(_SMALLEST_SCALE)


def encode(tensor: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Convert values `[B, tokens, heads, head_dim]` to stored ones; `scale` `[B, heads]` or `[heads]`, None for a
    float dtype.

    int8 is symmetric and rounds half to even; float8 rounds as the hardware's cast does. Both saturate.
    """
    if scale is None:
        return tensor.to(dtype)
    limit = _LIMITS[dtype]
    codes = tensor.float() / _per_channel(scale)
    return (codes.round() if dtype == torch.int8 else codes).clamp(-limit, limit).to(dtype)


def decode(codes: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Convert what is stored to values in `dtype`."""
    return codes.to(dtype) if scale is None else (codes.float() * _per_channel(scale)).to(dtype)


def _per_channel(scale: torch.Tensor) -> torch.Tensor:
    return scale[..., None, :, None]
