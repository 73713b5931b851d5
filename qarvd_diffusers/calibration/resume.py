"""Keep finished parts of a calibration on disk, so that an interrupted one can continue: `ResumeFolder`."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..files.atomic import write_json
from ..files.schema import check_mapping, read_json
from ..quantization.qparams import LinearQParams
from ..quantization.result import CalibrationResult

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class ResumeFolder:
    """Store one file per finished part, each written atomically.

    Args:
        path: folder, made if absent.
        fingerprint: of everything the calibration depends on: model, config, prompts.
        disposable: what is damaged is removed with a warning, and made again; for a folder that nobody has asked for.

    Raises:
        ValueError: the folder belongs to a calibration with another fingerprint, or its manifest is unreadable; the
            folder is left as it is. Not if it is disposable.
        OSError: the folder cannot be written to; the message names it.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str, disposable: bool = False) -> None:
        self.path, self.fingerprint, self.disposable = Path(path), fingerprint, disposable
        manifest = self.path / MANIFEST
        try:
            held = self._check(manifest)
        except ValueError as error:
            if not disposable:
                raise
            logger.warning("What an interrupted calibration left is not used: %s", error)
            shutil.rmtree(self.path)
            held = False
        if not held:
            write_json({"fingerprint": fingerprint}, manifest)

    def _check(self, manifest: Path) -> bool:
        """Return whether the folder holds parts; raise ValueError if they are not of this calibration."""
        if manifest.is_file():
            try:
                stored = check_mapping(read_json(manifest), {"fingerprint": str}, "it")["fingerprint"]
            except ValueError as error:
                raise ValueError(
                    f"{manifest} is not the manifest of a calibration ({error}): pass another folder"
                ) from error
            if stored != self.fingerprint:
                raise ValueError(
                    f"{self.path} holds a calibration of another model, config or prompts (fingerprint {stored[:12]}, "
                    f"expected {self.fingerprint[:12]}): pass another folder, or remove this one"
                )
        return manifest.is_file()

    def holds(self, part: str) -> bool:
        """Tell whether a part is finished."""
        return self._file(part).is_file()

    def load(self, part: str, names: Iterable[str]) -> Mapping[str, LinearQParams] | None:
        """Load the layers of a finished part; None if it is not there.

        Raises:
            ValueError: its file is damaged or holds other layers; the message names it. Not if the folder is
                disposable: the part is removed then.
        """
        path = self._file(part)
        if not self.holds(part):
            return None
        try:
            result = CalibrationResult.load(path)
            if result.config_hash != self.fingerprint or set(result.layers) != set(names):
                raise ValueError(f"{path} belongs to another calibration: remove it")
        except ValueError as error:
            if not self.disposable:
                raise
            logger.warning("What an interrupted calibration left is not used: %s", error)
            path.unlink()
            return None
        return result.layers

    def save(self, part: str, layers: Mapping[str, LinearQParams]) -> None:
        """Store a finished part."""
        CalibrationResult(layers, self.fingerprint).save(self._file(part))

    def _file(self, part: str) -> Path:
        return self.path / f"{part}.safetensors"
