"""Generate a stream of latent chunks from noise, in one loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from ..files.safetensors import TensorSpec
from ..files.schema import check_mapping
from ..kv_cache.cache import KVCache
from .inputs import StreamInputs
from .pass_info import PassInfo
from .steering import joined

# Progress that a saved loop keeps.
_STATE_FIELDS = {"_steps_done": int, "_context_done": bool, "_next_chunk": int, "_frames_done": int}


class RunPass(Protocol):
    """Run one transformer pass: latents `[B, C, F, H, W]`, timestep `[B]` -> flow of the latents' shape; updates the
    cache.

    With `cache_only` only the cache is needed, and the flow may be None. A stream with controls passes those of the
    chunk as `controls`.
    """

    def __call__(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        *,
        kv_cache: KVCache,
        frame_offset: int,
        cache_only: bool,
    ) -> torch.Tensor | None: ...


class ChunkScheduler(Protocol):
    """A scheduler with the timesteps of each chunk, such as `FewStepRenoiseScheduler` and `ChunkUniPCScheduler`.

    Attributes:
        timesteps: of the chunk set last, `[num_steps]`, falling.
    """

    timesteps: torch.Tensor

    def set_timesteps(self, *, chunk_index: int) -> None:
        """Set `timesteps` to those of generated chunk `chunk_index`."""

    def step(self, flow: torch.Tensor, timestep: float, sample: torch.Tensor, *, noise: Any, return_dict: bool) -> Any:
        """Return the input of the next step and the predicted clean sample, both shaped as `sample`, as a tuple."""


class ChunkLoop:
    """Roll out one stream; all of its state is here and in `cache`.

    For every chunk the loop draws noise and lets the scheduler step at each timestep, by the flow and, if it
    re-noises, by fresh noise. Then one more pass over the clean latents at `context_noise` rewrites the chunk's K/V
    ("refresh"), after the last chunk too. A chunk is yielded before its refresh, which runs when the loop continues:
    the caller does not wait for it. If the context is rebuilt, there is no refresh; instead the clean latents that a
    chunk can see are encoded again before it, one pass per earlier chunk, each seeing those before it ("rebuild").

    Noise is drawn chunk by chunk: starting noise, then one draw per re-noising step. Streams of different lengths
    therefore agree as far as they go.

    `run` continues from the current chunk. `branch`, between two chunks, returns a second loop in the same state.

    Args:
        run_pass: runs the transformer.
        scheduler: used by this stream only.
        cache: empty K/V cache.
        inputs: noise, start and length.
        prompt_embeds: `[B, text_tokens, text_dim]`.
        device: of the passes.
        dtype: dtype of the latents.
    """

    def __init__(
        self,
        run_pass: RunPass,
        scheduler: ChunkScheduler,
        cache: KVCache,
        inputs: StreamInputs,
        prompt_embeds: torch.Tensor,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.cache = cache
        self.inputs = inputs
        self.prompt_embeds = prompt_embeds
        self.on_pass: Callable[[PassInfo], None] | None = None
        self.on_step: Callable[[int, float, torch.Tensor], torch.Tensor] | None = None
        self.before_chunk: Callable[[], None] | None = None
        self.reencode: Callable[[int], torch.Tensor] | None = (
            None  # index of a decoded latent frame -> `[B, C, 1, H, W]`
        )
        self.interrupted: Callable[[], bool] = lambda: False
        self._run_pass = run_pass
        self._scheduler = scheduler
        self.device, self._dtype = device, dtype
        self._steps_done = 0
        self._context_done = not inputs.context_frames
        self._next_chunk = 0
        self._frames_done = 0
        self._stale: PassInfo | None = None  # the refresh that is still to run
        self._recent: list[torch.Tensor] = []  # clean latents of the frames that re-caching may need
        self._controls: Any = None  # of the current chunk
        self._recent_controls: list[Any] = []  # of `_recent`
        self._first: torch.Tensor | None = None  # clean latents of the first frame, if a rebuilt context keeps it

    @property
    def next_chunk(self) -> int:
        """Index of the chunk that is generated next, or now."""
        return self._next_chunk

    def branch(self) -> ChunkLoop:
        """Return an independent loop over the same noise, with a copy of the cache and without callbacks.

        Raises:
            ValueError: if the noise is still to be drawn, so that one loop would use up the other's.
        """
        if self.inputs.latents is None or self.inputs.renoise_latents is None:
            raise ValueError(
                "a loop that draws its noise cannot branch: build it from StreamInputs.with_drawn_noise()"
            )
        self.refresh()
        other = copy.copy(self)
        other.cache, other._scheduler = self.cache.clone(), copy.deepcopy(self._scheduler)
        other.on_pass, other.on_step, other.before_chunk, other.interrupted = None, None, None, lambda: False
        other.reencode = None
        other._recent, other._recent_controls = list(self._recent), list(self._recent_controls)
        return other

    @torch.no_grad()
    def run(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield `(chunk, clean latents [B, C, F, H, W])`; initial latents come first, as chunk -1.

        An interrupted stream yields the latest latents of the chunk in progress and ends.

        Raises:
            FloatingPointError: if NaN or infinity appears; names chunk and step.
        """
        fields, context = self.inputs.fields, self.inputs.context_frames
        if not self._context_done:
            latents = self._fill_context()
            self._context_done = True
            self._remember(latents)
            yield -1, latents
        for chunk, offset, frames in fields.chunks(self.inputs.num_chunks, context, self._next_chunk):
            if self.interrupted():
                return
            self.refresh()
            if fields.context_mode == "rebuild":
                self._rebuild()
            if self.before_chunk is not None:
                self.before_chunk()
            if self.inputs.controls is not None:
                self._controls = self.inputs.controls(chunk)
            latents = self._denoise(chunk, offset, frames)
            if self.interrupted():
                yield chunk, latents
                return
            if fields.context_mode == "refresh":
                noise = float(fields.context_noise)
                self._stale = PassInfo(chunk, "refresh", 0, noise, offset, frames, self._share(chunk))
            self._next_chunk = chunk + 1
            self._remember(latents)
            yield chunk, latents
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Rewrite the K/V of the last chunk if that is still to do; call it before reading or copying the cache."""
        if self._stale is not None:
            info, self._stale = self._stale, None
            self._pass(self._recent[-1], info)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the state between two refreshed chunks, without the cache, as tensors and JSON types for
        `load_state`.
        """
        tensors = {f"recent.{index}": latents for index, latents in enumerate(self._recent)}
        tensors |= {} if self._first is None else {"first": self._first}
        return tensors, {name: getattr(self, name) for name in _STATE_FIELDS}

    def load_state(self, tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        for name in _STATE_FIELDS:
            setattr(self, name, fields[name])
        count = sum(name.startswith("recent.") for name in tensors)
        self._recent = [tensors[f"recent.{index}"].to(self.device) for index in range(count)]
        self._recent_controls = [None] * count
        self._first = tensors["first"].to(self.device) if "first" in tensors else None

    @staticmethod
    def expected_state(
        inputs: StreamInputs, fields: Mapping[str, Any], dtype: torch.dtype, count: int, where: str
    ) -> dict[str, TensorSpec]:
        """Return the tensors of the state with these `fields`, for a stream of these `inputs`.

        Args:
            inputs: of the stream.
            fields: JSON values that `state` returned.
            dtype: of the latents.
            count: number of tensors that there are; what is expected is listed up to one more.
            where: name of the fields in errors.

        Raises:
            ValueError: the fields are of other types, or contradict each other.
        """
        fields = check_mapping(fields, _STATE_FIELDS, where)
        rollout, context, done = inputs.fields, inputs.context_frames, fields["_next_chunk"]
        if done < 0 or (inputs.num_chunks is not None and done > inputs.num_chunks):
            raise ValueError(f"{where}: _next_chunk is {done}, expected 0 to num_chunks = {inputs.num_chunks}")
        right = {
            "_steps_done": rollout.steps_before(done),
            "_context_done": True,
            "_next_chunk": done,
            "_frames_done": context + rollout.frames_before(done, context),
        }
        if fields != right:
            raise ValueError(f"{where}: {dict(fields)} contradict each other, expected {right} after {done} chunks")
        batch, channels, height, width = inputs.shape
        pieces: list[int] = []
        window = rollout.local_attention_frames
        for chunk in range(done - 1, -2, -1):
            frames = context if chunk < 0 else rollout.chunk_frames(chunk, context)
            if not frames or len(pieces) > count or (window != -1 and sum(pieces) >= window):
                break
            pieces.insert(0, frames)
        names = {f"recent.{index}": frames for index, frames in enumerate(pieces)}
        names |= {"first": 1} if rollout.keep_first_frame and pieces else {}
        return {name: TensorSpec((batch, channels, frames, height, width), dtype) for name, frames in names.items()}

    def _remember(self, latents: torch.Tensor) -> None:
        """Keep the latents of one window, in whole chunks."""
        if self._first is None and self.inputs.fields.keep_first_frame:
            self._first = latents[:, :, :1]
        self._recent.append(latents)
        self._recent_controls.append(self._controls)
        self._frames_done += latents.shape[2]
        window = self.inputs.fields.local_attention_frames
        while window != -1 and sum(piece.shape[2] for piece in self._recent[1:]) >= window:
            del self._recent[0]
            del self._recent_controls[0]

    def switch_prompt(self, prompt_embeds: torch.Tensor, how: str) -> None:
        """Switch to another prompt between two chunks; `how` is one of `PROMPT_SWITCHES`.

        Re-caching is one pass without a mask over the frames of the window, at their own positions. If the sink is
        global and the window has moved on, the sink stays as it is, and the frames after it attend to it.
        """
        self.refresh()
        self.replace_prompt(prompt_embeds)
        if how == "new_text_only":
            self.cache.rewind(0, self._frames_done)
        elif how == "recache" and self._frames_done:
            self._rebuild() if self.inputs.fields.context_mode == "rebuild" else self._recache()
        elif how == "cut" and self._frames_done:
            self.cache.begin_shot(self.inputs.fields.shot_rope_offset, self.inputs.fields.pin_shots)

    def _recache(self) -> None:
        """Encode the frames of the window again, under the current prompt."""
        fields, done = self.inputs.fields, self._frames_done
        window = done if fields.local_attention_frames == -1 else min(fields.local_attention_frames, done)
        sink = fields.sink_frames if fields.global_sink and window < done else 0
        frames = window - sink
        latents = torch.cat(self._recent, dim=2)[:, :, -frames:]
        self.cache.rewind(sink, done - frames)
        self._pass(
            latents, PassInfo(self._next_chunk, "recache", 0, float(fields.context_noise), done - frames, frames)
        )

    def _rebuild(self) -> None:
        """Fill the cache from clean latents: the latest ones, after one earlier frame if not all of them fit."""
        fields, done = self.inputs.fields, self._frames_done
        if not done:
            return
        latents, frames = torch.cat(self._recent, dim=2), fields.local_attention_frames - fields.num_frames_per_chunk
        if done > frames:
            start = self._reencoded(done - frames) if self._first is None else self._first
            latents = torch.cat([start, latents[:, :, latents.shape[2] - frames + 1 :]], dim=2)
        offset = done - latents.shape[2]
        self.cache.restart(offset)
        for step, piece in enumerate(latents.split(fields.num_frames_per_chunk, dim=2)):
            where = (float(fields.context_noise), offset, piece.shape[2])
            self._pass(piece, PassInfo(self._next_chunk, "rebuild", step, *where, self._share(self._next_chunk)))
            offset += piece.shape[2]

    def _reencoded(self, frame: int) -> torch.Tensor:
        """Return latents `[B, C, 1, H, W]` of decoded latent frame `frame`, as the start of a video."""
        if self.reencode is None:
            raise ValueError(
                "this model's context needs decoded frames, which only a pipeline's stream has: load the model with "
                "keep_first_frame=True for this"
            )
        return self.reencode(frame).to(self.device, self._dtype)

    def replace_prompt(self, prompt_embeds: torch.Tensor) -> None:
        """Use another prompt: its K/V are computed again, cached frames stay as they are."""
        self.prompt_embeds = prompt_embeds
        self.cache.reset_text()

    def _fill_context(self) -> torch.Tensor:
        """Run the passes over the initial latents, and return those latents."""
        fields, frames = self.inputs.fields, self.inputs.context_frames
        latents = self.inputs.context_latents().to(device=self.device, dtype=self._dtype)
        if fields.context_mode == "rebuild":  # the first chunk fills the cache
            return latents
        offset = 0
        for piece in latents.split(fields.context_pieces(frames), dim=2):
            # The frames are clean: timestep 0, whatever noise the refresh of generated chunks uses.
            self._pass(piece, PassInfo(-1, "context", 0, 0.0, offset, piece.shape[2]))
            offset += piece.shape[2]
        return latents

    def _denoise(self, chunk: int, offset: int, frames: int) -> torch.Tensor:
        """Return the clean latents of a chunk."""
        self._scheduler.set_timesteps(chunk_index=chunk)
        timesteps = self._scheduler.timesteps.tolist()
        start = self.inputs.clamped if chunk == 0 else None
        start = None if start is None else start.to(device=self.device, dtype=self._dtype)
        sample = _clamp(self.inputs.noise(offset, frames, self.device, self._dtype), start)
        finite = []
        for step, timestep in enumerate(timesteps):
            info = PassInfo(chunk, "denoise", step, float(timestep), offset, frames, self._share(chunk))
            flow = self._pass(sample, info, 0 if start is None else start.shape[2])
            assert flow is not None  # only passes with cache_only may return None
            noise = None
            if step < self.inputs.fields.num_renoises(chunk):
                noise = self.inputs.renoise(chunk, step, frames, flow.device, flow.dtype)
            sample, original = self._scheduler.step(flow, timestep, sample, noise=noise, return_dict=False)
            finite.append(original.isfinite().all())
            if self.on_step is not None:
                sample = self.on_step(self._steps_done, timestep, sample)
            sample = _clamp(sample, start)
            self._steps_done += 1
            if self.interrupted():
                break
        _check_finite(torch.stack(finite), chunk, timesteps)
        return sample

    def _share(self, chunk: int) -> float:
        return self.inputs.fields.pass_share(chunk, self.inputs.context_frames)

    def _pass(self, latents: torch.Tensor, info: PassInfo, clamped: int = 0) -> torch.Tensor | None:
        """Run one pass, its first `clamped` frames at timestep 0."""
        if self.on_pass is not None:
            self.on_pass(info)
        steered: dict[str, Any] = {}
        if self.inputs.controls is not None:
            again = info.role == "recache"
            steered["controls"] = joined(self._recent_controls, info.num_frames) if again else self._controls
        timestep = torch.full((latents.shape[0],), info.timestep, device=latents.device)
        if clamped:
            timestep = timestep[:, None].repeat(1, latents.shape[2])
            timestep[:, :clamped] = 0
        return self._run_pass(
            self.inputs.conditioned(latents, info.frame_offset),
            timestep,
            self.prompt_embeds,
            kv_cache=self.cache,
            frame_offset=info.frame_offset,
            cache_only=info.role != "denoise",
            **steered,
        )


def _clamp(sample: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
    """Return `sample [B, C, F, H, W]` with its first frames replaced by `start`."""
    return sample if start is None else torch.cat([start, sample[:, :, start.shape[2] :]], dim=2)


def _check_finite(finite: torch.Tensor, chunk: int, timesteps: list[float]) -> None:
    """Raise FloatingPointError at the first step whose entry of `finite [steps]` is False.

    It runs once per chunk: reading the result after every step would stall the device each time.
    """
    for step, fine in enumerate(finite.tolist()):
        if not fine:
            raise FloatingPointError(
                f"NaN or infinity in chunk {chunk}, step {step} (timestep {timesteps[step]:g}): run the transformer "
                "in bfloat16 or float32, and check prompt_embeds, latents and, if it is quantized, its calibration"
            )
