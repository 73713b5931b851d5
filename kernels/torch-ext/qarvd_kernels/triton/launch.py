"""Launching Triton kernels at the cost of a dictionary look-up, and what all of them share."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_ALIGNMENT = 16  # bytes; what Triton's vectorized loads ask of a pointer
_LEAST_CAPABILITY = (8, 0)


def device_refusal(device: torch.device) -> str | None:
    """Why no kernel of this package runs on a device, or None."""
    if INTERPRETED.value:
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, the tensors are on {device.type}"
    if torch.version.hip:
        return "tuned and tested on NVIDIA GPUs only"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        least, got = (".".join(map(str, version)) for version in (_LEAST_CAPABILITY, capability))
        return f"needs compute capability {least} (int8 tensor cores), this device has {got}"
    return None


def empty_refusal(arguments: dict[str, Any] | None) -> str | None:
    """A grid needs at least one program."""
    tensors = [value for value in (arguments or {}).values() if isinstance(value, Tensor)]
    return "an empty tensor" if any(t.numel() == 0 for t in tensors) else None


class Launcher:
    """A Triton kernel whose compiled variants are kept at hand.

    Triton's own look-up binds and specializes every argument on every call, which takes longer than a small kernel runs.
    Here a variant is found by what can differ: the constants, the dtypes of the tensors and whether they are aligned.
    The kernel's parameters must be: tensors (or None) and numbers first, numbers exempt from specialization, then the
    constants.

    Args:
        function: decorated with `triton.jit`.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        names = list(function.arg_names)
        self._constant_names = [name for name in names if name.isupper()]
        self._variants: dict[tuple, Any] = {}

    def __call__(
        self, device: int, grid: tuple[int, int, int], arguments: tuple, constants: tuple, options: tuple[int, int]
    ) -> None:
        """Run on the current stream of a device.

        Args:
            device: index of the CUDA device that holds the tensors.
            grid: number of programs.
            arguments: tensors, numbers and Nones, in the kernel's order.
            constants: its compile-time constants, in order.
            options: number of warps, number of pipeline stages.
        """
        if not INTERPRETED.value and torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                return self(device, grid, arguments, constants, options)
        kinds = [(a.dtype, a.data_ptr() % _ALIGNMENT == 0) if isinstance(a, Tensor) else a is None for a in arguments]
        variant = (device, constants, options, *kinds)
        compiled = self._variants.get(variant)
        if compiled is not None:
            compiled[grid](*arguments, *constants)
            return None
        named = dict(zip(self._constant_names, constants, strict=True))
        compiled = self.function[grid](*arguments, **named, num_warps=options[0], num_stages=options[1])
        if compiled is not None:  # the interpreter compiles nothing
            self._variants[variant] = compiled
        return None


@triton.jit
def round_to_int(x):
    """float32 -> int32, ties to even, in one instruction; x must fit."""
    if INTERPRETED:  # from 2^23 on a float32 has no fraction; below, adding 2^23 rounds it away
        size = tl.abs(x)
        size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
        return tl.where(x < 0, -size, size).to(tl.int32)
    else:
        return tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def quantize(x, inverse_scale, zero_point):
    """float32 -> int8 code - 128 of a static quantizer. Clamping before rounding to integer ends changes nothing."""
    low = -zero_point.to(tl.float32)
    level = tl.minimum(tl.maximum(x * inverse_scale, low), low + 255.0)
    return (round_to_int(level) + (zero_point - 128)).to(tl.int8)


@triton.jit
def group_values(table, first, index):
    """Per element: entry 0 of a table of two where `index < first`, else entry 1."""
    return tl.where(index < first, tl.load(table), tl.load(table + 1))


def block_of(size: int, largest: int) -> int:
    """The power of two that covers `size`, or `largest`."""
    return min(triton.next_power_of_2(size), largest)
