"""Q-ARVD: post-training quantization for autoregressive video diffusion models, as a plugin for diffusers.

Importing this package registers the quantization method `qarvd` with diffusers and does nothing else: no device is
touched, no seed set, no logging configured. Public names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .quantizer import register

__version__ = "0.1.0"

_PUBLIC = {
    "ARVDMixin": "pipelines.arvd_mixin",
    "ARVDPipeline": "pipelines.pipeline_arvd",
    "CausalWanTransformer3DModel": "models.transformer_causal_wan",
    "KVCache": "models.kv_cache",
    "ChunkUniPCScheduler": "schedulers.scheduling_chunk_unipc",
    "FewStepRenoiseScheduler": "schedulers.scheduling_few_step_renoise",
    "QARVDConfig": "config",
    "QARVDLinear": "linear",
    "bundled_model_path": "bundled",
    "calibrate": "calibration.calibrate",
    "convert_checkpoint": "conversion",
    "evaluate": "evaluation.fidelity",
    "export_int8_tensorwise": "conversion",
    "measure_sensitivity": "pipelines.sensitivity",
    "quantize_folder": "conversion",
    "save_single_file": "conversion",
    "quantized_linears": "serialization",
    "stored_bytes": "serialization",
    "to_original_keys": "conversion",
    "save_prompt_embeds": "pipelines.text_encoder",
    "SensitivityResult": "calibration.sensitivity",
    "Stream": "pipelines.stream",
}

if TYPE_CHECKING:
    from .bundled import bundled_model_path
    from .calibration.calibrate import calibrate
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
    from .linear import QARVDLinear
    from .models.kv_cache import KVCache
    from .models.transformer_causal_wan import CausalWanTransformer3DModel
    from .pipelines.arvd_mixin import ARVDMixin
    from .pipelines.pipeline_arvd import ARVDPipeline
    from .pipelines.sensitivity import measure_sensitivity
    from .pipelines.stream import Stream
    from .pipelines.text_encoder import save_prompt_embeds
    from .schedulers.scheduling_chunk_unipc import ChunkUniPCScheduler
    from .schedulers.scheduling_few_step_renoise import FewStepRenoiseScheduler
    from .serialization import quantized_linears, stored_bytes

__all__ = [
    "ARVDMixin",
    "ARVDPipeline",
    "CausalWanTransformer3DModel",
    "ChunkUniPCScheduler",
    "FewStepRenoiseScheduler",
    "KVCache",
    "QARVDConfig",
    "QARVDLinear",
    "SensitivityResult",
    "Stream",
    "bundled_model_path",
    "calibrate",
    "convert_checkpoint",
    "evaluate",
    "export_int8_tensorwise",
    "measure_sensitivity",
    "quantize_folder",
    "quantized_linears",
    "save_prompt_embeds",
    "save_single_file",
    "stored_bytes",
    "to_original_keys",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


register()
