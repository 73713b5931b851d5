"""Add LoRAs to a pipeline for one run; the pipeline that other nodes share is as before afterwards."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .compat import NodeError


@dataclass(frozen=True)
class Lora:
    """Name a LoRA file.

    Attributes:
        name: as ComfyUI lists it.
        path: path of the file.
        strength: factor of the difference.
        stamp: changes with the file.
    """

    name: str
    path: str
    strength: float
    stamp: str

    @property
    def adapter(self) -> str:
        """Return the adapter's name; a saved stream continues exactly only with adapters of the same names."""
        digest = hashlib.sha256(f"{self.name} {self.stamp}".encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9]', '_', Path(self.name).stem)}_{digest}"


@contextmanager
def applied(pipe: Any, loras: Sequence[Lora]) -> Iterator[None]:
    """Add LoRAs to the transformer of `pipe` in the `with` block.

    Raises:
        NodeError: if PEFT is missing, or a file is damaged or made for another model.
    """
    if not loras:
        yield
        return
    if importlib.util.find_spec("peft") is None:
        raise NodeError(
            "LoRAs need the package peft, which is not installed.",
            f"Run {sys.executable} -m pip install peft, then restart ComfyUI.",
        )
    try:
        for lora in loras:
            try:
                pipe.load_lora_weights(lora.path, adapter_name=lora.adapter)
            except (OSError, ValueError) as error:
                raise NodeError(
                    f"The LoRA {lora.name} cannot be used: {' '.join(str(error).split())}.",
                    "Choose a LoRA that was made for this model.",
                ) from error
        pipe.set_adapters([lora.adapter for lora in loras], [lora.strength for lora in loras])
        yield
    finally:
        pipe.unload_lora_weights()
