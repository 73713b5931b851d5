"""The causal transformer, its K/V cache, and the values in which family members differ."""

from .causal_fields import CausalFields
from .causal_parts import CausalWanAttnProcessor
from .kv_cache import KVCache, KVLayerCache
from .pass_info import PassInfo
from .transformer_causal_wan import CausalWanTransformer3DModel

__all__ = [
    "CausalFields",
    "CausalWanAttnProcessor",
    "CausalWanTransformer3DModel",
    "KVCache",
    "KVLayerCache",
    "PassInfo",
]
