"""Run attention in the fused forward: K/V are written to the cache in its dtype and read from it as stored."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor

import qarvd_kernels as ops

from ...kv_cache.layer import KVLayerCache
from ...kv_cache.storage import encode

_FP8 = torch.float8_e4m3fn


class CachedSelfAttention:
    """Run what is between the q/k/v projection and the output projection of a block: norm, RoPE, the cache, attention.

    Args:
        attn: self-attention of the block.
    """

    def __init__(self, attn: WanAttention) -> None:
        self._attn = attn
        self._norms = attn.norm_q.weight.detach().float(), attn.norm_k.weight.detach().float(), attn.norm_q.eps
        # No value of a normalized and rotated query can exceed this bound, so that its float8 codes never saturate.
        channels = self._norms[0].numel()
        bound = channels**0.5 * self._norms[0].abs().unflatten(0, (attn.heads, -1)).amax(1)
        self._query_scale = (bound / torch.finfo(_FP8).max).clamp(min=1e-6)

    def __call__(
        self, qkv: Tensor, cache: KVLayerCache, rotary: tuple[Tensor, Tensor], start: int, store_only: bool = False
    ) -> Tensor | None:
        """Store K/V, and attend to all K/V up to them.

        Args:
            qkv: `[B, tokens, 3 C]`.
            cache: K/V of the block.
            rotary: cos and sin, float32 `[tokens, head_dim / 2]`.
            start: token of the cache at which the K/V of `qkv` start.
            store_only: do not attend.

        Returns:
            `[B, tokens, heads, head_dim]`, or None if `store_only`.
        """
        query = self.store(qkv, cache, rotary, start)
        return None if store_only else self.attend(query, cache, start + query.shape[1])

    def store(self, qkv: Tensor, cache: KVLayerCache, rotary: tuple[Tensor, Tensor], start: int) -> Tensor:
        """Store K/V; return the query `[B, tokens, heads, head_dim]` in the dtype that `attend` expects."""
        if self._attn.processor.split is not None:
            return self._store_split(qkv, cache, rotary, start)
        key_scale = value_scale = None
        if cache.key.dtype.itemsize == 1:
            if start == 0 and cache.fits_scales:
                self._fit_scales(qkv, cache, rotary)
            key_scale, value_scale = cache.key_scale, cache.value_scale
        query_scale = self._query_scale if cache.key.dtype == _FP8 else None
        scales = (query_scale, key_scale, value_scale)
        return ops.qk_norm_rope_append(qkv, *self._norms, *rotary, cache.key, cache.value, *scales, start)

    def _store_split(self, qkv: Tensor, cache: KVLayerCache, rotary: tuple[Tensor, Tensor], start: int) -> Tensor:
        """Store K/V of this process's tokens as K/V of all tokens of its heads; return the query likewise."""
        split = self._attn.processor.split
        query, key, value = split.to_heads(*self._norm_rope(qkv, rotary))
        cache.write(key, value, start)
        if cache.key.dtype != _FP8:
            return query
        return encode(query, split.own_heads(self._query_scale), _FP8)

    def _norm_rope(self, qkv: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalized and rotated q and k, and v, each `[B, tokens, heads, head_dim]`, without storing them."""
        heads = self._attn.heads
        shape = (*qkv.shape[:2], heads, qkv.shape[2] // (3 * heads))
        key, value = (torch.empty(shape, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
        query = ops.qk_norm_rope_append(qkv, *self._norms, *rotary, key, value, None, None, None, 0)
        return query, key, value

    def _fit_scales(self, qkv: Tensor, cache: KVLayerCache, rotary: tuple[Tensor, Tensor]) -> None:
        """Set the scales of an 8-bit cache from the K/V of its first chunk."""
        _, key, value = self._norm_rope(qkv, rotary)
        cache.fit_scales(key, value)

    def attend(self, query: Tensor, cache: KVLayerCache, stop: int) -> Tensor:
        """Attend with the result of `store` to the first `stop` tokens; return `[B, tokens, heads, head_dim]`."""
        split = self._attn.processor.split
        attended = self._attend(
            query, cache, stop, self._query_scale if split is None else split.own_heads(self._query_scale)
        )
        return attended if split is None else split.to_tokens(attended)

    def _attend(self, query: Tensor, cache: KVLayerCache, stop: int, query_scale: Tensor) -> Tensor:
        """Call the attention operator for the dtype of the cache."""
        scales = (cache.key_scale, cache.value_scale)
        if cache.key.dtype == _FP8:
            return ops.attention_fp8(query, cache.key, cache.value, query_scale, *scales, stop)
        if cache.key.dtype == torch.int8:
            query = query if query.dtype.itemsize == 2 else query.bfloat16()
            return ops.attention_int8(query, cache.key, cache.value, *scales, stop)
        return attend(query, cache.key[:, :stop], cache.value[:, :stop], self._attn)


def attend(query: Tensor, key: Tensor, value: Tensor, attn: WanAttention) -> Tensor:
    """Attend from `[B, tokens, heads, head_dim]` to `[B, keys, heads, head_dim]`.

    Runs on the backend that the user chose for the model, else on the fastest one.
    """
    backend = attn.processor._attention_backend
    if backend is None and query.is_cuda:
        return ops.attention(query, key.to(query.dtype), value.to(query.dtype))
    return dispatch_attention_fn(query, key.to(query.dtype), value.to(query.dtype), backend=backend)
