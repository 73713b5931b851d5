"""Define `QuantizableMixin`: loading, calibrating, quantizing, saving and publishing a pipeline."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.calibrate import Progress
from ..calibration.measure_sensitivity import measure_sensitivity
from ..calibration.mixed_precision import choose_bits
from ..calibration.pipeline import calibrate_pipeline
from ..calibration.sensitivity import SensitivityResult
from ..config import QARVDConfig
from ..conversion.folder import FEW_STEP_SCHEDULERS, write_portable_parts
from ..files.atomic import atomic_directory
from ..hub import publish
from ..hub.model_card import owned_files
from ..quantization.result import CalibrationResult
from .arguments import loading_arguments
from .quantization import check_stored_config, quantize_pipeline, quantize_text_encoder, split_config
from .stored_components import check_components, check_folder, named_errors

if TYPE_CHECKING:
    from typing_extensions import Self


class QuantizableMixin:
    """Add quantization, loading, saving and publishing to a streaming `DiffusionPipeline` with a `transformer`.

    Put it (through `ARVDMixin`) before `DiffusionPipeline` among the bases.

    Attributes:
        source: folder, file or Hub id that the pipeline was loaded from, or None.
    """

    source: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Load a pipeline; with `quantization_config`, calibrate and quantize a float one.

        Args:
            pretrained_model_name_or_path: folder or Hub id, float or quantized.
            **kwargs: those of `DiffusionPipeline.from_pretrained`. `quantization_config` may be a `QARVDConfig`, its
                dict, or a `PipelineQuantizationConfig` that maps `transformer` to a `QARVDConfig`. Calibration runs on
                the GPU if there is one, shows its progress, and is cached by content.

        Raises:
            ValueError: if the repository is quantized with another config, or `quantization_config` names a component
                that the pipeline does not have.
            ValueError: if a file lacks a tensor, or has one of another shape or kind; see `check_components`.
            OSError: if a file is missing, truncated or damaged; the message names the file.
        """
        kwargs = loading_arguments(cls, kwargs)
        config, rest = split_config(kwargs.pop("quantization_config", None))
        if rest is not None:
            kwargs["quantization_config"] = rest
        kwargs.setdefault("use_safetensors", True)  # by default, diffusers falls back to pickled weights
        folder = Path(pretrained_model_name_or_path) if os.path.isdir(pretrained_model_name_or_path) else None
        with named_errors(str(pretrained_model_name_or_path), folder, kwargs):
            if folder is not None:
                check_folder(cls, folder, kwargs, kwargs.get("variant"))
            pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        pipe.source = str(pretrained_model_name_or_path)
        passed = {name for name in pipe.components if name in kwargs}
        check_components({k: v for k, v in pipe.components.items() if k not in passed}, kwargs.get("variant"))
        unknown = sorted(set(getattr(rest, "quant_mapping", None) or {}) - set(pipe.components))
        if unknown:
            raise ValueError(f"quantization_config names {unknown}, the pipeline has {sorted(pipe.components)}")
        pipe.quantize_on_loading(config)
        return pipe

    def quantize_on_loading(self, config: QARVDConfig | None) -> None:
        """Quantize the loaded components that are to be quantized and are still float.

        Args:
            config: the config that the caller passed.

        Raises:
            ValueError: if the transformer is quantized with another config.
        """
        stored = self.quantization
        if stored is not None and config is not None:
            check_stored_config(stored, config)
        elif config is not None:
            self.quantize(config)
        elif stored is not None and stored.text_encoder == "int8" and self.text_encoder is not None:
            quantize_text_encoder(self.text_encoder)

    @classmethod
    def import_path(cls) -> str:
        """Return the dotted name that users import this class by."""
        module = cls.__module__
        return f"{module.partition('.')[0] if module.startswith('qarvd_diffusers.') else module}.{cls.__name__}"

    @property
    def quantization(self) -> QARVDConfig | None:
        """The config that the transformer is quantized with, None if it is float."""
        config = self.transformer.config.get("quantization_config")
        if config is None or isinstance(config, QARVDConfig):
            return config
        return QARVDConfig.from_dict(config)

    def calibrate(
        self,
        config: QARVDConfig,
        use_cache: bool = True,
        resume: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> CalibrationResult:
        """Compute integer weights and quantizer parameters for `config`; the pipeline stays float.

        Arguments and errors are those of `calibration.pipeline.calibrate_pipeline`. The result is cached under a hash
        of the weights, the config and the prompts.
        """
        return calibrate_pipeline(self, config, use_cache, resume, progress)

    def measure_sensitivity(self, config: QARVDConfig, prompts: Sequence[str], **options: Any) -> SensitivityResult:
        """Measure the error of the whole video caused by quantizing one chunk; the pipeline stays float.

        Args:
            config: scheme and calibration of the quantized passes.
            prompts: each is rolled out once per measured chunk, and once in float.
            **options: `num_chunks`, `seed`, `result`, `path` of `calibration.measure_sensitivity.measure_sensitivity`.
        """
        return measure_sensitivity(self, config, prompts, **options)

    def choose_bits(self, config: QARVDConfig, budget: float = 0.1, **options: Any) -> QARVDConfig:
        """Return a config with 8 bits for the most sensitive layers of a 4-bit scheme; the pipeline stays float.

        Args:
            config: a scheme with 4-bit weights.
            budget: largest share of the weights that gets 8 bits.
            **options: `prompts`, `num_chunks`, `seed` of `calibration.mixed_precision.choose_bits`.
        """
        return choose_bits(self, config, budget, **options)

    def quantize(self, config: QARVDConfig, result: CalibrationResult | None = None) -> None:
        """Quantize the transformer in place, and the text encoder if `config.text_encoder` is set.

        Args:
            config: scheme, prompts and options.
            result: what `calibrate(config)` returned; None calibrates first.
        """
        quantize_pipeline(self, config, result)
        if config.text_encoder == "int8":
            quantize_text_encoder(self.text_encoder)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        report: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save in the portable layout; the folder appears when it is complete.

        Stock diffusers classes load every component after `import qarvd_diffusers`. A quantized pipeline gets a model
        card. An int8 text encoder is stored in float, as it was loaded, and quantized again when loading.

        Args:
            save_directory: folder to write. It is replaced at once when all is written; files that others put there
                are kept, but no weights of a component that was saved, and no card or report of another model.
            push_to_hub: upload afterwards; `kwargs` may then include those of `push_to_hub`.
            report: what `evaluate` returned, for the model card.
            **kwargs: `variant`, `max_shard_size` as in `DiffusionPipeline.save_pretrained`.

        Raises:
            ValueError: for `safe_serialization=False`.
        """
        upload = {
            name: kwargs.pop(name)
            for name in ("repo_id", "private", "token", "commit_message", "create_pr", "accept_licence")
            if name in kwargs
        }
        if not push_to_hub and upload:
            raise ValueError(f"{sorted(upload)} need push_to_hub=True")
        if push_to_hub:
            self._check_licence(upload.get("repo_id", Path(save_directory).name), upload.get("accept_licence", False))
        with atomic_directory(save_directory, owned_files(save_directory)) as folder:
            self._write(folder, report, upload.get("repo_id"), **kwargs)
        if push_to_hub:
            self._upload(Path(save_directory), **{"repo_id": Path(save_directory).name, **upload})

    def push_to_hub(
        self,
        repo_id: str,
        report: Mapping[str, Any] | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        accept_licence: bool = False,
        **kwargs: Any,
    ) -> str:
        """Save in the portable layout and upload to the Hub; see `save_pretrained` and `hub.publish.upload`.

        Returns:
            URL of the commit.

        Raises:
            ValueError: for non-commercial weights without `accept_licence`.
        """
        self._check_licence(repo_id, accept_licence)
        with tempfile.TemporaryDirectory() as temporary:
            self._write(Path(temporary), report, repo_id, **kwargs)
            options = {"private": private, "token": token, "create_pr": create_pr, "accept_licence": accept_licence}
            return self._upload(Path(temporary), repo_id, commit_message, **options)

    def _write(self, folder: Path, report: Mapping[str, Any] | None, repo_id: str | None, **kwargs: Any) -> None:
        if not kwargs.pop("safe_serialization", True):
            raise ValueError(
                "safe_serialization=False writes pickles, which from_pretrained does not load: leave it out"
            )
        super().save_pretrained(folder, **kwargs)
        self.write_portable_parts(folder)
        publish.complete_folder(self, folder, report, repo_id)

    def _check_licence(self, repo_id: str, accepted: bool) -> None:
        base = None if self.quantization is None else self.quantization.base_model
        publish.check_licence(publish.find_licence(self.source, base), repo_id, accepted)

    def _upload(self, folder: Path, repo_id: str, commit_message: str | None = None, **options: Any) -> str:
        message = commit_message or f"Upload {type(self).__name__}"
        return publish.upload(folder, repo_id, commit_message=message, **options)

    def write_portable_parts(self, folder: Path) -> None:
        """Add what the portable layout has beyond `DiffusionPipeline.save_pretrained`; see `conversion.folder`."""
        scheduler = getattr(self, "scheduler", None)
        shift = scheduler.config["timestep_shift"] if isinstance(scheduler, FEW_STEP_SCHEDULERS) else None
        write_portable_parts(folder, self.import_path(), shift)

    def write_card(
        self, folder: str | os.PathLike[str], report: Mapping[str, Any] | None = None, repo_id: str | None = None
    ) -> None:
        """Write the model card of the quantized pipeline, and the report that it shows, into a folder.

        Args:
            folder: a folder that this pipeline is saved in.
            report: what `evaluate` returned; with None, the card says that nothing was measured.
            repo_id: Hub repository of the card; None writes a placeholder.

        Raises:
            ValueError: if the pipeline is float.
        """
        publish.write_card(self, folder, report, repo_id)
