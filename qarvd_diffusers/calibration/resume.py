"""Keep finished parts of a calibration on disk, so that an interrupted one can continue: `ResumeFolder`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..files.atomic import write_json
from ..quantization.qparams import LinearQParams
from ..quantization.result import CalibrationResult

MANIFEST = "manifest.json"


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
                stored = json.loads(manifest.read_text(encoding="utf-8"))["fingerprint"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{manifest} is not the manifest of a calibration: pass another folder") from error
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

    def load(self, part: str, names: Iterable[str]) -> Mapping[str, LinearQParams] | None:
        """Load the layers of a finished part; None if it is not there.

        Raises:
            ValueError: its file is damaged or holds other layers; the message names it.
        """
        path = self._file(part)
        if not self.holds(part):
            return None
        result = CalibrationResult.load(path)
        if result.config_hash != self.fingerprint or set(result.layers) != set(names):
            raise ValueError(f"{path} belongs to another calibration: remove it")
        return result.layers

    def save(self, part: str, layers: Mapping[str, LinearQParams]) -> None:
        """Store a finished part."""
        CalibrationResult(layers, self.fingerprint).save(self._file(part))

    def _file(self, part: str) -> Path:
        return self.path / f"{part}.safetensors"
