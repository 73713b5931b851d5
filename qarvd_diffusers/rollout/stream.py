"""`Stream`: a video in the making, chunk by chunk, and what one can do to it while it runs."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .config import PROMPT_SWITCHES
from .output import Chunk
from .saved_state import SavedStream, take_state
from .session import PromptChange, StreamSession
from .text_encoder import load_prompt_embeds

if TYPE_CHECKING:
    from .host import StreamHost


class Stream(Iterator[Chunk]):
    """Iterator over the `Chunk`s of one video, as `ARVDMixin.stream` returns it.

    All state is the stream's own. It ends with its last chunk, with `close`, with an exception, or when it is dropped; its
    memory is returned there and then, and the pipeline can be used at once. Use it in a `with` block where its end must
    not wait for the garbage collector.

    `set_prompt`, `pause`, `resume` and `close` may be called from another thread than the one that iterates. One model still
    runs one pass at a time: do not iterate over two streams of a pipeline in two threads.
    """

    def __init__(self, pipe: StreamHost, session: StreamSession, chunks: Generator[Chunk]) -> None:
        self._pipe = pipe
        self._session = session
        self._chunks = chunks
        self._running = threading.RLock()  # held while a chunk is made
        self._making = False
        self._go = threading.Event()
        self._go.set()
        self._paused_by: int | None = None
        # Also when the interpreter ends: closing later than this, diffusers could not import what it needs.
        weakref.finalize(self, _end, chunks)

    def __next__(self) -> Chunk:
        if not self._go.is_set():
            if self._paused_by == threading.get_ident():
                raise RuntimeError(
                    "the stream is paused by the thread that asks for its next chunk: call resume() first"
                )
            self._go.wait()
        with self._running:
            if not self._session.closing:
                self._making = True
                try:
                    chunk = next(self._chunks)
                finally:
                    self._making = False
                if not self._session.closing:
                    return chunk
            self._chunks.close()
            raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._session.closing

    @property
    def paused(self) -> bool:
        return not self._go.is_set()

    def set_prompt(
        self,
        prompt: str | list[str] | None = None,
        *,
        prompt_embeds: torch.Tensor | str | os.PathLike[str] | None = None,
        on_prompt_switch: str | None = None,
        over_chunks: int = 1,
    ) -> None:
        """Go on with another prompt from the next chunk on; checked at once.

        Args:
            prompt: one prompt, or one per sample, as many as the stream was started with.
            prompt_embeds: `[B, text_tokens, text_dim]` instead of `prompt`, or a file of `save_prompt_embeds`.
            on_prompt_switch: what becomes of the cached frames, one of `PROMPT_SWITCHES`; None takes the pipeline config's.
            over_chunks: go to the new embeddings in equal steps, one a chunk, instead of at once.

        Raises:
            ValueError: for arguments that do not fit each other or the stream, or if the stream has ended.
        """
        session = self._session
        how = on_prompt_switch or session.inputs.fields.on_prompt_switch
        if how not in PROMPT_SWITCHES:
            raise ValueError(f"on_prompt_switch is {how!r}, expected one of {', '.join(PROMPT_SWITCHES)}")
        if over_chunks < 1 or (over_chunks > 1 and how not in ("keep", "recache")):
            raise ValueError(
                f"over_chunks is {over_chunks} with on_prompt_switch={how!r}, expected 1, or more with 'keep' or 'recache'"
            )
        prompt_embeds = load_prompt_embeds(prompt_embeds)
        self._pipe.check_prompt(prompt, prompt_embeds, session.inputs.shape[0])
        if session.closing or self._ended:
            raise ValueError("the stream has ended: a new prompt would never be seen")
        if how == "cut" and prompt is not None:
            prompt = _prefixed(prompt, session.inputs.fields.shot_prefix)
        text = {**session.text, "prompt": prompt, "prompt_embeds": prompt_embeds}
        session.changes = [PromptChange(text, how, over_chunks)]

    def pause(self) -> None:
        """Let the next `next` wait for `resume` or `close`; a chunk in the making is finished and handed out."""
        self._paused_by = threading.get_ident()
        self._go.clear()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._go.set()

    def close(self) -> None:
        """End the stream and return its memory; a chunk that another thread is making is given up after its current step."""
        self._session.closing = True
        self._go.set()
        if self._running.acquire(blocking=False):
            try:
                if not self._making:  # else this is a callback of the pass in progress, which ends at the next step
                    self._chunks.close()
            finally:
                self._running.release()

    def state(self) -> SavedStream:
        """Copy all that the stream continues from, after the chunk handed out last, to host memory.

        `ARVDMixin.restore_stream` continues from it, any number of times. It takes as much memory as the K/V cache.

        Raises:
            ValueError: if the stream has not started, has ended, or has state that cannot be copied.
        """
        with self._running:
            if self._making:
                raise ValueError("a callback cannot save the stream in the middle of a chunk: save it between two")
            return take_state(self._pipe, self._session)

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write all that the stream goes on from, after the chunk handed out last, to a safetensors file.

        Of several GPUs that make one stream, each saves the part that it holds: give each a file of its own.
        `ARVDMixin.restore_stream` goes on from it, bit by bit as this stream does, in any process with the same model.

        Raises:
            ValueError: if the stream has not started, has ended, or has state that no file can hold.
        """
        self.state().save(path)

    @property
    def _ended(self) -> bool:
        return self._chunks.gi_frame is None


def _end(chunks: Generator[Chunk]) -> None:
    if not chunks.gi_running:  # else a thread that ends with the interpreter is making a chunk
        chunks.close()


def _prefixed(prompt: str | list[str], prefix: str) -> str | list[str]:
    if isinstance(prompt, list):
        return [_prefixed(text, prefix) for text in prompt]
    return prompt if prompt.startswith(prefix) else prefix + prompt
