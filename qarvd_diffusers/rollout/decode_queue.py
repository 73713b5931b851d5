"""`DecodeQueue`: latents in, finished frames out, on a CUDA stream of their own if wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.video_processor import VideoProcessor

from .output import Frames


class Decoder(Protocol):
    """Decoder of one stream: successive latents `[B, C, F, H, W]` -> pixels `[B, 3, frames, H, W]` in [-1, 1].

    It may have `reset()`, which forgets what it remembers of earlier chunks, and, so that a stream can be saved,
    `state_dict() -> dict[str, Tensor]` and `load_state_dict(dict)`.
    """

    def decode(self, latents: torch.Tensor) -> torch.Tensor: ...


def check_decoder(decoder: Any, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Refuse a decoder that was made for other latents.

    Args:
        decoder: says with `latents_mean` and `latents_std` (a number per channel) which latents it was made for: those of
            the VAE whose normalized latents it decodes.
        channels: latent channels of the transformer.
        mean: of the pipeline's VAE; None where it has none, and only the number of channels can be compared.
        std: see `mean`.

    Raises:
        ValueError: named.
    """
    name = type(decoder).__name__
    if not callable(getattr(decoder, "decode", None)):
        raise ValueError(f"decoder is a {name}, expected an object with decode(latents), or a function that makes one")
    for key, expected in (("latents_mean", mean), ("latents_std", std)):
        given = getattr(decoder, key, None)
        if given is None:
            raise ValueError(f"the decoder ({name}) does not say what latents it was made for: give it {key}")
        given = torch.as_tensor(given, dtype=torch.float32).flatten().cpu()
        if len(given) != channels:
            raise ValueError(
                f"the decoder ({name}) is made for {len(given)} latent channels, the model has {channels}"
            )
        if expected is not None and not torch.allclose(given, torch.tensor(expected), atol=1e-3):
            raise ValueError(
                f"the decoder ({name}) was made for latents of other statistics: its {key} is off by up to "
                f"{(given - torch.tensor(expected)).abs().max():.3g} from that of the pipeline's VAE"
            )


@dataclass
class _Job:
    index: int
    latents: torch.Tensor
    pixels: torch.Tensor


class DecodeQueue:
    """Decodes the chunks of one stream in order.

    With `overlap`, and latents on a CUDA device, decoding runs on a second CUDA stream and is waited for only when the next
    chunk has been denoised: both share the device. Only the first chunk is handed out at once. Elsewhere nothing changes.

    Args:
        decoder: decoder of the stream.
        processor: makes frames of pixels.
        output_type: see `Frames`.
        overlap: decode beside the next chunk's denoising.
    """

    def __init__(self, decoder: Decoder, processor: VideoProcessor, output_type: str, overlap: bool) -> None:
        self._decoder, self._processor, self._output_type = decoder, processor, output_type
        self._overlap = overlap
        self._side: Any = None  # torch.cuda.Stream, from the first chunk on
        self._begun = False
        self._waiting: _Job | None = None

    def put(self, index: int, latents: torch.Tensor) -> Iterator[tuple[int, Frames, torch.Tensor]]:
        """Begin to decode a chunk; yields `(index, frames, latents)` of what is to be handed out now."""
        if self._overlap and self._side is None and latents.is_cuda:
            self._side = torch.cuda.Stream(latents.device)
        # To finish a chunk is to wait for all that its CUDA stream was given so far: before the next one is.
        ready = None if self._waiting is None else self._finish(self._waiting)
        self._waiting = self._start(index, latents)
        if self._side is None or not self._begun:
            self._begun = True
            yield from self.rest()
        elif ready is not None:
            yield ready

    def rest(self) -> Iterator[tuple[int, Frames, torch.Tensor]]:
        """What is left behind the last chunk."""
        ready, self._waiting = self._waiting, None
        if ready is not None:
            yield self._finish(ready)

    def _start(self, index: int, latents: torch.Tensor) -> _Job:
        if self._side is None:
            return _Job(index, latents, self._decode(latents))
        self._side.wait_stream(torch.cuda.current_stream(latents.device))
        latents.record_stream(self._side)
        with torch.cuda.stream(self._side):
            return _Job(index, latents, self._decode(latents))

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels = self._decoder.decode(latents)
        if pixels.ndim != 5 or pixels.shape[:2] != (latents.shape[0], 3):
            raise ValueError(
                f"the decoder ({type(self._decoder).__name__}) gave {list(pixels.shape)}, expected pixels "
                f"[{latents.shape[0]}, 3, frames, height, width] in [-1, 1]"
            )
        return pixels

    def _finish(self, job: _Job) -> tuple[int, Frames, torch.Tensor]:
        if self._side is None:
            return job.index, self._frames(job), job.latents
        with torch.cuda.stream(self._side):
            frames = self._frames(job)
        consumer = torch.cuda.current_stream(job.latents.device)
        consumer.wait_stream(self._side)
        if isinstance(frames, torch.Tensor) and frames.is_cuda:
            frames.record_stream(consumer)
        return job.index, frames, job.latents

    def _frames(self, job: _Job) -> Frames:
        if not job.pixels.isfinite().all():
            raise FloatingPointError(
                f"NaN or infinity in the decoded frames of chunk {job.index}: run the VAE in float32"
            )
        return self._processor.postprocess_video(job.pixels, output_type=self._output_type)
