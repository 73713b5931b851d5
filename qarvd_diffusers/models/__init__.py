"""The causal transformer, its K/V cache, and the config of a rollout."""

from typing import Any

from ..kv_cache.cache import KVCache, KVLayerCache
from ..rollout import config as _config
from ..rollout.config import RolloutConfig
from ..rollout.pass_info import PassInfo
from .causal_parts import CausalWanAttnProcessor
from .transformer_causal_wan import CausalWanTransformer3DModel

__all__ = [
    "CausalWanAttnProcessor",
    "CausalWanTransformer3DModel",
    "KVCache",
    "KVLayerCache",
    "PassInfo",
    "RolloutConfig",
]


def __getattr__(name: str) -> Any:
    if name == "CausalFields":  # the name of version 0.1
        return getattr(_config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
