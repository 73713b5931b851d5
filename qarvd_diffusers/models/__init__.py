"""The causal transformer, its K/V cache, and the values in which family members differ."""

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
