"""Say what each chunk of a stream is steered by: controls that the transformer gets in every pass of the chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

ControlSource = Callable[[int], Any]
"""Return the controls of a generated chunk, given its index; asked once for every chunk, in order."""


def control_source(controls: Any, num_chunks: int | None) -> ControlSource:
    """Return the source of the controls of a whole stream.

    Args:
        controls: a function of the chunk's index; an iterator; a sequence, tensor or array with one entry per chunk;
            or a mapping from chunks to entries that hold from these chunks on (None before the first).
        num_chunks: chunks of the stream, or None if it has no end.

    Raises:
        ValueError: another type, or another number of entries than chunks.
    """
    if callable(controls):
        return controls
    if isinstance(controls, Iterator):
        return _Numbered(controls)
    if isinstance(controls, Mapping):
        wrong = [key for key in controls if not isinstance(key, int) or key < 0 or key >= (num_chunks or key + 1)]
        if wrong:
            raise ValueError(f"controls has the key {wrong[0]!r}, expected chunks from 0 to {_last(num_chunks)}")
        starts = sorted(controls)
        return lambda chunk: controls.get(max((start for start in starts if start <= chunk), default=None))
    if isinstance(controls, str) or not (isinstance(controls, Sequence) or hasattr(controls, "shape")):
        raise ValueError(
            f"controls is a {type(controls).__name__}, expected one entry per chunk (a sequence, a tensor, a mapping "
            "or an iterator), or a function of the chunk's index"
        )
    if len(controls) != num_chunks:
        limit = "has no end: pass num_chunks, or a function" if num_chunks is None else f"has {num_chunks} chunks"
        raise ValueError(f"controls has {len(controls)} entries, the stream {limit}")
    return controls.__getitem__


def joined(controls: Sequence[Any], frames: int) -> torch.Tensor:
    """Return the controls of the last `frames` latent frames of several chunks, `[B, C, frames, ...]`.

    Raises:
        ValueError: they are not tensors with a dimension of frames, or not known for all frames.
    """
    known = all(isinstance(one, torch.Tensor) and one.ndim > 2 for one in controls)
    if not known or sum(one.shape[2] for one in controls) < frames:
        raise ValueError(
            "the frames of the window cannot be encoded again: the controls of their chunks are not kept, or not "
            "tensors [B, C, F, ...]; switch the prompt with another on_prompt_switch than 'recache'"
        )
    return torch.cat(list(controls), dim=2)[:, :, -frames:]


class _Numbered:
    """Give the values of an iterator by number; the current one any number of times."""

    def __init__(self, values: Iterator[Any]) -> None:
        self._values, self._next, self._value = values, 0, None

    def __call__(self, chunk: int) -> Any:
        while self._next <= chunk:
            try:
                self._value = next(self._values)
            except StopIteration:
                raise ValueError(f"controls ended before chunk {self._next}: give one entry per chunk") from None
            self._next += 1
        return self._value


def _last(num_chunks: int | None) -> str:
    return "any number" if num_chunks is None else str(num_chunks - 1)
