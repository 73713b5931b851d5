"""Run 8-bit attention of `ops.attention` on Hopper GPUs."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..checks import per_sample
from ..dispatch import takes_strides
from .build import library, message, unavailable_reason
from .device import unsupported_device

HEAD_DIM = 128  # compiled in src/attention_common.cuh
ROOM_MULTIPLE = 16  # tokens of a cache
MAX_ROOM = 2**24  # tokens; the kernel counts the work of its blocks in 32 bits


def unsupported_reason(operator: str, device: torch.device, arguments: Mapping[str, Any] | None) -> str | None:
    """Return why the operator cannot run here, or None; see `dispatch`."""
    reason = unsupported_device(device)
    if reason is None and arguments is not None:
        reason = _unsupported_layout(arguments["query"], arguments["key"], arguments["value"])
        if operator == "attention_int8" and arguments["query"].dtype != torch.bfloat16:
            reason = f"queries in {arguments['query'].dtype}, expected torch.bfloat16"
    return reason or unavailable_reason()


def _unsupported_layout(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Return what these tensors have that the kernel does not support, or None."""
    heads, head_dim = query.shape[2:]
    if head_dim != HEAD_DIM:
        return f"heads of {head_dim} channels, expected {HEAD_DIM}"
    if query.numel() == 0:
        return "an empty tensor"
    room = value.stride(3)
    if value.stride() != (heads * head_dim * room, 1, head_dim * room, room):
        return "the values are not stored with tokens innermost (an 8-bit K/V cache allocates them so)"
    if room > MAX_ROOM:
        return f"room for {room} tokens, at most {MAX_ROOM} can be counted"
    if room % ROOM_MULTIPLE or key.stride() != (room * heads * head_dim, heads * head_dim, head_dim, 1):
        return f"keys and values need the same room, a multiple of {ROOM_MULTIPLE} tokens"
    return None


@takes_strides
def attention_fp8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    length: int,
) -> Tensor:
    """Return bfloat16 `[B, T, H, D]`."""
    out = torch.empty(query.shape, dtype=torch.bfloat16, device=query.device)
    return _launch("fp8", query, key, value, (query_scale, key_scale, value_scale), length, out)


@takes_strides
def attention_int8(
    query: Tensor, key: Tensor, value: Tensor, key_scale: Tensor, value_scale: Tensor, length: int
) -> Tensor:
    """Return bfloat16 `[B, T, H, D]`."""
    out = torch.empty(query.shape, dtype=torch.bfloat16, device=query.device)
    return _launch("int8", query, key, value, (key_scale, value_scale), length, out)


def _launch(
    kind: str, query: Tensor, key: Tensor, value: Tensor, scales: tuple[Tensor, ...], length: int, out: Tensor
) -> Tensor:
    """Run the kernel of a kind and return `out`; the last two scales are those of keys and values."""
    query = query.contiguous()
    (batch, tokens, heads, head_dim), device = query.shape, query.get_device()
    scales = (*scales[:-2], *(per_sample(scale, batch) for scale in scales[-2:]))
    function, workspace_bytes = _function(kind, device)
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=query.device)
    code = function(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        batch,
        tokens,
        length,
        value.stride(3),
        heads,
        *(scale.data_ptr() for scale in scales),
        math.log2(math.e) / math.sqrt(head_dim),
        out.data_ptr(),
        workspace.data_ptr(),
        device,
        torch._C._cuda_getCurrentRawStream(device),
    )
    if code:
        raise RuntimeError(
            f"qarvd_kernels: attention_{kind} of {tuple(query.shape)} to {length} tokens failed: {message(code)}"
        )
    return out


@cache
def _function(kind: str, device: int) -> tuple[Any, int]:
    """Return the C function with its argument types, and the size of its workspace on a device."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    function, workspace = getattr(library(), f"qarvd_attention_{kind}"), library().qarvd_attention_workspace
    scales = {"fp8": 3, "int8": 2}[kind]
    function.argtypes = [
        *[pointer] * 3,
        *[integer] * 5,
        *[pointer] * scales,
        ctypes.c_float,
        pointer,
        pointer,
        integer,
        pointer,
    ]
    workspace.argtypes, workspace.restype = [integer], ctypes.c_longlong
    return function, workspace(torch.cuda.get_device_properties(device).multi_processor_count)
