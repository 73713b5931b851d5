"""What ships with the package: the small trained model and the prompts that calibrate a model by default."""

from __future__ import annotations

from pathlib import Path

from .config import parse_prompts

# The folder has another name than this module: a package folder of the same name would shadow it.
_ASSETS = Path(__file__).parent / "assets"


def bundled_model_path() -> str:
    """Folder of the small causal Wan model that ships with the package (moving coloured shapes, 64x64)."""
    return str(_ASSETS / "tiny_arvd")


def bundled_prompts(name: str = "calibration") -> tuple[str, ...]:
    """Prompts of a file in `assets/prompts`: `calibration` describes general videos, a model folder may bring its own."""
    path = _ASSETS / "prompts" / f"{name}.txt"
    return parse_prompts(path.read_text(encoding="utf-8").splitlines(), str(path))
