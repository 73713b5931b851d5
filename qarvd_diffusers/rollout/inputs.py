"""Hold and check what one stream starts from, before anything runs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from .config import RolloutConfig
from .steering import ControlSource


@dataclass
class StreamInputs:
    """Hold the noise and the start of one stream.

    Attributes:
        fields: how the model rolls out.
        shape: `(batch, channels, height, width)` of the latents.
        num_chunks: chunks to generate; None for an endless stream.
        latents: noise of all chunks `[B, C, F, H, W]`, or None to draw it.
        renoise_latents: noise added between denoising steps, `[num_chunks, num_steps - 1, B, C, frames, H, W]` or a
            sequence of one tensor per chunk; a smaller first chunk takes the leading frames. None draws it.
        initial_latents: clean latents `[B, C, F, H, W]` that the video starts with, or None.
        generator: source of the noise that is drawn.
        condition: `[B, C2, F, H, W]`, further input channels of the transformer, or None. Frames after its last one
            get the channels of that one.
        controls: what steers each chunk, or None; see `steering`.
    """

    fields: RolloutConfig
    shape: tuple[int, int, int, int]
    num_chunks: int | None = None
    latents: torch.Tensor | None = None
    renoise_latents: torch.Tensor | Sequence[torch.Tensor] | None = None
    initial_latents: torch.Tensor | None = None
    generator: torch.Generator | list[torch.Generator] | None = None
    condition: torch.Tensor | None = None
    controls: ControlSource | None = None

    def __post_init__(self) -> None:
        batch, channels, height, width = self.shape
        for name in ("latents", "initial_latents"):
            tensor = getattr(self, name)
            if tensor is not None and (tensor.ndim != 5 or (*tensor.shape[:2], *tensor.shape[3:]) != self.shape):
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}, expected [{batch}, {channels}, F, {height}, {width}] "
                    "(batch of the prompt, channels of the transformer)"
                )
        self.fields.context_pieces(self.context_frames)  # raises if they do not split
        if self.controls is not None and self.fields.context_mode == "rebuild":
            raise ValueError("a model that encodes its context again before every chunk takes no controls")
        self._check_renoise()
        check_generator(self.generator, batch)
        got = [] if self.condition is None else list(self.condition.shape)
        if got and (len(got) != 5 or got[0] != batch or got[3:] != [height, width]):
            raise ValueError(f"condition has shape {got}, expected [{batch}, C, F, {height}, {width}]")

    def _check_renoise(self) -> None:
        """Raise ValueError if `renoise_latents` have too few chunks, or a chunk has another shape."""
        if self.renoise_latents is None:
            return
        count = len(self.renoise_latents)
        if self.num_chunks is None or count < self.num_chunks:
            raise ValueError(f"renoise_latents has noise for {count} chunks, num_chunks is {self.num_chunks}")
        batch, channels, height, width = self.shape
        for chunk, _, frames in self.fields.chunks(self.num_chunks, self.context_frames):
            got = tuple(self.renoise_latents[chunk].shape)
            steps = self.fields.num_renoises(chunk)
            fits = len(got) == 6 and got[0] >= steps and got[3] >= frames
            if not fits or (*got[1:3], *got[4:]) != self.shape:
                raise ValueError(
                    f"renoise_latents of chunk {chunk} has shape {list(got)}, expected "
                    f"[{steps}, {batch}, {channels}, {frames}, {height}, {width}]"
                )

    @property
    def context_frames(self) -> int:
        """Initial latent frames before generated chunk 0."""
        return 0 if self.initial_latents is None else self.fields.context_frames(self.initial_latents.shape[2])

    @property
    def clamped(self) -> torch.Tensor | None:
        """Initial latents `[B, C, F, H, W]` that generated chunk 0 begins with, F less than a chunk; or None."""
        context = self.context_frames
        if self.initial_latents is None or context == self.initial_latents.shape[2]:
            return None
        return self.initial_latents[:, :, context:]

    def context_latents(self) -> torch.Tensor:
        """Return the initial latents `[B, C, context_frames, H, W]` before generated chunk 0; there must be some."""
        assert self.initial_latents is not None
        return self.initial_latents[:, :, : self.context_frames]

    @property
    def num_latent_frames(self) -> int | None:
        """Latent frames of the whole video, the initial ones included; None if endless."""
        if self.num_chunks is None:
            return None
        return self.context_frames + self.fields.frames_before(self.num_chunks, self.context_frames)

    @property
    def num_steps(self) -> int | None:
        """Denoising steps of the whole stream; None if endless."""
        return None if self.num_chunks is None else self.fields.steps_before(self.num_chunks)

    def conditioned(self, latents: torch.Tensor, offset: int) -> torch.Tensor:
        """Append the channels of the condition to latents `[B, C, F, H, W]` of the frames from `offset` on."""
        if self.condition is None:
            return latents
        last = self.condition.shape[2] - 1
        frames = [min(offset + frame, last) for frame in range(latents.shape[2])]
        return torch.cat([latents, self.condition[:, :, frames].to(latents.device, latents.dtype)], dim=1)

    def noise(self, offset: int, frames: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Return the starting noise of the chunk at absolute frame `offset`."""
        if self.latents is None:
            return self._draw(frames, device, dtype)
        start = offset - self.context_frames
        return self.latents[:, :, start : start + frames].to(device=device, dtype=dtype)

    def renoise(self, chunk: int, step: int, frames: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Return the noise added after denoising step `step` of generated chunk `chunk`."""
        if self.renoise_latents is None:
            return self._draw(frames, device, dtype)
        return self.renoise_latents[chunk][step][:, :, :frames].to(device=device, dtype=dtype)

    def with_drawn_noise(self, device: torch.device, dtype: torch.dtype) -> StreamInputs:
        """Return the same inputs with all noise drawn, in the order in which a stream draws it.

        Raises:
            ValueError: if the stream is endless.
        """
        if self.num_chunks is None:
            raise ValueError("the noise of an endless stream cannot be drawn in advance: give num_chunks")
        starts: list[torch.Tensor] = []
        renoise: list[torch.Tensor] = []
        for chunk, offset, frames in self.fields.chunks(self.num_chunks, self.context_frames):
            starts.append(self.noise(offset, frames, device, dtype))
            steps = self.fields.num_renoises(chunk)
            drawn = [self.renoise(chunk, step, frames, device, dtype) for step in range(steps)]
            renoise.append(torch.stack(drawn) if drawn else starts[-1].new_empty(0, *starts[-1].shape))
        return replace(self, latents=torch.cat(starts, dim=2), renoise_latents=renoise, generator=None)

    def _draw(self, frames: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        batch, channels, height, width = self.shape
        shape = (batch, channels, frames, height, width)
        # In float32, so that a seed gives the same noise in every compute dtype.
        return randn_tensor(shape, generator=self.generator, device=device, dtype=torch.float32).to(dtype)


def check_generator(generator: Any, batch: int) -> None:
    """Check that `generator` is a source of noise for `batch` samples.

    Raises:
        ValueError: if it is not.
    """
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(one, torch.Generator) for one in generators):
        raise ValueError(
            f"generator is {generator!r}, expected a torch.Generator, such as torch.Generator().manual_seed(0), a "
            "list of one per sample, or None"
        )
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for a batch of {batch}: give one, or one per sample")


def check_tensors(**arguments: torch.Tensor | Sequence[torch.Tensor] | None) -> None:
    """Raise ValueError if a named argument is neither None nor a float tensor; `renoise_latents` may be a list of
    them.
    """
    for name, value in arguments.items():
        tensors = value if name == "renoise_latents" and isinstance(value, list | tuple) else [value]
        for tensor in tensors:
            if tensor is None:
                continue
            if not isinstance(tensor, torch.Tensor):
                remedy = ": pass torch.from_numpy of it" if type(tensor).__name__ == "ndarray" else ""
                raise ValueError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor{remedy}")
            if not tensor.is_floating_point():
                raise ValueError(f"{name} has dtype {tensor.dtype}, expected a float one")


def whole_number(name: str, value: Any, expected: str) -> int:
    """Return `value` as an int.

    Raises:
        ValueError: if it is not an integer; names it.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, expected {expected}") from None


def resolve_num_chunks(
    fields: RolloutConfig,
    context_frames: int,
    *,
    num_chunks: int | None,
    num_frames: int | None,
    latents: torch.Tensor | None,
    renoise_latents: torch.Tensor | Sequence[torch.Tensor] | None,
    temporal_scale: int,
) -> int | None:
    """Return the number of chunks that all arguments agree on; None if no argument says it.

    Args:
        num_frames: pixel frames of the whole video, initial ones included.
        temporal_scale: pixel frames per latent frame after the first.

    Raises:
        ValueError: if they disagree, or a length is not a whole number of chunks.
    """
    lengths: dict[str, int] = {}
    if num_chunks is not None:
        expected = "an integer of at least 1, or None for an endless stream"
        if whole_number("num_chunks", num_chunks, expected) < 1:
            raise ValueError(f"num_chunks is {num_chunks}, expected {expected}")
        lengths["num_chunks"] = num_chunks
    if num_frames is not None:
        whole_number("num_frames", num_frames, f"an integer, a multiple of {temporal_scale} plus 1, such as 81")
        latent_frames, rest = divmod(num_frames - 1, temporal_scale)
        if num_frames < 1 or rest:
            raise ValueError(f"num_frames is {num_frames}, expected a multiple of {temporal_scale} plus 1, such as 81")
        source = f"num_frames = {num_frames}"
        lengths[source] = fields.count_chunks(latent_frames + 1 - context_frames, context_frames, source)
    if latents is not None and latents.ndim == 5:
        lengths["latents"] = fields.count_chunks(latents.shape[2], context_frames, "latents")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"arguments ask for different numbers of chunks: {lengths}")
    if lengths:
        return next(iter(lengths.values()))
    return None if renoise_latents is None else len(renoise_latents)
