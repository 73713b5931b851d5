"""Prepare a saved pipeline for publishing and upload it: its model card, its licence and the files of its folder."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from torch import nn

from ..config import QARVDConfig
from ..files.atomic import atomic_file
from ..quantization.model import stored_bytes
from .model_card import CARD_FILE, REPORT_FILE, is_non_commercial, model_card, stated_licence, stored_report

logger = logging.getLogger(__name__)


class Publishable(Protocol):
    """A pipeline that can be published.

    Attributes:
        transformer: float or quantized.
        source: folder, file or Hub id that the pipeline was loaded from, or None.
    """

    transformer: nn.Module
    source: str | None

    @property
    def quantization(self) -> QARVDConfig | None:
        """The config that the transformer is quantized with, None for a float one."""

    @classmethod
    def import_path(cls) -> str:
        """Return the dotted name that users import the pipeline's class by."""


def complete_folder(
    pipe: Publishable, folder: Path, report: Mapping[str, Any] | None = None, repo_id: str | None = None
) -> None:
    """Turn what `DiffusionPipeline.save_pretrained` wrote into a folder that can be published.

    Removes local paths. A float model keeps the model card of its source. A quantized one gets a new card, and the
    float files of an int8 text encoder: stock classes load these, and they are quantized to the same bits again.

    Args:
        pipe: the saved pipeline.
        folder: where it was saved.
        report: what `evaluate` returned; None takes the report stored in the pipeline's source, if there is one.
        repo_id: Hub repository that the folder will be uploaded to.

    Raises:
        ValueError: if the text encoder is int8 and was not loaded from a folder.
    """
    _remove_local_paths(folder)
    if pipe.quantization is None:
        card = Path(pipe.source or "") / CARD_FILE
        if pipe.source and card.is_file():
            shutil.copyfile(card, folder / CARD_FILE)
        return
    text_encoder = getattr(pipe, "text_encoder", None)
    if pipe.quantization.text_encoder == "int8" and text_encoder is not None:
        _copy_float_files(text_encoder.name_or_path, folder / "text_encoder")
    write_card(pipe, folder, report or (stored_report(pipe.source) if pipe.source else None), repo_id)


def write_card(
    pipe: Publishable, folder: str | os.PathLike[str], report: Mapping[str, Any] | None, repo_id: str | None = None
) -> None:
    """Write the model card of a quantized pipeline, and the report that it shows, into a folder.

    Args:
        pipe: the pipeline.
        folder: where it is saved.
        report: what `evaluate` returned; with None, the card says that nothing was measured.
        repo_id: Hub repository of the card; None writes a placeholder.

    Raises:
        ValueError: if the pipeline is float.
    """
    config = pipe.quantization
    if config is None:
        raise ValueError("write_card describes a quantized pipeline, this one is float")
    licence = find_licence(pipe.source, config.base_model if repo_id else None)
    sizes = stored_bytes(pipe.transformer)
    card = model_card(config, sizes, report, config.base_model, licence, repo_id, pipe.import_path())
    texts = {CARD_FILE: str(card)}
    if report is not None:
        texts[REPORT_FILE] = json.dumps(report, indent=2)
    for name, text in texts.items():
        with atomic_file(Path(folder) / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def upload(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    accept_licence: bool = False,
) -> str:
    """Upload a folder to the Hub, after a warning if its licence is unknown or non-commercial.

    Args:
        folder: what to upload.
        repo_id: `user/name`; created if it does not exist.
        private: visibility of a new repository; None takes the account's default.
        token: Hub token; None takes the one that is logged in.
        commit_message: message of the commit.
        create_pr: open a pull request instead of committing.
        accept_licence: the caller may publish under a non-commercial licence; see `check_licence`.

    Returns:
        URL of the commit.

    Raises:
        ValueError: the licence is non-commercial and not accepted.
    """
    licence = find_licence(str(folder))
    check_licence(licence, repo_id, accept_licence)
    if licence is None:
        logger.warning(
            "No licence is known for the weights uploaded to %s: state it in README.md. Quantized weights inherit the "
            "licence of the base model.",
            repo_id,
        )
    elif is_non_commercial(licence):
        logger.warning(
            "The weights uploaded to %s are licensed %s: non-commercial. Quantized weights inherit the licence; the "
            "model card says so.",
            repo_id,
            licence,
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message, create_pr=create_pr)
    return commit.commit_url


def check_licence(licence: str | None, repo_id: str, accepted: bool) -> None:
    """Check that weights may be published.

    Args:
        licence: licence identifier of the weights, None if unknown.
        repo_id: Hub repository for them.
        accepted: the caller has read a non-commercial licence, and may publish under it.

    Raises:
        ValueError: the licence is non-commercial and not accepted.
    """
    if is_non_commercial(licence) and not accepted:
        raise ValueError(
            f"the weights for {repo_id} are licensed {licence}: non-commercial. Quantized weights inherit it: "
            "pass accept_licence=True if you may publish them under it"
        )


def find_licence(*models: str | None) -> str | None:
    """Return the licence stated by the first of several folders, files or Hub models that states one.

    None where no card states one, or the Hub cannot be reached.
    """
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


def _remove_local_paths(folder: Path) -> None:
    # diffusers records in the config of each component where it was loaded from.
    for path in folder.glob("*/*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_float_files(source: str, target: Path) -> None:
    """Replace an int8 text encoder by the float files that it was quantized from."""
    if not Path(source).is_dir():
        raise ValueError(
            f"the int8 text encoder was loaded from {source!r}, which is not a folder, and cannot be stored as int8: "
            "load the pipeline from a folder or the Hub, or without text_encoder='int8'"
        )
    shutil.rmtree(target)
    shutil.copytree(source, target)
