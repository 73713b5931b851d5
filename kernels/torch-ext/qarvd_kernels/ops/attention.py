"""Attention over a K/V cache: QK norm, RoPE and cache append in one operator; 8-bit attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..declare import operator
from .arguments import CacheScales, QKNorm

KEY_TILE = 128  # keys whose softmax weights `attention_int8` quantizes together


@operator(mutates=["key_cache", "value_cache"])
def qk_norm_rope_append(
    qkv: Tensor,
    norm: QKNorm,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    scales: CacheScales,
    start: int,
) -> Tensor:
    """Apply RMSNorm (over all heads) and RoPE (on interleaved pairs) to q and k; write k and v into the cache.

    Args:
        qkv: float `[B, T, 3 * H * D]`, a row holding q, k and v.
        norm: the fields of `QKNorm`.
        cos: float32 `[T, D / 2]`; the pair (a, b) = channels (2i, 2i + 1) of a head becomes
            `(a cos - b sin, a sin + b cos)`.
        sin: float32 `[T, D / 2]`.
        key_cache: `[B, S, H, D]`, written at tokens `start ... start + T - 1`. Plain in bfloat16, float16 or float32;
            int8 holds `clamp(round(k / key_scale), -127, 127)`, float8_e4m3fn holds `k / key_scale`, clamped to its
            range.
        value_cache: `[B, S, H, D]` likewise; may have another dtype, and tokens innermost (see `tokens_innermost`).
        scales: the fields of `CacheScales`.
        start: first cache token that is written.

    Returns:
        q `[B, T, H, D]`, normed and rotated, in the dtype of `qkv`, or, with `query_scale`, in that of `key_cache`.

    Raises:
        ValueError: a shape or dtype does not fit, scales and dtypes disagree, or the tokens do not fit the cache.
    """
    checks.matrix("rows of qkv", qkv.flatten(0, -2), None)
    batch, tokens, heads, head_dim = *qkv.shape[:2], *key_cache.shape[2:]
    checks.require(
        qkv.ndim == 3 and qkv.shape[2] == 3 * heads * head_dim,
        "shape of qkv",
        tuple(qkv.shape),
        f"[B, T, {3 * heads * head_dim}] (q, k and v of the cache's {heads} heads of {head_dim})",
    )
    for name, value in (("q_weight", norm.q_weight), ("k_weight", norm.k_weight)):
        checks.tensor(name, value, (heads * head_dim,), torch.float32)
    for name, value in (("cos", cos), ("sin", sin)):
        checks.tensor(name, value, (tokens, head_dim // 2), torch.float32)
    checks.cache("key", key_cache, scales.key_scale, (batch, heads, head_dim))
    checks.cache("value", value_cache, scales.value_scale, (batch, heads, head_dim))
    room = min(key_cache.shape[1], value_cache.shape[1])
    checks.require(0 <= start <= room - tokens, "start", start, f"0 to {room - tokens} ({tokens} of {room} tokens)")
    if scales.query_scale is None:
        return torch.empty((batch, tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    checks.tensor("query_scale", scales.query_scale, (heads,), torch.float32)
    checks.require(scales.key_scale is not None, "query_scale", "given", "None unless the key cache is 8-bit")
    return torch.empty((batch, tokens, heads, head_dim), dtype=key_cache.dtype, device=qkv.device)


@operator()
def attention_int8(
    query: Tensor, key: Tensor, value: Tensor, key_scale: Tensor, value_scale: Tensor, length: int
) -> Tensor:
    """Compute softmax attention over an int8 cache, without a mask; both products are exact integer products.

    Every query row is quantized to int8 with a scale of its own (its largest magnitude / 127); keys and values have
    one scale per head, or per sample and head (SageAttention, Zhang et al. 2024, arXiv 2410.02367). Softmax weights
    are quantized to `round(255 * exp(score - m))`, m being the row's largest score among the `KEY_TILE` keys of their
    own tile. The codes of a tile times its values are summed as integers, which `exp(m)` turns into its share of the
    row; the row is divided by the sum of the same codes. With one m for a whole row, long rows would lose all keys of
    little weight, which matter together.

    Args:
        query: bfloat16 or float16 `[B, T, H, D]`.
        key: int8 `[B, S, H, D]`.
        value: int8 `[B, S, H, D]`; `tokens_innermost` says which memory layout is fastest.
        key_scale: float32 `[H]`, or `[B, H]` (one per sample).
        value_scale: float32 `[H]` or `[B, H]`.
        length: the first `length` tokens of key and value are visible, 1 to S. Tiles begin at multiples of `KEY_TILE`.

    Returns:
        `[B, T, H, D]` in the dtype of `query`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    checks.require(
        query.ndim == 4 and query.dtype in (torch.bfloat16, torch.float16),
        "query",
        f"{query.dtype} {tuple(query.shape)}",
        "bfloat16 or float16 [B, T, H, D]",
    )
    batch, _, heads, head_dim = query.shape
    for name, tensor, scale in (("key", key, key_scale), ("value", value, value_scale)):
        checks.cache(name, tensor, scale, (batch, heads, head_dim))
        checks.require(tensor.dtype == torch.int8, f"dtype of {name}", tensor.dtype, "torch.int8")
    checks.require(1 <= length <= key.shape[1], "length", length, f"1 to {key.shape[1]} (the cached tokens)")
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


@operator()
def attention_fp8(
    query: Tensor, key: Tensor, value: Tensor, query_scale: Tensor, key_scale: Tensor, value_scale: Tensor, length: int
) -> Tensor:
    """Compute softmax attention on float8 queries, keys and values, without a mask.

    Both products use 8-bit tensor cores where the device has them.

    Args:
        query: float8_e4m3fn `[B, T, H, D]`.
        key: float8_e4m3fn `[B, S, H, D]`.
        value: float8_e4m3fn `[B, S, H, D]`; `tokens_innermost` says which memory layout is needed.
        query_scale: float32 `[H]`.
        key_scale: float32 `[H]`, or `[B, H]` (one per sample).
        value_scale: float32 `[H]` or `[B, H]`.
        length: the first `length` tokens of key and value are visible, 1 to S.

    Returns:
        bfloat16 `[B, T, H, D]`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    checks.require(
        query.ndim == 4 and query.dtype == torch.float8_e4m3fn,
        "query",
        f"{query.dtype} {tuple(query.shape)}",
        "float8_e4m3fn [B, T, H, D]",
    )
    batch, _, heads, head_dim = query.shape
    checks.tensor("query_scale", query_scale, (heads,), torch.float32)
    for name, tensor, scale in (("key", key, key_scale), ("value", value, value_scale)):
        checks.cache(name, tensor, scale, (batch, heads, head_dim))
        checks.require(tensor.dtype == query.dtype, f"dtype of {name}", tensor.dtype, str(query.dtype))
    checks.require(1 <= length <= key.shape[1], "length", length, f"1 to {key.shape[1]} (the cached tokens)")
    return torch.empty(query.shape, dtype=torch.bfloat16, device=query.device)
