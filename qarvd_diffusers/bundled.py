"""Find what ships with the package: the small trained model and the default calibration prompts."""

from __future__ import annotations

from pathlib import Path

from .files.text import parse_prompts

# The folder has another name than this module: a package folder of the same name would shadow it.
_ASSETS = Path(__file__).parent / "assets"


def bundled_model_path() -> str:
    """Return the folder of the bundled model, a small causal Wan (moving coloured shapes, 64x64)."""
    return str(_ASSETS / "tiny_arvd")


def bundled_prompts(name: str = "calibration") -> tuple[str, ...]:
    """Read the prompts of a file in `assets/prompts`; those of `calibration` describe general videos."""
    path = _ASSETS / "prompts" / f"{name}.txt"
    return parse_prompts(path.read_text(encoding="utf-8").splitlines(), str(path))
