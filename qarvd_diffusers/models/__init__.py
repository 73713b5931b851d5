"""The causal transformer, its K/V cache, and the values in which family members differ."""

from .causal_fields import FAMILY_FIELDS, CausalFields
from .kv_cache import KVCache, KVLayerCache
from .pass_info import PassInfo
from .transformer_causal_wan import CausalWanAttnProcessor, CausalWanTransformer3DModel

__all__ = [
    "FAMILY_FIELDS",
    "CausalFields",
    "CausalWanAttnProcessor",
    "CausalWanTransformer3DModel",
    "KVCache",
    "KVLayerCache",
    "PassInfo",
]
