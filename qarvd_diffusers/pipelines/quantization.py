"""Quantize a loaded pipeline, and check the configs that the user passes for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import PipelineQuantizationConfig

from ..calibration.pipeline import calibrate_pipeline, require_float
from ..calibration.report import make_report, with_chunk_weights
from ..calibration.targets import select
from ..config import QARVDConfig
from ..quantization.adapters import adapter_scales
from ..quantization.model import unwrapped
from ..quantization.result import CalibrationResult
from ..quantizer import install
from ..rollout.exclusive import model_lock

if TYPE_CHECKING:
    from ..rollout.host import PipelineHost

logger = logging.getLogger(__name__)


def split_config(quantization_config: Any) -> tuple[QARVDConfig | None, PipelineQuantizationConfig | None]:
    """Split `quantization_config` into the config of the transformer and that of other components.

    Args:
        quantization_config: `QARVDConfig`, its dict, a `PipelineQuantizationConfig` (whose `quant_mapping` may hold a
            `QARVDConfig` for the transformer beside configs of other components), or None.
    """
    if isinstance(quantization_config, dict):
        return QARVDConfig.from_dict(quantization_config), None
    if isinstance(quantization_config, PipelineQuantizationConfig):
        mapping = dict(quantization_config.quant_mapping or {})
        ours = mapping.pop("transformer", None)
        if not isinstance(ours, QARVDConfig):
            return None, quantization_config
        return ours, PipelineQuantizationConfig(quant_mapping=mapping) if mapping else None
    if quantization_config is None or isinstance(quantization_config, QARVDConfig):
        return quantization_config, None
    raise ValueError(
        f"quantization_config is a {type(quantization_config).__name__}, expected QARVDConfig, its dict, "
        "PipelineQuantizationConfig or None"
    )


def check_stored_config(stored: QARVDConfig, wanted: QARVDConfig) -> None:
    """Raise ValueError if a config differs from the one that a quantized checkpoint is stored with."""
    differing = {
        name: (getattr(stored, name), getattr(wanted, name))
        for name in ("scheme", "reference_compat")
        if getattr(stored, name) != getattr(wanted, name)
    }
    if differing:
        listed = ", ".join(f"{name}: stored {a!r}, passed {b!r}" for name, (a, b) in differing.items())
        raise ValueError(
            f"the checkpoint is quantized already and its config differs from the one passed ({listed}): load it "
            "without quantization_config, or quantize the float model"
        )


def quantize_pipeline(pipe: PipelineHost, config: QARVDConfig, result: CalibrationResult | None = None) -> None:
    """Quantize the pipeline's transformer in place; without a result, calibrate first."""
    with model_lock(pipe.transformer):  # streams of other threads wait
        require_float(pipe)
        config, why = with_chunk_weights(pipe.transformer, config)
        result = result or calibrate_pipeline(pipe, config)
        targets = select(pipe.transformer, config)
        report = make_report(unwrapped(pipe.transformer), targets, result, config, why)
        hub_id = pipe.source if pipe.source and not Path(pipe.source).exists() else None
        adapters = adapter_scales(pipe.transformer) if config.needs_calibration else {}
        config = config.replace(base_model=config.base_model or hub_id, calibration_adapters=adapters or None)
        install(pipe.transformer, result, config, report)


def quantize_text_encoder(text_encoder: torch.nn.Module) -> None:
    """Quantize the weights of a text encoder to int8 in place, by optimum-quanto."""
    from optimum.quanto import freeze, qint8, quantize

    quantize(text_encoder, weights=qint8)
    freeze(text_encoder)
