"""Read controls of a world model: the text of Stream Generate, and what the page sends while a stream runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .compat import NodeError
from .library import library

if TYPE_CHECKING:
    from qarvd_diffusers.controls.recording import Recording


def recorded(text: str) -> Recording | None:
    """Return the controls in a text of JSON lines; None if it is empty."""
    try:
        return library("controls.recording").parse_recording(text, "controls") if text.strip() else None
    except ValueError as error:
        raise NodeError(f"{error}.", "Correct the lines of controls, or leave them empty.") from error


def later_controls(pipe: Any, recording: Recording | None, done: int, num_chunks: int) -> Callable[[int], Any]:
    """Return the controls of a stream that goes on after `done` chunks; the recording counts from there."""
    if recording is None:
        return lambda chunk: None
    frames = [pipe.rollout_config.num_frames_per_chunk] * num_chunks
    controls = recording.controls(frames, pipe.config.fps, pipe.vae_scale_factor_temporal)
    return lambda chunk: controls[chunk - done]


def keys() -> list[str]:
    """Return the keys that do something, as browsers name them, in lower case."""
    return list(library("controls.control").KEYS)


def pressed(values: dict[str, Any]) -> Any:
    """Return the control that the page describes: `keys`, and `mouse` in degrees.

    Raises:
        ValueError: if it is none.
    """
    return library("controls.control").Control.of({name: values[name] for name in ("keys", "mouse") if name in values})
