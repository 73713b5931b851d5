"""Launch Triton kernels at the cost of a dictionary look-up; helpers that all kernels share."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_ALIGNMENT = 16  # bytes; what Triton's vectorized loads ask of a pointer
_MIN_CAPABILITY = (8, 0)
LARGEST_ROW = 16384  # channels


def unsupported_device(device: torch.device) -> str | None:
    """Return why the kernels of this folder cannot run on a device, or None."""
    if INTERPRETED.value:
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, the tensors are on {device.type}"
    if torch.version.hip:
        return "tuned and tested on NVIDIA GPUs only"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        least, got = (".".join(map(str, version)) for version in (_MIN_CAPABILITY, capability))
        return f"needs compute capability {least} (int8 tensor cores), this device has {got}"
    return None


def unsupported_empty(arguments: dict[str, Any] | None) -> str | None:
    """Return a reason for empty tensors, which would give an empty grid; or None."""
    tensors = [value for value in (arguments or {}).values() if isinstance(value, Tensor)]
    return "an empty tensor" if any(t.numel() == 0 for t in tensors) else None


def unsupported_row(columns: int) -> str | None:
    """Return why a kernel with one row per program cannot run, or None."""
    if columns > LARGEST_ROW:
        return f"rows of {columns} channels do not fit the registers of one program ({LARGEST_ROW})"
    return None


def row_warps(block: int) -> int:
    """Choose the number of warps of a program that holds one row.

    Measured on an H200 at C = 1536 (2, 4, 8, 16 warps: 27, 27, 20, 24 us) and C = 5120 (4, 8, 16: 92, 99, 102 us).
    """
    return min(max(block // 256, 1), 8) if block <= 2048 else 4 if block <= 8192 else 16


class Launcher:
    """A Triton kernel with a cache of compiled variants.

    Triton's own look-up binds and specializes every argument on every call, which takes longer than a small kernel
    runs. Here the caller names what decides the variant, and addresses are passed as numbers. The kernel's parameters
    must be: tensors (or None), then numbers (exempt from specialization), then constants, whose names are in capitals.

    Args:
        function: decorated with `triton.jit`.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._constant_names = [name for name in function.arg_names if name.isupper()]
        self._variants: dict[tuple, tuple] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[int | float, ...],
        constants: tuple[int, ...],
        options: tuple[int, int],
        kind: tuple,
    ) -> None:
        """Run on the current stream of the tensors' device; tensors are contiguous, the first one is not None.

        Args:
            grid: number of programs.
            tensors: in the kernel's order.
            numbers: likewise.
            constants: likewise.
            options: number of warps, number of pipeline stages.
            kind: the dtypes that can vary, and which optional tensors are None.
        """
        device = tensors[0].get_device()
        addresses, joined = [], 0
        for tensor in tensors:
            address = None if tensor is None else tensor.data_ptr()
            addresses.append(address)
            joined |= address or 0
        key = (device, kind, constants, options, joined % _ALIGNMENT == 0)
        variant = self._variants.get(key)
        if variant is None or device != torch.cuda.current_device():
            self._compile(key, grid, tensors, numbers)
            return
        run, function, metadata, current_stream = variant
        stream = current_stream(device)
        run(*grid, stream, function, metadata, None, None, None, *addresses, *numbers, *constants)

    def _compile(self, key: tuple, grid: tuple, tensors: tuple, numbers: tuple) -> None:
        """Compile and run by Triton's own launcher, on the right device."""
        device, _, constants, (warps, stages), _ = key
        named = dict(zip(self._constant_names, constants, strict=True))
        with torch.cuda.device(device) if device >= 0 else nullcontext():
            compiled = self.function[grid](*tensors, *numbers, **named, num_warps=warps, num_stages=stages)
        if compiled is not None:  # the interpreter compiles nothing
            current_stream = triton.runtime.driver.active.get_current_stream
            self._variants[key] = (compiled.run, compiled.function, compiled.packed_metadata, current_stream)


@triton.jit
def round_to_int(x):
    """Round float32 to int32, ties to even, in one instruction; x must fit."""
    if INTERPRETED:  # from 2^23 on a float32 has no fraction; below, adding 2^23 rounds it away
        size = tl.abs(x)
        size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
        return tl.where(x < 0, -size, size).to(tl.int32)
    else:
        return tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def group_values(table, first, index):
    """Load, per element, entry 0 of a table of two where `index < first`, else entry 1."""
    return tl.where(index < first, tl.load(table), tl.load(table + 1))


@triton.jit
def factors(table, channel, mask):
    """Load, per channel of a row of a weight in groups, integer factor and zero-point; see `StoredWeight`."""
    byte = tl.load(table + channel // 16, mask=mask, other=0).to(tl.int32)
    return (byte & 15) + 1, byte >> 4


@triton.jit
def group_quantizer(scale, zero_point, first, index):
    """Load, per element, inverse scale, lowest level (as float32) and offset of its group; see `quantize`."""
    outlier, normal = tl.load(zero_point), tl.load(zero_point + 1)
    inverse = tl.where(index < first, 1.0 / tl.load(scale), 1.0 / tl.load(scale + 1))
    low = tl.where(index < first, -outlier.to(tl.float32), -normal.to(tl.float32))
    return inverse, low, tl.where(index < first, outlier - 128, normal - 128)


@triton.jit
def quantize(x, inverse, low, offset):
    """Quantize float32 to an int8 code minus 128; clamping to integer bounds before rounding changes nothing."""
    return (round_to_int(tl.minimum(tl.maximum(x * inverse, low), low + 255.0)) + offset).to(tl.int8)


@triton.jit
def rotate(value, ROTATION: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Apply the orthonormal Walsh-Hadamard transform to blocks of 2^BITS neighbours of a row `[BLOCK]`."""
    for bit in tl.static_range(BITS):
        pairs = tl.permute(tl.reshape(value, [BLOCK // (2 << bit), 2, 1 << bit]), (0, 2, 1))
        first, second = tl.split(pairs)
        pairs = tl.permute(tl.join(first + second, first - second), (0, 2, 1))
        value = tl.reshape(pairs, [BLOCK])
    return value * (ROTATION**-0.5)


@triton.jit
def store_row(
    value,
    channel_scale,
    codes,
    row_scale,
    row,
    K: tl.constexpr,
    ROTATION: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scale and rotate a row `[BLOCK]`, and store its int8 codes and its scale."""
    channel = tl.arange(0, BLOCK)
    value *= tl.load(channel_scale + channel, mask=channel < K, other=0.0)
    value = rotate(value, ROTATION, BITS, BLOCK)
    step = tl.max(tl.abs(value), axis=0) / 127.0
    step = tl.where(step < 1.1754943508222875e-38, 1.0, step)
    level = tl.minimum(tl.maximum(value * (1.0 / step), -127.0), 127.0)
    tl.store(codes + row * K + channel, round_to_int(level).to(tl.int8), mask=channel < K)
    tl.store(row_scale + row, step)


@cache
def block_of(size: int, largest: int) -> int:
    """Return the power of two that covers `size`, at most `largest`."""
    return min(triton.next_power_of_2(size), largest)
