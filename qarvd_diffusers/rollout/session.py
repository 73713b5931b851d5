"""`StreamSession`: what a `Stream` and the generator behind it share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .chunk_loop import ChunkLoop
from .decode_queue import Decoder
from .inputs import StreamInputs
from .pass_info import PassInfo

if TYPE_CHECKING:
    from .host import StreamHost


class SavedState(Protocol):
    """Where a stream stood when it was saved."""

    def restore(self, loop: ChunkLoop, decoder: Decoder | None) -> None:
        """Put a fresh loop and decoder there."""


@dataclass(frozen=True)
class PromptChange:
    """A new prompt that waits for the next chunk.

    Attributes:
        text: arguments of `encode_prompt`.
        how: one of `PROMPT_SWITCHES`.
        chunks: chunks over which embeddings go from the old prompt's to the new one's.
    """

    text: dict[str, Any]
    how: str
    chunks: int = 1


@dataclass
class StreamSession:
    """What a stream and the generator behind it share; the generator does not know the stream, so that dropping the
    stream ends it at once.

    Attributes:
        inputs: what the stream was started from.
        text: arguments of `encode_prompt`.
        output_type: see `Frames`.
        kv_cache: storage of the K/V cache.
        overlap_decoding: see `ARVDMixin.stream`.
        callback: `callback_on_step_end` and the names of the tensors that it gets.
        on_pass: see `ARVDMixin.stream`.
        make_decoder: makes the stream's decoder; None takes the pipeline's.
        saved: state to go on from; None starts at the beginning.
        loop: while the stream is alive.
        decoder: while the stream is alive; None where nothing needs pixels.
        changes: of the prompt, that wait for the next chunks, one for each.
        closing: the stream is to end as soon as possible.
    """

    inputs: StreamInputs
    text: dict[str, Any]
    output_type: str
    kv_cache: str = "auto"
    overlap_decoding: bool = False
    callback: tuple[Callable | None, tuple[str, ...]] = (None, ())
    on_pass: Callable[[PassInfo], None] | None = None
    make_decoder: Callable[[], Decoder] | None = None
    saved: SavedState | None = None
    loop: ChunkLoop | None = None
    decoder: Decoder | None = None
    changes: list[PromptChange] = field(default_factory=list)
    closing: bool = False

    def encode_changes(self, pipe: StreamHost) -> list[PromptChange]:
        """Encode the prompts that wait; a change over several chunks becomes one for each of them. Returns `changes`.

        Raises:
            ValueError: embeddings of another length than the present ones are to be reached over several chunks.
        """
        waiting, before, encoded = self.changes, self.loop.prompt_embeds, []
        for change in waiting:
            after = pipe.embed_prompt(**change.text)
            if change.chunks > 1 and after.shape != before.shape:
                raise ValueError(
                    f"prompt_embeds has shape {list(after.shape)}, expected {list(before.shape)}, that of the present prompt, to "
                    "go there over several chunks"
                )
            for step in range(1, change.chunks + 1):
                embeds = after if step == change.chunks else torch.lerp(before, after, step / change.chunks)
                encoded.append(PromptChange({"prompt_embeds": embeds}, change.how))
        if self.changes is waiting:  # else another thread has just asked for something else, from the next chunk on
            self.changes = encoded
        return encoded

    def release(self) -> None:
        """Give all memory back, also where a traceback still holds the objects that used it."""
        for part, method in ((self.loop and self.loop.cache, "clear"), (self.decoder, "reset")):
            getattr(part, method, lambda: None)()
        if self.loop is not None:
            self.loop.on_step = self.loop.before_chunk = self.loop.reencode = None  # these refer back to the loop
        self.loop = self.decoder = None
