"""Run QK norm, RoPE and cache append in one pass over qkv; run attention with integer scores.

Attention on an H200, 4680 queries, 12 heads of 128, microseconds (2026-11-23, torch 2.11.0+cu130, triton 3.6.0):

    keys                         4680   18720   32760
    cuDNN, bfloat16               263     996    1732
    torch flash, bfloat16         454    1736    3022
    this                          373    1417    2481

On Hopper it is faster than FlashAttention-2 and slower than cuDNN, so an int8 cache saves memory there, not time. It
is meant for GPUs without the Hopper kernels of cuDNN and FlashAttention-3, where it has not been measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import per_sample
from ..dispatch import takes_strides
from ..ops.attention import KEY_TILE
from .configs import attention_config
from .launch import Launcher, round_to_int, unsupported_device, unsupported_empty

_LARGEST_ROW = 16384
_FLOAT8_CAPABILITY = (8, 9)
_HEAD_DIMS = (64, 128)
_VALUE_TOKENS = 64  # of one program that stores values with tokens innermost
_room = cache(triton.next_power_of_2)
_MAGIC = tl.constexpr(0x4B400000)  # bits of 1.5 * 2^23: added to an integer below 2^22 it is that integer as a float
_MAGIC_FLOAT = tl.constexpr(12582912.0)
_LOG2_255 = tl.constexpr(7.994353436858858)


def unsupported_reason(operator: str, device: torch.device, arguments: Mapping[str, Any] | None) -> str | None:
    """Return why the operator cannot run here, or None; see `dispatch`."""
    reason = unsupported_device(device) or unsupported_empty(arguments)
    if reason or arguments is None:
        return reason
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    float8 = any(t.dtype == torch.float8_e4m3fn for t in tensors)
    if float8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < _FLOAT8_CAPABILITY:
        return "float8 needs compute capability 8.9"
    if operator == "attention_int8":
        head_dim = arguments["query"].shape[3]
        if head_dim not in _HEAD_DIMS:
            return f"head_dim {head_dim} is none of {_HEAD_DIMS}"
        return _unsupported_layout(arguments["key"], arguments["value"])
    head_dim = arguments["key_cache"].shape[3]
    if head_dim != triton.next_power_of_2(head_dim):
        return f"head_dim {head_dim} is no power of two"
    width = arguments["q_weight"].shape[0]
    if width > _LARGEST_ROW:
        return f"rows of {width} channels do not fit the registers of one program ({_LARGEST_ROW})"
    return _unsupported_layout(arguments["key_cache"], arguments["value_cache"])


def _unsupported_layout(key: Tensor, value: Tensor) -> str | None:
    """Return what the memory layout of a cache has that the kernels do not support, or None."""
    if not key.is_contiguous() or not (value.is_contiguous() or _tokens_last(value)):
        return "the cache is neither contiguous nor, in its values, with tokens innermost"
    return None


def _tokens_last(value: Tensor) -> bool:
    """Return whether `[B, S, H, D]` has the memory layout `[B, H, D, S]`, S a multiple of 16."""
    return value.shape[1] % 16 == 0 and value.permute(0, 2, 3, 1).is_contiguous()


@triton.jit
def _coded(value, dtype: tl.constexpr):
    """Convert to the dtype of a cache, clamped to its range."""
    if dtype == tl.int8:
        value = round_to_int(tl.minimum(tl.maximum(value, -127.0), 127.0))
    elif dtype == tl.float8e4nv:
        value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    return value.to(dtype)


@triton.jit
def _store(row, value, channel, mask):
    """Write one token `[H, D]` in the dtype that `row` points to."""
    tl.store(row + channel, _coded(value, row.dtype.element_ty), mask=mask)


@triton.jit
def _channels(HEADS: tl.constexpr, DIM: tl.constexpr, ROOM: tl.constexpr):
    """Return heads `[ROOM]`, channels `[ROOM, DIM]` and the mask `[ROOM, 1]` of the heads that exist."""
    head = tl.arange(0, ROOM)
    return head, head[:, None] * DIM + tl.arange(0, DIM)[None, :], (head < HEADS)[:, None]


@triton.jit
def _inverse(scale, head, HEADS: tl.constexpr):
    """Load 1 / scale per head, as a column."""
    return (1.0 / tl.load(scale + head, mask=head < HEADS, other=1.0))[:, None]


@triton.jit
def _norm_rotate(value, weight, c, s, eps, HEADS: tl.constexpr, DIM: tl.constexpr, ROOM: tl.constexpr):
    """Apply RMSNorm over all heads, then RoPE on the pairs of each."""
    square = tl.sum(tl.sum(value * value, axis=1), axis=0)
    value = value * tl.rsqrt(square / (HEADS * DIM) + eps) * weight
    even, odd = tl.split(tl.reshape(value, [ROOM, DIM // 2, 2]))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [ROOM, DIM])


@triton.jit
def _rotated(value, weight, scale, c, s, eps, HEADS: tl.constexpr, DIM: tl.constexpr, ROOM: tl.constexpr):
    """Normalize and rotate one token `[H, D]` and divide it by its scale, which may be None."""
    head, channel, mask = _channels(HEADS, DIM, ROOM)
    # Loads come before the reduction of the norm: they could not be moved across its barrier.
    weight = tl.load(weight + channel, mask=mask, other=0.0)
    if scale is not None:
        inverse = _inverse(scale, head, HEADS)
    value = _norm_rotate(value, weight, c, s, eps, HEADS, DIM, ROOM)
    if scale is not None:
        value *= inverse
    return value


@triton.jit(do_not_specialize=["eps", "tokens", "room_key", "room_value", "start"])
def qk_norm_rope_append_kernel(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    key_cache,
    value_cache,
    query_scale,
    key_scale,
    value_scale,
    query,
    eps,
    tokens,
    room_key,
    room_value,
    start,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROOM: tl.constexpr,
):
    WIDTH: tl.constexpr = HEADS * DIM
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)  # part: 0 query, 1 key, 2 value
    batch, token = row // tokens, row % tokens
    head, channel, mask = _channels(HEADS, DIM, ROOM)
    value = tl.load(qkv + row * (3 * WIDTH) + part * WIDTH + channel, mask=mask, other=0.0).to(tl.float32)
    if part == 2:
        if value_scale is not None:
            value *= _inverse(value_scale + batch * HEADS, head, HEADS)
        _store(value_cache + (batch * room_value + start + token) * WIDTH, value, channel, mask)
    else:
        pair = (token * (DIM // 2) + tl.arange(0, DIM // 2))[None, :]
        c, s = tl.load(cos + pair), tl.load(sin + pair)
        if part == 0:
            value = _rotated(value, q_weight, query_scale, c, s, eps, HEADS, DIM, ROOM)
            _store(query + row * WIDTH, value, channel, mask)
        else:
            scale = None if key_scale is None else key_scale + batch * HEADS
            value = _rotated(value, k_weight, scale, c, s, eps, HEADS, DIM, ROOM)
            _store(key_cache + (batch * room_key + start + token) * WIDTH, value, channel, mask)


@triton.jit(do_not_specialize=["tokens", "room", "start"])
def append_values_kernel(
    qkv,
    value_cache,
    value_scale,
    tokens,
    room,
    start,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write the values of some tokens and one head into a cache with tokens innermost."""
    WIDTH: tl.constexpr = HEADS * DIM
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, DIM)
    mask = token < tokens
    row = (batch * tokens + token) * (3 * WIDTH) + 2 * WIDTH + head * DIM
    value = tl.load(qkv + row[:, None] + channel[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
    if value_scale is not None:
        value *= 1.0 / tl.load(value_scale + batch * HEADS + head)
    at = ((batch * HEADS + head) * DIM + channel)[:, None] * room + start + token[None, :]
    tl.store(value_cache + at, _coded(tl.trans(value), value_cache.dtype.element_ty), mask=mask[None, :])


@triton.jit
def _value_tile(
    values,
    token,
    length,
    pitch,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
    INNERMOST: tl.constexpr,
):
    """Load the values of some tokens, `[KEYS, DIM]`; `pitch` is the room for tokens / 16 where they are innermost."""
    channel = tl.arange(0, DIM)
    if INNERMOST:
        at = token[:, None] + (channel.to(tl.int64) * (pitch * 16))[None, :]
    else:
        at = (token.to(tl.int64) * STRIDE)[:, None] + channel[None, :]
    if MASKED:
        value = tl.load(values + at, mask=(token < length)[:, None], other=0)
    else:
        value = tl.load(values + at)
    return value


@triton.jit
def _attend(
    codes,
    factor,
    keys,
    values,
    length,
    pitch,
    first,
    last,
    peak,
    total,
    out,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    INNERMOST: tl.constexpr,
):
    """Run online softmax over the tiles of keys from `first` to `last`.

    Weights and values are integers that float16 holds exactly, and a tile's sums of products are exact in float32.
    Integer tensor cores would want both operands signed and the summed dimension innermost in both, which costs more.
    """
    channel = tl.arange(0, DIM)
    for position in range(first, last, KEYS):
        token = position + tl.arange(0, KEYS)
        at = (token.to(tl.int64) * STRIDE)[None, :] + channel[:, None]
        if MASKED:
            key = tl.load(keys + at, mask=(token < length)[None, :], other=0)
        else:
            key = tl.load(keys + at)
        # A bit cast, not a conversion, makes integer scores floats.
        scores = tl.dot(codes, key, tl.full([ROWS, KEYS], _MAGIC, tl.int32), out_dtype=tl.int32)
        scores = scores.to(tl.float32, bitcast=True) - _MAGIC_FLOAT
        if MASKED:
            scores = tl.where((token < length)[None, :], scores, float("-inf"))
        largest = tl.max(scores, axis=1)
        levels = tl.exp2((scores - largest[:, None]) * factor[:, None] + _LOG2_255)
        levels = (levels + _MAGIC_FLOAT) - _MAGIC_FLOAT  # rounds to an integer
        value = _value_tile(values, token, length, pitch, STRIDE, DIM, MASKED, INNERMOST)
        sums = tl.dot(levels.to(tl.float16), value.to(tl.float16))
        new_peak = tl.maximum(peak, largest * factor)
        fade, share = tl.exp2(peak - new_peak), tl.exp2(largest * factor - new_peak)
        total = total * fade + tl.sum(levels, axis=1) * share
        out = out * fade[:, None] + sums * share[:, None]
        peak = new_peak
    return peak, total, out


@triton.jit
def _quantize_rows(q):
    """Quantize float32 rows to int8, each with its own scale; return codes and scales."""
    scale = tl.max(tl.abs(q), axis=1) / 127.0
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
    return round_to_int(q / scale[:, None]).to(tl.int8), scale


@triton.jit(do_not_specialize=["tokens", "room_key", "room_value", "pitch", "length", "score_scale"])
def attention_int8_kernel(
    query,
    keys,
    values,
    key_scale,
    value_scale,
    result,
    tokens,
    room_key,
    room_value,
    pitch,
    length,
    score_scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    INNERMOST: tl.constexpr,
):
    STRIDE: tl.constexpr = HEADS * DIM
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, DIM)
    at = (batch * tokens + row[:, None]) * STRIDE + head * DIM + channel[None, :]
    q = tl.load(query + at, mask=row[:, None] < tokens, other=0.0).to(tl.float32)
    codes, scale = _quantize_rows(q)
    factor = scale * (tl.load(key_scale + batch * HEADS + head) * score_scale)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DIM], tl.float32)
    keys += batch * room_key * STRIDE + head * DIM
    values += batch * room_value * STRIDE + head * DIM * (pitch * 16 if INNERMOST else 1)
    whole = (length // KEYS) * KEYS
    peak, total, out = _attend(
        codes,
        factor,
        keys,
        values,
        length,
        pitch,
        0,
        whole,
        peak,
        total,
        out,
        STRIDE,
        DIM,
        ROWS,
        KEYS,
        False,
        INNERMOST,
    )
    if whole < length:
        peak, total, out = _attend(
            codes,
            factor,
            keys,
            values,
            length,
            pitch,
            whole,
            length,
            peak,
            total,
            out,
            STRIDE,
            DIM,
            ROWS,
            KEYS,
            True,
            INNERMOST,
        )
    out *= tl.load(value_scale + batch * HEADS + head) / total[:, None]
    tl.store(result + at, out.to(result.dtype.element_ty), mask=row[:, None] < tokens)


_append = Launcher(qk_norm_rope_append_kernel)
_append_values = Launcher(append_values_kernel)
_attention = Launcher(attention_int8_kernel)


@takes_strides
def qk_norm_rope_append(qkv: Tensor, *arguments: Any) -> Tensor:
    """Return q `[B, T, H, D]`, normalized and rotated; write k, treated likewise, and v into the caches."""
    q_weight, k_weight, eps, cos, sin, key_cache, value_cache, query_scale, *scales, start = arguments
    qkv, q_weight, k_weight, cos, sin = (t.contiguous() for t in (qkv, q_weight, k_weight, cos, sin))
    (batch, tokens), (heads, head_dim) = qkv.shape[:2], key_cache.shape[2:]
    in_one = value_cache.is_contiguous()
    dtype = qkv.dtype if query_scale is None else key_cache.dtype
    query = torch.empty((batch, tokens, heads, head_dim), dtype=dtype, device=qkv.device)
    room = _room(heads)
    key_scale, value_scale = (per_sample(scale, batch) for scale in scales)
    _append(
        (batch * tokens, 3 if in_one else 2, 1),
        (qkv, q_weight, k_weight, cos, sin, key_cache, value_cache, query_scale, key_scale, value_scale, query),
        (eps, tokens, key_cache.shape[1], value_cache.shape[1], start),
        (heads, head_dim, room),
        (min(max(room * head_dim // 512, 1), 16), 1),
        (qkv.dtype, key_cache.dtype, value_cache.dtype, query_scale is None),
    )
    if not in_one:
        _append_values(
            (triton.cdiv(tokens, _VALUE_TOKENS), heads, batch),
            (qkv, value_cache, value_scale),
            (tokens, value_cache.shape[1], start),
            (heads, head_dim, _VALUE_TOKENS),
            (4, 1),
            (qkv.dtype, value_cache.dtype, value_scale is None),
        )
    return query


@takes_strides
def attention_int8(
    query: Tensor, key: Tensor, value: Tensor, key_scale: Tensor, value_scale: Tensor, length: int
) -> Tensor:
    """Return `[B, T, H, D]`."""
    query = query.contiguous()
    result = torch.empty_like(query)
    batch, tokens, heads, head_dim = query.shape
    key_scale, value_scale = per_sample(key_scale, batch), per_sample(value_scale, batch)
    rows, warps, stages = attention_config(query.get_device(), head_dim)
    innermost = _tokens_last(value)
    score_scale = head_dim**-0.5 * 1.4426950408889634  # softmax in base 2
    _attention(
        (triton.cdiv(tokens, rows), heads, batch),
        (query, key, value, key_scale, value_scale, result),
        (tokens, key.shape[1], value.shape[1], value.shape[1] // 16, length, score_scale),
        (heads, head_dim, rows, KEY_TILE, int(innermost)),
        (warps, stages),
        (query.dtype, innermost),
    )
    return result
