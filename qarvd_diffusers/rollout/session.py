"""Hold what a `Stream` and the generator that makes its chunks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from .chunk_loop import ChunkLoop
from .decoder import StatefulDecoder
from .inputs import StreamInputs
from .pass_info import PassInfo
from .steering import ControlSource

if TYPE_CHECKING:
    from .host import StreamHost


class SavedState(Protocol):
    """The state of a stream when it was saved."""

    def restore(self, loop: ChunkLoop, decoder: StatefulDecoder | None) -> None:
        """Restore the state into a new loop and decoder."""


@runtime_checkable
class _ClearableCache(Protocol):
    def clear(self) -> None: ...


@dataclass(frozen=True)
class PromptChange:
    """A new prompt for the next chunk.

    Attributes:
        text: arguments of `encode_prompt`.
        how: one of `PROMPT_SWITCHES`.
        chunks: chunks over which the embeddings go from the old prompt's to the new one's.
    """

    text: dict[str, Any]
    how: str
    chunks: int = 1


@dataclass(frozen=True)
class StepCallback:
    """The caller's `callback_on_step_end`.

    Attributes:
        function: called after every denoising step, or None.
        tensor_names: names of the tensors that it gets.
    """

    function: Callable[..., dict[str, Any] | None] | None = None
    tensor_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class StreamRequest:
    """What the caller asked for.

    Attributes:
        inputs: noise, start and length.
        text: arguments of `encode_prompt`.
        output_type: see `Frames`.
        kv_cache: storage of the K/V cache.
        overlap_decoding: see `ARVDMixin.stream`.
        callback: see `ARVDMixin.stream`.
        on_pass: see `ARVDMixin.stream`.
        decoder: decodes instead of the pipeline's decoder; None takes that.
        saved: state to resume from; None starts at the beginning.
    """

    inputs: StreamInputs
    text: dict[str, Any]
    output_type: str
    kv_cache: str = "auto"
    overlap_decoding: bool = False
    callback: StepCallback = StepCallback()
    on_pass: Callable[[PassInfo], None] | None = None
    decoder: StatefulDecoder | None = None
    saved: SavedState | None = None


@dataclass
class LiveStream:
    """The parts of a running stream that hold memory.

    Attributes:
        loop: makes the latents.
        decoder: None where nothing needs pixels.
    """

    loop: ChunkLoop
    decoder: StatefulDecoder | None

    def release(self) -> None:
        """Free all memory, even while a traceback still holds the objects that used it."""
        if isinstance(self.loop.cache, _ClearableCache):
            self.loop.cache.clear()
        if self.decoder is not None:
            self.decoder.reset()
        self.loop.on_step = self.loop.before_chunk = self.loop.reencode = None  # these refer back to the loop


@dataclass
class StreamSession:
    """What a stream and its generator share. The generator does not know the stream: dropping the stream ends it at
    once.

    Attributes:
        request: what the caller asked for.
        changes: prompts that apply to the next chunks, one for each; written by the thread that calls `set_prompt`.
        closing: the stream is to end as soon as possible; written by the thread that calls `close`.
        controls: what steers the chunks from the next one on, if that was changed; written by the thread that calls
            `set_controls`.
        steered: controls were passed or changed.
        live: the running stream, written by the thread that iterates; None before it starts and after it ends.
    """

    request: StreamRequest
    changes: list[PromptChange] = field(default_factory=list)
    closing: bool = False
    controls: ControlSource | None = None
    steered: bool = False
    live: LiveStream | None = None

    @property
    def loop(self) -> ChunkLoop | None:
        """The loop of the running stream."""
        return None if self.live is None else self.live.loop

    def encode_changes(self, pipe: StreamHost, before: torch.Tensor) -> list[PromptChange]:
        """Encode the prompts of `changes`, split a change over several chunks into one per chunk, and return
        `changes`.

        Args:
            pipe: encodes prompts.
            before: current embeddings `[B, text_tokens, text_dim]`.

        Raises:
            ValueError: if a change over several chunks has embeddings of another length than the current ones.
        """
        waiting, encoded = self.changes, []
        for change in waiting:
            after = pipe.embed_prompt(**change.text)
            if change.chunks > 1 and after.shape != before.shape:
                raise ValueError(
                    f"prompt_embeds has shape {list(after.shape)}, expected {list(before.shape)}, that of the "
                    "current prompt, to change over several chunks"
                )
            for step in range(1, change.chunks + 1):
                embeds = after if step == change.chunks else torch.lerp(before, after, step / change.chunks)
                encoded.append(PromptChange({"prompt_embeds": embeds}, change.how))
        if self.changes is waiting:  # else another thread has just set another prompt, from the next chunk on
            self.changes = encoded
        return encoded

    def release(self) -> None:
        """End the running stream and free its memory."""
        if self.live is not None:
            self.live.release()
            self.live = None
