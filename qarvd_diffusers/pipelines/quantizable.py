"""`QuantizableMixin`: `from_pretrained(..., quantization_config=...)`, `calibrate`, `quantize` and publishing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

from ..calibration.calibrate import Progress
from ..calibration.measure_sensitivity import measure_sensitivity
from ..calibration.mixed_precision import choose_bits
from ..calibration.pipeline import calibrate_pipeline
from ..calibration.sensitivity import SensitivityResult
from ..config import QARVDConfig
from ..files.atomic import atomic_directory, atomic_file
from ..hub.model_card import CARD_FILE, is_non_commercial, model_card, stated_licence
from ..quantization.model import stored_bytes
from ..quantization.result import CalibrationResult
from .arguments import loading_arguments
from .quantization import check_stored_config, quantize_pipeline, quantize_text_encoder, split_config

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

REPORT_FILE = "fidelity.json"


class QuantizableMixin:
    """What makes a streaming `DiffusionPipeline` with a `transformer` quantizable, loadable and publishable.

    Put it (through `ARVDMixin`) before `DiffusionPipeline` among the bases.

    Attributes:
        source: folder or Hub id the pipeline was loaded from, or None.
    """

    source: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Load a pipeline; a float one is calibrated and quantized if `quantization_config` asks for it.

        Args:
            pretrained_model_name_or_path: folder or Hub id, float or quantized.
            **kwargs: those of `DiffusionPipeline.from_pretrained`. `quantization_config` may be a `QARVDConfig`, its
                dict, or a `PipelineQuantizationConfig` that maps `transformer` to a `QARVDConfig`. Calibration runs on
                the GPU if there is one, shows its progress, and is cached by content.

        Raises:
            ValueError: the repository is quantized with another config, or `quantization_config` names a component the
                pipeline does not have.
            OSError: a file is missing, truncated or damaged; named.
        """
        kwargs = loading_arguments(cls, kwargs)
        config, rest = split_config(kwargs.pop("quantization_config", None))
        if rest is not None:
            kwargs["quantization_config"] = rest
        kwargs.setdefault("use_safetensors", True)  # otherwise a missing file falls back to pickled weights
        try:
            pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            if "Unable to load weights" not in str(error):
                raise
            raise OSError(f"{error}. The file is truncated or damaged: download or save it again.") from error
        pipe.source = str(pretrained_model_name_or_path)
        unknown = sorted(set(getattr(rest, "quant_mapping", None) or {}) - set(pipe.components))
        if unknown:
            raise ValueError(f"quantization_config names {unknown}, the pipeline has {sorted(pipe.components)}")
        pipe.quantize_on_loading(config)
        return pipe

    def quantize_on_loading(self, config: QARVDConfig | None) -> None:
        """What is left to do once the parts are loaded: quantize what is float, if it is asked for.

        Args:
            config: what the caller asked for.

        Raises:
            ValueError: the transformer is quantized with another config.
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
        """Where users import this class from, dotted."""
        module = cls.__module__
        return f"{module.partition('.')[0] if module.startswith('qarvd_diffusers.') else module}.{cls.__name__}"

    @property
    def quantization(self) -> QARVDConfig | None:
        """The config the transformer is quantized with, or None if it is float."""
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
        """Find integer weights and quantizer parameters for `config`; the pipeline stays float.

        Args:
            config: scheme, prompts and options.
            use_cache: reuse and keep the result under a hash of the weights, the config and the prompts.
            resume: folder for finished parts: an interrupted calibration with the same folder goes on where it stopped,
                to the same result. None keeps them in the cache, or nowhere without `use_cache`.
            progress: called with a text, the steps done and how many there are in all, at least once per transformer pass;
                what it raises ends the calibration and comes out here.
        """
        return calibrate_pipeline(self, config, use_cache, resume, progress)

    def measure_sensitivity(self, config: QARVDConfig, prompts: Sequence[str], **options: Any) -> SensitivityResult:
        """How much the error of the whole video grows when one chunk is generated quantized; the pipeline stays float.

        Args:
            config: scheme and calibration of the quantized passes.
            prompts: one rollout of every kind each.
            **options: `num_chunks`, `seed`, `result`, `path` of `pipelines.sensitivity.measure_sensitivity`.
        """
        return measure_sensitivity(self, config, prompts, **options)

    def choose_bits(self, config: QARVDConfig, budget: float = 0.1, **options: Any) -> QARVDConfig:
        """The config with 8 bits for the layers of a 4-bit scheme that cost most; the pipeline stays float.

        Args:
            config: a scheme of 4-bit weights.
            budget: share of the weights that may get 8 bits.
            **options: `prompts`, `num_chunks`, `seed` of `pipelines.mixed_bits.choose_bits`.
        """
        return choose_bits(self, config, budget, **options)

    def quantize(self, config: QARVDConfig, result: CalibrationResult | None = None) -> None:
        """Quantize the transformer in place, and the text encoder if the config says so.

        Args:
            config: scheme, prompts and options.
            result: what `calibrate(config)` returned; None calibrates now.
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
        """Save in the portable layout; the folder appears when all of it has been written.

        Stock diffusers classes load every component after `import qarvd_diffusers`. A quantized pipeline gets a model
        card. An int8 text encoder is stored in float, as it was loaded, and quantized again when loading.

        Args:
            save_directory: folder to write; files of the same names in it are replaced, others stay.
            push_to_hub: upload afterwards; `kwargs` are then those of `push_to_hub` too.
            report: what `evaluate` returned, for the model card.
            **kwargs: `variant`, `max_shard_size` as in `DiffusionPipeline.save_pretrained`.

        Raises:
            ValueError: for `safe_serialization=False`.
        """
        publish = {
            name: kwargs.pop(name)
            for name in ("repo_id", "private", "token", "commit_message", "create_pr")
            if name in kwargs
        }
        if not push_to_hub and publish:
            raise ValueError(f"{sorted(publish)} need push_to_hub=True")
        with atomic_directory(save_directory) as folder:
            self._write(folder, report, publish.get("repo_id"), **kwargs)
        if push_to_hub:
            publish.setdefault("repo_id", Path(save_directory).name)
            self._upload(Path(save_directory), **publish)

    def push_to_hub(
        self,
        repo_id: str,
        report: Mapping[str, Any] | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> str:
        """Publish to the Hub: safetensors, portable layout, a card with the measured report.

        Args:
            repo_id: `user/name`; created if it does not exist.
            report: what `evaluate` returned, for the model card.
            private: of a new repository.
            token: Hub token; None takes the logged-in one.
            commit_message: of the upload.
            create_pr: open a pull request instead of committing.
            **kwargs: as in `save_pretrained`.

        Returns:
            Address of the commit.
        """
        with tempfile.TemporaryDirectory() as temporary:
            self._write(Path(temporary), report, repo_id, **kwargs)
            return self._upload(Path(temporary), repo_id, private, token, commit_message, create_pr)

    def _write(self, folder: Path, report: Mapping[str, Any] | None, repo_id: str | None, **kwargs: Any) -> None:
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("safe_serialization=False writes pickles, which from_pretrained refuses: leave it out")
        super().save_pretrained(folder, **kwargs)
        self.write_portable_parts(folder)
        _forget_local_paths(folder)
        config = self.quantization
        if config is None:
            _copy_card(self.source, folder)
            return
        if config.text_encoder == "int8" and self.text_encoder is not None:
            _copy_float_files(self.text_encoder.name_or_path, folder / "text_encoder")
        self.write_card(folder, report or self._stored_report(), repo_id)

    def write_portable_parts(self, folder: Path) -> None:
        """Add what the portable layout has beyond `DiffusionPipeline.save_pretrained`."""
        module, _, name = self.import_path().rpartition(".")
        (folder / "pipeline.py").write_text(f"from {module} import {name}\n", encoding="utf-8")

    def write_card(
        self, folder: str | os.PathLike[str], report: Mapping[str, Any] | None = None, repo_id: str | None = None
    ) -> None:
        """Write the model card of the quantized pipeline, and the report it shows, into a folder.

        Args:
            folder: a folder this pipeline was, or is being, saved into.
            report: what `evaluate` returned; None says that nothing was measured.
            repo_id: where the card will live on the Hub.
        """
        config = self.quantization
        if config is None:
            raise ValueError("write_card describes a quantized pipeline, this one is float")
        licence = _licence(self.source, config.base_model if repo_id else None)
        sizes = stored_bytes(self.transformer)
        card = model_card(config, sizes, report, config.base_model, licence, repo_id, self.import_path())
        texts = {CARD_FILE: str(card)}
        if report is not None:
            texts[REPORT_FILE] = json.dumps(report, indent=2)
        for name, text in texts.items():
            with atomic_file(Path(folder) / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def _stored_report(self) -> dict[str, Any] | None:
        """The report saved beside the checkpoint this pipeline was loaded from."""
        path = Path(self.source or "") / REPORT_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _upload(
        self,
        folder: Path,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        _flag_licence(folder, repo_id)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
        )
        return commit.commit_url


def _forget_local_paths(folder: Path) -> None:
    """diffusers notes in every component's config where it was loaded from; a published folder should not tell."""
    for path in folder.glob("*/*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_card(source: str | None, target: Path) -> None:
    """A float model keeps the card of the folder it came from, and its licence with it."""
    card = Path(source or "") / CARD_FILE
    if source and card.is_file():
        shutil.copyfile(card, target / CARD_FILE)


def _copy_float_files(source: str, target: Path) -> None:
    """Store an int8 text encoder as the float files it was quantized from: stock classes load those, and bits agree."""
    if not Path(source).is_dir():
        raise ValueError(
            f"The int8 text encoder was loaded from {source!r}, which is no folder, and cannot be stored as int8. Load the "
            "pipeline from a folder or the Hub, or without text_encoder='int8'."
        )
    shutil.rmtree(target)
    shutil.copytree(source, target)


def _licence(*models: str | None) -> str | None:
    """Licence stated by the first of several folders, files or Hub models that states one; None without card or network."""
    for model in filter(None, models):
        path = Path(model)
        if path.exists():
            licence = stated_licence(path.parent if path.is_file() else path)
        else:
            try:
                licence = ModelCard.load(model).data.license
            except (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
                licence = None
        if licence is not None:
            return licence
    return None


def _flag_licence(folder: Path, repo_id: str) -> None:
    """Say before an upload what its licence is not, or forbids."""
    licence = _licence(str(folder))
    if licence is None:
        logger.warning(
            "No licence is known of what is uploaded to %s: state it in README.md. Weights inherit the base model's.",
            repo_id,
        )
    elif is_non_commercial(licence):
        logger.warning(
            "What is uploaded to %s is licensed %s: non-commercial. Quantized weights inherit that; the model card says so.",
            repo_id,
            licence,
        )
