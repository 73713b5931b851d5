"""Generate the chunks of a `Stream`: run the chunk loop, the decoder and the callbacks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .chunk_loop import ChunkLoop
from .decode_queue import DecodeQueue
from .decoder import CheckedDecoder, StatefulDecoder
from .output import Chunk, Frames
from .pass_info import PassInfo
from .reencoding import ReencodingDecoder
from .session import LiveStream, PromptChange, StepCallback, StreamRequest, StreamSession

if TYPE_CHECKING:
    from .host import StreamHost


@torch.inference_mode(False)  # the caller may iterate inside and outside of it by turns: what is kept must fit both
@torch.no_grad()
def run_stream(pipe: StreamHost, session: StreamSession) -> Generator[Chunk]:
    """Make the chunks of a stream; however it ends, free its memory and leave the pipeline as it was."""
    request = session.request
    pipe._interrupt = False
    pipe._num_timesteps = request.inputs.num_steps
    try:
        loop = pipe.make_loop(request.inputs, kv_cache=request.kv_cache, **request.text)
        session.live = live = LiveStream(loop, _make_decoder(pipe, request))
        if request.saved is not None:
            request.saved.restore(loop, live.decoder)
        loop.on_pass = _pass_hook(pipe, request.on_pass)
        loop.interrupted = lambda: pipe._interrupt or session.closing
        loop.before_chunk = lambda: _apply_changes(pipe, session, loop)
        loop.reencode = live.decoder.reencode if isinstance(live.decoder, ReencodingDecoder) else None
        with _progress_bar(pipe, request.inputs.num_steps) as bar:
            loop.on_step = _step_hook(pipe, loop, bar, request.callback)
            yield from _chunks(pipe, request, live)
    finally:
        session.release()
        pipe._current_timestep = None
        pipe.maybe_free_model_hooks()


def _make_decoder(pipe: StreamHost, request: StreamRequest) -> StatefulDecoder | None:
    """Return the stream's decoder; None if neither the caller nor the model needs pixels."""
    fields = request.inputs.fields
    if request.output_type == "latent" and not fields.reencodes:
        return None
    decoder = request.decoder or CheckedDecoder(pipe.make_decoder())
    if not fields.reencodes:
        return decoder
    return ReencodingDecoder(
        decoder, pipe.encode_frames, fields.local_attention_frames, pipe.vae_scale_factor_temporal
    )


def _chunks(pipe: StreamHost, request: StreamRequest, live: LiveStream) -> Iterator[Chunk]:
    """Run the loop, decode, and time each chunk without the time that the caller takes."""
    start = time.perf_counter()
    for index, frames, latents in _decoded(pipe, request, live):
        yield Chunk(index, frames, latents, time.perf_counter() - start)
        start = time.perf_counter()


def _decoded(pipe: StreamHost, request: StreamRequest, live: LiveStream) -> Iterator[tuple[int, Frames, Tensor]]:
    """Yield `(index, frames, latents)` of the chunks."""
    rollout, decoder = live.loop.run(), live.decoder
    if request.output_type == "latent" or decoder is None:
        for index, latents in rollout:
            if decoder is not None:  # only the model needs the pixels
                decoder.decode(latents)
            yield index, latents, latents
        return
    queue = DecodeQueue(decoder, pipe.video_processor, request.output_type, request.overlap_decoding)
    for index, latents in rollout:
        yield from queue.put(index, latents)
    yield from queue.rest()


def _apply_changes(pipe: StreamHost, session: StreamSession, loop: ChunkLoop) -> None:
    """Apply what has changed since the last chunk: the source of controls, then the first prompt of the session.

    If no prompt was set, one that the controls of the chunk bring (an event) is.
    """
    changed, session.controls = session.controls, None
    if changed is not None:
        loop.inputs = replace(loop.inputs, controls=changed)
    event = getattr(loop.inputs.controls, "event", None)
    if event is not None and not session.changes and (text := event(loop.next_chunk)):
        batch = loop.inputs.shape[0]
        own = {**session.request.text, "prompt": text if batch == 1 else [text] * batch, "prompt_embeds": None}
        session.changes = [PromptChange(own, loop.inputs.fields.on_prompt_switch)]
    if changes := session.encode_changes(pipe, loop.prompt_embeds):
        change = changes.pop(0)
        loop.switch_prompt(pipe.embed_prompt(**change.text), change.how)


def _progress_bar(pipe: StreamHost, num_steps: int | None) -> Any:
    """Return a progress bar; without a total for an endless stream."""
    # tqdm leaves out the total only if it gets an iterable.
    return pipe.progress_bar(itertools.count()) if num_steps is None else pipe.progress_bar(total=num_steps)


def _pass_hook(pipe: StreamHost, callback: Callable[[PassInfo], None] | None) -> Callable[[PassInfo], None]:
    """Return the hook that runs before a pass: it sets `current_timestep` and calls the caller's `on_pass`."""

    def on_pass(info: PassInfo) -> None:
        pipe._current_timestep = info.timestep
        if callback is not None:
            callback(info)

    return on_pass


def _step_hook(
    pipe: StreamHost, loop: ChunkLoop, bar: Any, callback: StepCallback
) -> Callable[[int, float, torch.Tensor], torch.Tensor]:
    """Return the hook that runs after a denoising step: progress, then the caller's callback, which may replace
    tensors.
    """

    def on_step(step: int, timestep: float, latents: torch.Tensor) -> torch.Tensor:
        bar.update()
        if callback.function is None:
            return latents
        known = {"latents": latents, "prompt_embeds": loop.prompt_embeds}
        replaced = callback.function(pipe, step, timestep, {name: known[name] for name in callback.tensor_names}) or {}
        if replaced.get("prompt_embeds", loop.prompt_embeds) is not loop.prompt_embeds:
            loop.replace_prompt(replaced["prompt_embeds"])
        return replaced.get("latents", latents)

    return on_step
