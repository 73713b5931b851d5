"""Q-ARVD: post-training quantization for autoregressive video diffusion models, as a plugin for diffusers.

Importing this package registers the quantization method `qarvd` with diffusers and does nothing else: no device is
touched, no seed set, no logging configured. Public names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import moved
from .quantizer import register

__version__ = "0.1.0"

_PUBLIC = {
    "ARVDMixin": "pipelines.arvd_mixin",
    "ARVDPipeline": "pipelines.pipeline_arvd",
    "CausalWanTransformer3DModel": "models.transformer_causal_wan",
    "IntegerRenoiseScheduler": "schedulers.scheduling_integer_renoise",
    "KVCache": "kv_cache.cache",
    "ChunkUniPCScheduler": "schedulers.scheduling_chunk_unipc",
    "FewStepRenoiseScheduler": "schedulers.scheduling_few_step_renoise",
    "QARVDConfig": "config",
    "QARVDLinear": "quantization.linear",
    "bundled_model_path": "bundled",
    "calibrate": "calibration.calibrate",
    "convert_checkpoint": "conversion",
    "evaluate": "evaluation.fidelity",
    "export_int8_tensorwise": "conversion",
    "choose_bits": "pipelines.any_pipeline",
    "measure_rollouts": "pipelines.any_pipeline",
    "measure_sensitivity": "calibration.measure_sensitivity",
    "quantize": "pipelines.any_pipeline",
    "quantize_folder": "conversion",
    "PassInfo": "rollout.pass_info",
    "Report": "calibration.report",
    "save_single_file": "conversion",
    "quantized_linears": "quantization.model",
    "stored_bytes": "quantization.model",
    "to_original_keys": "conversion",
    "save_prompt_embeds": "rollout.text_encoder",
    "SensitivityResult": "calibration.sensitivity",
    "Stream": "rollout.stream",
    "WorldWanTransformer3DModel": "models.world",
}
# diffusers loads a component of this library if its class is a subclass of one that the library has under this name.
_BASES = {"ModelMixin": "diffusers"}

if TYPE_CHECKING:
    from .bundled import bundled_model_path
    from .calibration.calibrate import calibrate
    from .calibration.measure_sensitivity import measure_sensitivity
    from .calibration.report import Report
    from .calibration.sensitivity import SensitivityResult
    from .config import QARVDConfig
    from .conversion import (
        convert_checkpoint,
        export_int8_tensorwise,
        quantize_folder,
        save_single_file,
        to_original_keys,
    )
    from .evaluation.fidelity import evaluate
    from .kv_cache.cache import KVCache
    from .models.transformer_causal_wan import CausalWanTransformer3DModel
    from .models.world import WorldWanTransformer3DModel
    from .pipelines.any_pipeline import choose_bits, measure_rollouts, quantize
    from .pipelines.arvd_mixin import ARVDMixin
    from .pipelines.pipeline_arvd import ARVDPipeline
    from .quantization.linear import QARVDLinear
    from .quantization.model import quantized_linears, stored_bytes
    from .rollout.pass_info import PassInfo
    from .rollout.stream import Stream
    from .rollout.text_encoder import save_prompt_embeds
    from .schedulers.scheduling_chunk_unipc import ChunkUniPCScheduler
    from .schedulers.scheduling_few_step_renoise import FewStepRenoiseScheduler
    from .schedulers.scheduling_integer_renoise import IntegerRenoiseScheduler

__all__ = [
    "ARVDMixin",
    "ARVDPipeline",
    "CausalWanTransformer3DModel",
    "ChunkUniPCScheduler",
    "FewStepRenoiseScheduler",
    "IntegerRenoiseScheduler",
    "KVCache",
    "PassInfo",
    "QARVDConfig",
    "QARVDLinear",
    "Report",
    "SensitivityResult",
    "Stream",
    "WorldWanTransformer3DModel",
    "bundled_model_path",
    "calibrate",
    "choose_bits",
    "convert_checkpoint",
    "evaluate",
    "export_int8_tensorwise",
    "measure_rollouts",
    "measure_sensitivity",
    "quantize",
    "quantize_folder",
    "quantized_linears",
    "save_prompt_embeds",
    "save_single_file",
    "stored_bytes",
    "to_original_keys",
]


def __getattr__(name: str) -> Any:
    if name in _BASES:
        return getattr(importlib.import_module(_BASES[name]), name)
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


register()
moved.install()
