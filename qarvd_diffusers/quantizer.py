"""Register the quantization method with diffusers: any `ModelMixin.from_pretrained` loads `qarvd` checkpoints."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer

from .config import PACKED_FORMAT, QARVDConfig, QARVDMethod

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

    from .calibration.report import Report
    from .quantization.result import CalibrationResult

logger = logging.getLogger(__name__)


class QARVDQuantizer(DiffusersQuantizer):
    """Load packed checkpoints strictly and bit-exactly; quantize float ones without data.

    A stored checkpoint names every quantized module (`QARVDConfig.modules`), so its empty modules are built before any
    tensor is read. A missing, unexpected, wrong-shape or wrong-dtype tensor raises an error that names it. A float
    checkpoint is quantized after loading, from its weights alone: schemes that need calibration become dynamic ones
    of the same bits, since a model has no prompts. `ARVDPipeline.from_pretrained` calibrates.
    """

    # Otherwise diffusers ignores the model's own list, and norms and modulation tables are cast from float32.
    use_keep_in_fp32_modules = True
    requires_calibration = False
    report: Report | None = None  # of the quantization, where it happened in this process

    def __init__(self, quantization_config: QARVDConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # from_single_file does not set pre_quantized; a config that names modules is one of a quantized checkpoint.
        self.pre_quantized = quantization_config.modules is not None
        self._loaded_keys: list[str] = []
        self._source = "the checkpoint"  # file, or folder of shards, for error messages

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Check the device map, before anything is loaded.

        Raises:
            ValueError: it has "disk", or several devices for a float model.
        """
        if not isinstance(device_map, dict):
            return
        if "disk" in map(str, device_map.values()):
            raise ValueError(
                "A qarvd model cannot be dispatched to disk: accelerate would cast its float32 scales. Pass a "
                "device_map "
                "without 'disk', or load to the CPU and call enable_group_offload(offload_to_disk_path=...)."
            )
        if not self.pre_quantized and len(set(map(str, device_map.values()))) > 1:
            raise ValueError(
                "Quantizing while loading over several devices is not supported. Quantize on one device, call "
                "save_pretrained, and load the saved folder with the device_map."
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Choose float32 by default, as diffusers does for a float model."""
        return torch.float32 if torch_dtype is None else torch_dtype  # what diffusers gives a float model

    @property
    def supports_parallel_loading(self) -> bool:
        """Whether diffusers may load shards in parallel: for stored checkpoints."""
        return self.pre_quantized

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember which keys come from which files, for checks and messages."""
        self._loaded_keys = list(loaded_keys)
        if checkpoint_files:
            self._source = os.path.commonpath(list(map(str, checkpoint_files)))
        return loaded_keys

    def _process_model_before_weight_loading(
        self,
        model: ModelMixin,
        state_dict: dict[str, torch.Tensor] | None = None,
        keep_in_fp32_modules: list[str] = (),
        **kwargs: Any,
    ) -> None:
        """Build the empty modules of a stored checkpoint, and check that its keys fit."""
        from .quantization.model import check_keys, install_empty_modules

        if self.pre_quantized:
            install_empty_modules(model, self.quantization_config.modules)
            check_keys(model, list(state_dict) if state_dict is not None else self._loaded_keys, self._source)

    def check_if_quantized_param(
        self, model: ModelMixin, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Tell whether a tensor belongs to a quantized module."""
        return self.pre_quantized and param_name.rpartition(".")[0] in self.quantization_config.modules

    def check_quantized_param_shape(
        self, param_name: str, current_param: torch.Size | torch.Tensor, loaded_param: torch.Tensor
    ) -> bool:
        """Check the shape of a stored tensor.

        Raises:
            ValueError: it differs from that of the empty parameter.
        """
        expected = tuple(getattr(current_param, "shape", current_param))
        if expected != tuple(loaded_param.shape):
            raise ValueError(
                f"{self._source}: {param_name} has shape {tuple(loaded_param.shape)} in the checkpoint, expected "
                f"{expected}: the file does not fit its config.json. Download or quantize it again."
            )
        return True

    def create_quantized_param(
        self,
        model: ModelMixin,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Assign a stored tensor to its quantized module.

        Raises:
            ValueError: its dtype is wrong; the message names file and tensor.
        """
        from .quantization.model import assign_stored_tensor

        # param_value was already cast to the model's dtype; the state dict still has the stored one.
        try:
            assign_stored_tensor(model, param_name, state_dict[param_name], target_device, dtype)
        except ValueError as error:
            raise ValueError(f"{self._source}: {error}") from None

    def _process_model_after_weight_loading(self, model: ModelMixin, **kwargs: Any) -> ModelMixin:
        """Check and align a stored checkpoint, or quantize a float model without data."""
        from .calibration.calibrate import quantize_weights
        from .calibration.report import make_report
        from .calibration.targets import select
        from .quantization.model import align_float_tensors, check_loaded, quantized_linears
        from .quantization.qparams import check_values

        if self.pre_quantized:
            check_loaded(model, self._source)
            clamped = self.quantization_config.recipe.clamp_zero_points
            check_values(quantized_linears(model), self._source, clamped)
            align_float_tensors(model)
            _declare_float32_scales(model)
            return model
        config = self.quantization_config
        if config.resolved_scheme.needs_calibration:
            data_free = f"{config.scheme}_dynamic"
            logger.warning(
                "Scheme %s needs calibration prompts, which a model alone does not have: using the data-free scheme "
                "%s. ARVDPipeline.from_pretrained(..., quantization_config=...) and quantize(...) calibrate.",
                config.scheme,
                data_free,
            )
            config = config.replace(scheme=data_free)
        config = config.replace(rounding="nearest")  # a model alone has no data for another rounding
        targets = select(model, config)
        result = quantize_weights(model, config, targets=targets)
        self.report = make_report(model, targets, result, config)
        install(model, result, config, self.report)
        self.quantization_config = model.hf_quantizer.quantization_config
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, torch.Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Check what is to be saved.

        Raises:
            ValueError: a pickle is asked for, or quantized modules carry adapters.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False writes pickles; a quantized model is stored as safetensors: leave it out"
            )
        adapters = sorted({key.split(".base_layer.")[0] for key in state_dict if ".base_layer." in key})
        if adapters:
            raise ValueError(
                f"{len(adapters)} quantized modules carry a LoRA adapter (first: {adapters[0]}); a checkpoint holds "
                "the base model alone. Call unload_lora_weights() or delete_adapters() and save again."
            )
        return state_dict, {}

    def _dequantize(self, model: ModelMixin) -> ModelMixin:
        """Replace the quantized layers by float ones."""
        from .quantization.install import dequantize

        dequantize(model)
        # The base class leaves this entry, with which a saved model would be loaded as quantized.
        model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "quantization_config"})
        return model

    @property
    def is_serializable(self) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model itself can be trained; adapters can."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether the model can be compiled."""
        return True


