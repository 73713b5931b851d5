"""Provide the causal Wan transformer; its K/V cache and rollout values are re-exported."""

from ..kv_cache.cache import KVCache, KVLayerCache
from ..rollout.config import CausalFields
from ..rollout.pass_info import PassInfo
from .causal_parts import CausalWanAttnProcessor
from .transformer_causal_wan import CausalWanTransformer3DModel

__all__ = [
    "CausalFields",
    "CausalWanAttnProcessor",
    "CausalWanTransformer3DModel",
    "KVCache",
    "KVLayerCache",
    "PassInfo",
]
