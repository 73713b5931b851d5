"""`run_stream`: the generator behind a `Stream`, which drives the chunk loop, the decoder and the callbacks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .chunk_loop import ChunkLoop
from .decode_queue import DecodeQueue, Decoder
from .output import Chunk
from .pass_info import PassInfo
from .reencoding import ReencodingDecoder
from .session import StreamSession

if TYPE_CHECKING:
    from .host import StreamHost


@torch.inference_mode(False)  # a stream may be stepped inside and outside of it by turns: what it keeps must fit both
@torch.no_grad()
def run_stream(pipe: StreamHost, session: StreamSession) -> Generator[Chunk]:
    """Make the chunks of a stream; whatever ends it, its memory is returned and the pipeline left as it was."""
    pipe._interrupt = False
    pipe._num_timesteps = session.inputs.num_steps
    try:
        loop = session.loop = pipe.make_loop(session.inputs, kv_cache=session.kv_cache, **session.text)
        session.decoder = _make_decoder(pipe, session)
        if session.saved is not None:
            session.saved.restore(loop, session.decoder)
        loop.on_pass = _pass_hook(pipe, session.on_pass)
        loop.interrupted = lambda: pipe._interrupt or session.closing
        loop.before_chunk = lambda: _switch_prompt(pipe, session)
        loop.reencode = getattr(session.decoder, "reencode", None)
        with _progress_bar(pipe, session.inputs.num_steps) as bar:
            loop.on_step = _step_hook(pipe, loop, bar, *session.callback)
            yield from _chunks(pipe, session, loop)
    finally:
        session.release()
        pipe._current_timestep = None
        pipe.maybe_free_model_hooks()


def _make_decoder(pipe: StreamHost, session: StreamSession) -> Decoder | None:
    """The stream's decoder; None where neither its consumer nor the model asks for pixels."""
    fields = session.inputs.fields
    if session.output_type == "latent" and not fields.reencodes:
        return None
    decoder = (session.make_decoder or pipe.make_decoder)()
    if not fields.reencodes:
        return decoder
    return ReencodingDecoder(
        decoder, pipe.encode_frames, fields.local_attention_frames, pipe.vae_scale_factor_temporal
    )


def _watched(rollout: Iterator[tuple[int, Tensor]], decoder: Decoder | None) -> Iterator[tuple[int, Tensor]]:
    """The chunks of a rollout, seen by a decoder whose frames nobody wants but the model."""
    for index, latents in rollout:
        if decoder is not None:
            decoder.decode(latents)
        yield index, latents


def _chunks(pipe: StreamHost, session: StreamSession, loop: ChunkLoop) -> Generator[Chunk]:
    """Drive the loop, decode, and time each chunk without the time its consumer takes."""
    rollout, start = loop.run(), time.perf_counter()
    if session.output_type == "latent":
        done = ((index, latents, latents) for index, latents in _watched(rollout, session.decoder))
    else:
        queue = DecodeQueue(session.decoder, pipe.video_processor, session.output_type, session.overlap_decoding)
        done = itertools.chain.from_iterable(
            itertools.chain((queue.put(*chunk) for chunk in rollout), (queue.rest(),))
        )
    for chunk in done:
        yield Chunk(*chunk, time.perf_counter() - start)
        start = time.perf_counter()


def _switch_prompt(pipe: StreamHost, session: StreamSession) -> None:
    if changes := session.encode_changes(pipe):
        change = changes.pop(0)
        session.loop.switch_prompt(pipe.embed_prompt(**change.text), change.how)


def _progress_bar(pipe: StreamHost, num_steps: int | None) -> Any:
    # tqdm only leaves out the total if it is given something to count.
    return pipe.progress_bar(itertools.count()) if num_steps is None else pipe.progress_bar(total=num_steps)


def _pass_hook(pipe: StreamHost, also: Callable[[PassInfo], None] | None) -> Callable[[PassInfo], None]:
    """What happens before a pass: `current_timestep` tells it, then the user's `on_pass` is called."""

    def on_pass(info: PassInfo) -> None:
        pipe._current_timestep = info.timestep
        if also is not None:
            also(info)

    return on_pass


def _step_hook(
    pipe: StreamHost, loop: ChunkLoop, bar: Any, callback: Callable | None, names: tuple[str, ...]
) -> Callable[[int, float, torch.Tensor], torch.Tensor]:
    """What happens after a denoising step: progress, then the user's callback, whose tensors replace the loop's."""

    def on_step(step: int, timestep: float, latents: torch.Tensor) -> torch.Tensor:
        bar.update()
        if callback is None:
            return latents
        known = {"latents": latents, "prompt_embeds": loop.prompt_embeds}
        replaced = callback(pipe, step, timestep, {name: known[name] for name in names}) or {}
        if replaced.get("prompt_embeds", loop.prompt_embeds) is not loop.prompt_embeds:
            loop.replace_prompt(replaced["prompt_embeds"])
        return replaced.get("latents", latents)

    return on_step
