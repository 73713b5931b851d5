"""Iterate over the chunks of a video, and change, pause, save or close it while it runs."""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from collections.abc import Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .config import PROMPT_SWITCHES
from .exclusive import model_lock
from .output import Chunk
from .saved_state import SavedStream, take_state
from .session import PromptChange, StreamSession
from .text_encoder import load_prompt_embeds

if TYPE_CHECKING:
    from .host import StreamHost


class Stream(Iterator[Chunk]):
    """Iterate over the `Chunk`s of one video; `ARVDMixin.stream` returns it.

    The stream owns all of its state. It ends with its last chunk, with `close`, with an exception, or when it is
    dropped. However it ends, its memory is freed immediately, and the pipeline can be used again. Use it in a `with`
    block if its end must not wait for the garbage collector.

    `set_prompt`, `set_controls`, `pause`, `resume` and `close` may be called from another thread than the one that
    iterates. Streams of one model may be iterated in several threads: they take turns, a chunk each, and none changes
    another's video.
    """

    def __init__(self, pipe: StreamHost, session: StreamSession, chunks: Generator[Chunk]) -> None:
        self._pipe = pipe
        self._session = session
        self._chunks = chunks
        self._model = model_lock(pipe.transformer)  # taken before `_running`
        self._running = threading.RLock()  # held while a chunk is generated
        self._making = False
        self._go = threading.Event()
        self._go.set()
        self._paused_by: int | None = None
        # Runs at interpreter exit too: if it closed any later, diffusers could not import what it needs.
        weakref.finalize(self, self._model.soon, partial(_end, chunks))

    def __next__(self) -> Chunk:
        if not self._go.is_set():
            if self._paused_by == threading.get_ident():
                raise RuntimeError(
                    "the stream is paused by the thread that asks for its next chunk: call resume() first"
                )
            self._go.wait()
        with self._model, self._running:
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
        """Whether the stream waits for `resume`."""
        return not self._go.is_set()

    def set_prompt(
        self,
        prompt: str | list[str] | None = None,
        *,
        prompt_embeds: torch.Tensor | str | os.PathLike[str] | None = None,
        on_prompt_switch: str | None = None,
        over_chunks: int = 1,
    ) -> None:
        """Switch to another prompt from the next chunk on; arguments are checked at once.

        Args:
            prompt: one prompt, or one per sample, as many as the stream was started with.
            prompt_embeds: `[B, text_tokens, text_dim]` instead of `prompt`, or a file of `save_prompt_embeds`.
            on_prompt_switch: what happens to the cached frames, one of `PROMPT_SWITCHES`; None takes the pipeline
                config's.
            over_chunks: number of chunks over which to interpolate to the new embeddings, in equal steps.

        Raises:
            ValueError: for arguments that do not fit each other or the stream, or if the stream has ended.
        """
        session = self._session
        how = on_prompt_switch or session.request.inputs.fields.on_prompt_switch
        if how not in PROMPT_SWITCHES:
            raise ValueError(f"on_prompt_switch is {how!r}, expected one of {', '.join(PROMPT_SWITCHES)}")
        if over_chunks < 1 or (over_chunks > 1 and how not in ("keep", "recache")):
            raise ValueError(
                f"over_chunks is {over_chunks} with on_prompt_switch={how!r}, expected 1, or more with 'keep' or "
                "'recache'"
            )
        prompt_embeds = load_prompt_embeds(prompt_embeds)
        self._pipe.check_prompt(prompt, prompt_embeds, session.request.inputs.shape[0])
        if session.closing or self._ended:
            raise ValueError("the stream has ended: a new prompt would have no effect")
        if how == "cut" and prompt is not None:
            prefix = session.request.inputs.fields.shot_prefix
            prompt = (
                _prefixed(prompt, prefix) if isinstance(prompt, str) else [_prefixed(text, prefix) for text in prompt]
            )
        text = {**session.request.text, "prompt": prompt, "prompt_embeds": prompt_embeds}
        session.changes = [PromptChange(text, how, over_chunks)]

    def set_controls(self, controls: Any) -> None:
        """Steer the chunks from the next one on by other controls; they are checked at once.

        Args:
            controls: of a chunk, which hold until they are changed again (a `Control`'s mouse and event act once); or
                a function of the chunk's index.

        Raises:
            ValueError: for controls that do not fit the model, or if the stream has ended.
        """
        session = self._session
        prepare = self._pipe.prepare_controls if callable(controls) else self._pipe.held
        source = prepare(controls, session.request.inputs)
        if session.closing or self._ended:
            raise ValueError("the stream has ended: other controls would have no effect")
        session.controls, session.steered = source, True

    def pause(self) -> None:
        """Make the following `next` wait for `resume` or `close`; a chunk in progress is finished and returned."""
        self._paused_by = threading.get_ident()
        self._go.clear()

    def resume(self) -> None:
        """Continue after `pause`."""
        self._go.set()

    def close(self) -> None:
        """End the stream and free its memory; a chunk that another thread makes ends after its current step."""
        self._session.closing = True
        self._go.set()
        if not self._running.acquire(blocking=False):
            return  # the thread that makes a chunk ends it at the next step, and then the stream
        self._running.release()
        with self._model, self._running:
            if not self._making:  # else a callback of the pass in progress called this
                self._chunks.close()

    def state(self) -> SavedStream:
        """Copy all that the stream continues from, after the chunk handed out last, to host memory.

        `ARVDMixin.restore_stream` continues from it, any number of times. It takes as much memory as the K/V cache.

        Raises:
            ValueError: if the stream has not started, has ended, or has state that cannot be copied.
        """
        with self._model, self._running:
            if self._making:
                raise ValueError("a callback cannot save the stream in the middle of a chunk: save it between two")
            return take_state(self._pipe, self._session)

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write the state after the latest chunk to a safetensors file.

        `ARVDMixin.restore_stream` resumes from it, bit-identical to this stream, in any process with the same model.
        If one stream runs on several GPUs, each process saves its own part: give each another file.

        Raises:
            ValueError: if the stream has not started, has ended, or has state that cannot be saved.
        """
        self.state().save(path)

    @property
    def _ended(self) -> bool:
        """Whether the last chunk, an exception or `close` has ended the stream."""
        return inspect.getgeneratorstate(self._chunks) == inspect.GEN_CLOSED


def _end(chunks: Generator[Chunk]) -> None:
    if (
        inspect.getgeneratorstate(chunks) != inspect.GEN_RUNNING
    ):  # else a thread that dies with the interpreter runs it
        chunks.close()


def _prefixed(prompt: str, prefix: str) -> str:
    return prompt if prompt.startswith(prefix) else prefix + prompt
