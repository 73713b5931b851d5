"""Define `RolloutConfig`: the values in which the members of the causal Wan family differ."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..files.schema import check_fields

PROMPT_SWITCHES = ("keep", "recache", "new_text_only", "cut")
"""What happens to cached frames when the prompt changes. `keep`: they stay, and the picture follows the new prompt
slowly.
`recache`: the frames in the window are encoded again under the new prompt (LongLive, arXiv 2509.22622).
    `new_text_only`:
they are dropped, which cuts to a new scene. `cut`: they stay, and the next chunk begins a new shot, `shot_rope_offset`
positions away (LongLive 2.0; Infinity-RoPE, arXiv 2511.20649)."""

ROPE_MODES = ("absolute", "window")
CONTEXT_MODES = ("refresh", "rebuild")
SAMPLERS = ("renoise", "renoise_integer", "unipc")
MAX_CHUNK = 4096  # latent frames, far beyond what any model generates together


@dataclass(frozen=True)
class RolloutConfig:
    """Describe how a causal video model rolls out; stored in the pipeline config, checked at construction.

    Attributes:
        num_frames_per_chunk: latent frames generated together.
        denoising_timesteps: timesteps of one chunk, falling, in `[0, 1000]`.
        first_chunk_timesteps: the same for generated chunk 0; None takes `denoising_timesteps`.
        warp_timesteps: map the timesteps through the shifted noise table before use.
        timestep_shift: shift of the noise table.
        context_noise: timestep of the passes that write clean latents into the K/V cache.
        local_attention_frames: latent frames that a chunk can see, including the sink and itself; -1 is all.
        sink_frames: first latent frames that are never evicted.
        independent_first_frame: the first chunk of a video (or of its initial latents) is a single latent frame.
        on_prompt_switch: what a new prompt does to the cached frames if a call does not say, one of `PROMPT_SWITCHES`.
        global_sink: once the window has moved on, re-caching keeps the sink as encoded under the first prompt.
        rope_mode: `absolute`: a frame's position is its index in the video. `window`: its index among the visible
            frames, so that no position exceeds the window.
        sink_ema: share of the old sink when the frames that leave the window are averaged into it; None keeps the
            sink.
        shot_rope_offset: positions added between the chunk after a cut and the frames before. With absolute positions
            this also moves all later chunks; in a window, where every pass counts positions again, only that chunk.
        shot_prefix: text that `set_prompt` adds in front of the prompt of a cut.
        pin_shots: the first chunk of the latest shot is not evicted while it directly follows the sink.
        context_mode: `refresh`: a pass over every chunk's clean latents writes its K/V into the cache. `rebuild`:
            before every chunk the cache is emptied and filled from the latest clean latents, chunk by chunk (Krea
            Realtime).
        keep_first_frame: a rebuilt context begins with the video's first frame; else with the frame that has just left
            the window, decoded and encoded again as a single picture, like the start of a video.
        clamped_start: initial latents need not be whole chunks: the rest begins generated chunk 0, at timestep 0, and
            is restored after every step.
        sampler: `renoise` (`FewStepRenoiseScheduler`), `renoise_integer` (`IntegerRenoiseScheduler`) or `unipc`
            (`ChunkUniPCScheduler`), which draws no noise.
    """

    num_frames_per_chunk: int = 3
    denoising_timesteps: tuple[float, ...] = (1000, 750, 500, 250)
    first_chunk_timesteps: tuple[float, ...] | None = None
    warp_timesteps: bool = True
    timestep_shift: float = 5.0
    context_noise: float = 0
    local_attention_frames: int = -1
    sink_frames: int = 0
    independent_first_frame: bool = False
    on_prompt_switch: str = "keep"
    global_sink: bool = True
    rope_mode: str = "absolute"
    sink_ema: float | None = None
    shot_rope_offset: int = 0
    shot_prefix: str = ""
    pin_shots: bool = False
    context_mode: str = "refresh"
    keep_first_frame: bool = False
    clamped_start: bool = False
    sampler: str = "renoise"

    def __post_init__(self) -> None:
        for name in ("denoising_timesteps", "first_chunk_timesteps"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
                object.__setattr__(self, name, tuple(value))
        check_fields(self)
        self._check()

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    def _check(self) -> None:
        require = self._require
        frames = self.num_frames_per_chunk
        require(1 <= frames <= MAX_CHUNK, "num_frames_per_chunk", f"a positive integer, at most {MAX_CHUNK}")
        require(_is_falling(self.denoising_timesteps), "denoising_timesteps", "falling numbers in [0, 1000]")
        first = self.first_chunk_timesteps
        require(first is None or _is_falling(first), "first_chunk_timesteps", "None or falling numbers in [0, 1000]")
        require(self.timestep_shift > 0, "timestep_shift", "a positive number")
        require(0 <= self.context_noise <= 1000, "context_noise", "a timestep in [0, 1000]")
        require(self.on_prompt_switch in PROMPT_SWITCHES, "on_prompt_switch", f"one of {', '.join(PROMPT_SWITCHES)}")
        require(self.sink_frames >= 0, "sink_frames", "0 or a positive number of latent frames")
        least = self.sink_frames + self.num_frames_per_chunk
        require(
            self.local_attention_frames == -1 or self.local_attention_frames >= least,
            "local_attention_frames",
            f"-1 (all) or at least sink_frames + num_frames_per_chunk = {least}",
        )
        require(self.rope_mode in ROPE_MODES, "rope_mode", f"one of {', '.join(ROPE_MODES)}")
        self._check_window()
        require(
            not (self.clamped_start and self.independent_first_frame),
            "clamped_start",
            "False where independent_first_frame makes the first frame a chunk",
        )
        require(self.sampler in SAMPLERS, "sampler", f"one of {', '.join(SAMPLERS)}")

    def _check_window(self) -> None:
        """Check the fields that need a window of a certain size."""
        require, chunk, window = self._require, self.num_frames_per_chunk, self.local_attention_frames
        averages = self.rope_mode == "window" and self.sink_frames == chunk and window > 0 and window % chunk == 0
        require(
            self.sink_ema is None or (0 < self.sink_ema < 1 and averages and not self.independent_first_frame),
            "sink_ema",
            "None, or a number in (0, 1) where rope_mode is 'window', sink_frames equals num_frames_per_chunk and "
            "the window is a whole number of chunks",
        )
        require(self.shot_rope_offset >= 0, "shot_rope_offset", "0 or a positive number of latent frames")
        holds = (window == -1 or window >= self.sink_frames + 2 * chunk) and self.sink_ema is None
        require(
            not self.pin_shots or holds, "pin_shots", "False, or sink_ema None and a window of the sink and two chunks"
        )
        require(self.context_mode in CONTEXT_MODES, "context_mode", f"one of {', '.join(CONTEXT_MODES)}")
        whole = window > chunk and window % chunk == 0 and self.sink_frames == 0 and not self.independent_first_frame
        require(
            self.context_mode == "refresh" or whole,
            "context_mode",
            "'refresh' here: 'rebuild' needs local_attention_frames of two or more whole chunks, no sink_frames and "
            "no independent_first_frame",
        )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the fields, in order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RolloutConfig:
        """Take the fields out of a larger mapping such as a pipeline config; absent ones keep their defaults."""
        return cls(**{name: config[name] for name in cls.names() if name in config})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def timesteps_of_chunk(self, chunk: int) -> tuple[float, ...]:
        """Return the un-warped denoising timesteps of generated chunk `chunk`."""
        first = self.first_chunk_timesteps
        return first if chunk == 0 and first is not None else self.denoising_timesteps

    def passes(self, chunk: int, context_frames: int = 0) -> dict[str, int]:
        """Return the number of passes per role of generated chunk `chunk` after `context_frames` initial frames."""
        counts = {"denoise": len(self.timesteps_of_chunk(chunk))}
        if self.context_mode == "refresh":
            return counts | {"refresh": 1}
        visible = min(
            context_frames // self.num_frames_per_chunk + chunk,
            self.local_attention_frames // self.num_frames_per_chunk - 1,
        )
        return counts | {"rebuild": visible}

    def pass_share(self, chunk: int, context_frames: int = 0) -> float:
        """Return `PassInfo.share` of the passes of a chunk: the passes of a late chunk over its own."""
        late = max(1, self.local_attention_frames)
        return sum(self.passes(late).values()) / sum(self.passes(chunk, context_frames).values())

    def num_renoises(self, chunk: int) -> int:
        """Return the number of noise draws after the starting noise of generated chunk `chunk`."""
        return len(self.timesteps_of_chunk(chunk)) - 1 if self.sampler != "unipc" else 0

    @property
    def reencodes(self) -> bool:
        """Whether the context needs decoded frames."""
        return self.context_mode == "rebuild" and not self.keep_first_frame

    def context_frames(self, num_frames: int) -> int:
        """Return how many of `num_frames` initial latent frames get passes of their own; the rest begin generated
        chunk 0.
        """
        return num_frames - (num_frames % self.num_frames_per_chunk if self.clamped_start else 0)

    def context_pieces(self, num_frames: int) -> list[int]:
        """Return the latent frames of each context pass for `num_frames` initial latent frames.

        Raises:
            ValueError: if the frames do not split into whole chunks.
        """
        num_frames = self.context_frames(num_frames)
        lead = [1] if self.independent_first_frame and num_frames > 0 else []
        chunks, rest = divmod(num_frames - sum(lead), self.num_frames_per_chunk)
        if rest:
            shape = f"{'1 + ' if lead else ''}a multiple of num_frames_per_chunk = {self.num_frames_per_chunk}"
            raise ValueError(f"initial_latents has {num_frames} latent frames, expected {shape}")
        return lead + [self.num_frames_per_chunk] * chunks

    def chunk_frames(self, chunk: int, context_frames: int = 0) -> int:
        """Return the latent frames of generated chunk `chunk` after `context_frames` initial ones."""
        single = self.independent_first_frame and chunk == 0 and context_frames == 0
        return 1 if single else self.num_frames_per_chunk

    def frames_before(self, chunk: int, context_frames: int = 0) -> int:
        """Return the latent frames of all generated chunks before `chunk`."""
        return 0 if chunk == 0 else self.chunk_frames(0, context_frames) + (chunk - 1) * self.num_frames_per_chunk

    def steps_before(self, chunk: int) -> int:
        """Return the denoising steps of all generated chunks before `chunk`."""
        return 0 if chunk == 0 else len(self.timesteps_of_chunk(0)) + (chunk - 1) * len(self.denoising_timesteps)

    def chunks(
        self, num_chunks: int | None, context_frames: int = 0, first: int = 0
    ) -> Iterator[tuple[int, int, int]]:
        """Yield `(chunk, frame_offset, num_frames)` of the generated chunks from `first` on; endless for
        `num_chunks=None`.
        """
        chunk, offset = first, context_frames + self.frames_before(first, context_frames)
        while num_chunks is None or chunk < num_chunks:
            frames = self.chunk_frames(chunk, context_frames)
            yield chunk, offset, frames
            chunk, offset = chunk + 1, offset + frames

    def count_chunks(self, num_frames: int, context_frames: int = 0, source: str = "num_frames") -> int:
        """Return the number of chunks that generate `num_frames` latent frames after `context_frames` initial ones.

        Raises:
            ValueError: if the frames do not split into whole chunks; names `source`.
        """
        first = self.chunk_frames(0, context_frames)
        chunks, rest = divmod(num_frames - first, self.num_frames_per_chunk)
        if num_frames < first or rest:
            raise ValueError(
                f"{source} asks for {num_frames} generated latent frames, which is not a whole number of chunks: the "
                f"first chunk has {first}, every other has {self.num_frames_per_chunk}"
            )
        return chunks + 1


def _is_falling(steps: tuple[float, ...]) -> bool:
    return len(steps) > 0 and all(0 <= t <= 1000 for t in steps) and all(a > b for a, b in itertools.pairwise(steps))


def __getattr__(name: str) -> Any:
    if name == "CausalFields":  # the name of version 0.1
        warnings.warn("CausalFields was renamed: use RolloutConfig instead", DeprecationWarning, stacklevel=2)
        return RolloutConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