def install(model: ModelMixin, result: CalibrationResult, config: QARVDConfig, report: Report | None = None) -> None:
    """Replace the Linears of a float model by quantized ones, and mark the model as quantized, in place.

    Args:
        model: float model of diffusers.
        result: what calibration decided for it.
        config: stored in the model's config by `save_pretrained`, without the calibration prompts.
        report: of the quantization; logged, and kept as `model.hf_quantizer.report`.

    Raises:
        ValueError: a layer of the result is absent, quantized already, of another size, or holds values that `config`
            does not give; nothing is replaced.
    """
    from .quantization.install import apply
    from .quantization.model import unwrapped
    from .quantization.qparams import check_values

    check_values(result.layers, "the calibration result", config.recipe.clamp_zero_points)
    apply(model, result)
    attach(model, config)
    if report is not None:
        unwrapped(model).hf_quantizer.report = report
        logger.info("%s", report)


def attach(model: ModelMixin, config: QARVDConfig) -> None:
    """Mark a model whose Linears were quantized in memory, for `save_pretrained`; see `install`."""
    from .quantization.model import align_float_tensors, describe_modules, quantized_linears, unwrapped

    model = unwrapped(model)
    align_float_tensors(model)
    _declare_float32_scales(model)
    layout = max((layer.format for layer in quantized_linears(model).values()), default=PACKED_FORMAT)
    stored = config.for_checkpoint(describe_modules(model), layout)
    model.hf_quantizer = QARVDQuantizer(stored, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = stored.quant_method
    model.register_to_config(quantization_config=stored)


def _declare_float32_scales(model: ModelMixin) -> None:
    """Add the scales to what the model keeps in float32, so that they do not decide `model.dtype`.

    That is the dtype of the first floating-point parameter that is not listed, and a model may begin with a Linear
    without bias.
    """
    scales = ["weight_scale", "input_scale"]
    model._keep_in_fp32_modules = [*(model._keep_in_fp32_modules or []), *scales]


def register() -> None:
    """Register the method with diffusers, which has no plugin hook: these two dicts are its registry."""
    auto.AUTO_QUANTIZER_MAPPING[QARVDMethod.QARVD.value] = QARVDQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QARVDMethod.QARVD.value] = QARVDConfig
