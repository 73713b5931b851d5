"""Keep finished parts of a calibration on disk, so that an interrupted one can continue: `ResumeFolder`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ..files.atomic import write_json
from ..files.schema import check_mapping, read_json
from ..quantization.qparams import LinearQParams
from ..quantization.result import CalibrationResult, require_layers

MANIFEST = "manifest.json"

logger = logging.getLogger(__name__)


class ResumeFolder:
    """Store one file per finished part, each written atomically.

    Args:
        path: folder, made if absent.
        fingerprint: of everything the calibration depends on: model, config, prompts.

    Raises:
        ValueError: the folder belongs to a calibration with another fingerprint, or its manifest is unreadable; the
            folder is left as it is.
        OSError: the folder cannot be written to; the message names it.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str) -> None:
        self.path, self.fingerprint = Path(path), fingerprint
        manifest = self.path / MANIFEST
        if manifest.is_file():
            try:
                stored = check_mapping(read_json(manifest), {"fingerprint": str}, manifest)["fingerprint"]
            except ValueError as error:
                raise ValueError(
                    f"{manifest} is not the manifest of a calibration ({error}): pass another folder"
                ) from error
            if stored != fingerprint:
                raise ValueError(
                    f"{self.path} holds a calibration of another model, config or prompts (fingerprint {stored[:12]}, "
                    f"expected {fingerprint[:12]}): pass another folder, or remove this one"
                )
            return
        write_json({"fingerprint": fingerprint}, manifest)

    def holds(self, part: str) -> bool:
        """Tell whether a part is finished."""
        return self._file(part).is_file()

    def load(self, part: str, linears: Mapping[str, nn.Linear]) -> Mapping[str, LinearQParams] | None:
        """Load the layers of a finished part; None if it is not there.

        None with a warning if its file is damaged, or of another calibration or other layers: the part is done again.
        """
        path = self._file(part)
        if not self.holds(part):
            return None
        try:
            result = CalibrationResult.load(path)
            if result.config_hash != self.fingerprint:
                raise ValueError(f"{path} belongs to another calibration")
            require_layers(result.layers, linears, path)
        except (OSError, ValueError) as error:
            logger.warning("A finished part of the calibration is not used, and done again: %s", error)
            return None
        return result.layers

    def save(self, part: str, layers: Mapping[str, LinearQParams]) -> None:
        """Store a finished part."""
        CalibrationResult(layers, self.fingerprint).save(self._file(part))

    def _file(self, part: str) -> Path:
        return self.path / f"{part}.safetensors"
