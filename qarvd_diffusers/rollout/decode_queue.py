"""Decode the chunks of a stream in order, optionally on a second CUDA stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.video_processor import VideoProcessor

from .decoder import Decoder
from .output import Frames


@dataclass
class _Job:
    """A chunk in decoding."""

    index: int
    latents: torch.Tensor
    pixels: torch.Tensor


class DecodeQueue:
    """Decode the chunks of one stream in order.

    With `overlap`, and latents on a CUDA device, decoding runs on a second CUDA stream while the next chunk is
    denoised: both share the device. Only the first chunk comes out at once. On other devices `overlap` has no effect.

    Args:
        decoder: decoder of the stream.
        processor: converts pixels to frames.
        output_type: see `Frames`.
        overlap: decode while the next chunk is denoised.
    """

    def __init__(self, decoder: Decoder, processor: VideoProcessor, output_type: str, overlap: bool) -> None:
        self._decoder, self._processor, self._output_type = decoder, processor, output_type
        self._overlap = overlap
        self._cuda_stream: Any = None  # torch.cuda.Stream, from the first chunk on
        self._started = False
        self._pending: _Job | None = None

    def put(self, index: int, latents: torch.Tensor) -> Iterator[tuple[int, Frames, torch.Tensor]]:
        """Begin to decode a chunk; yield `(index, frames, latents)` of each chunk that is ready."""
        if self._overlap and self._cuda_stream is None and latents.is_cuda:
            self._cuda_stream = torch.cuda.Stream(latents.device)
        # Finishing a chunk waits for all work on its CUDA stream, so it comes before the next chunk is launched.
        ready = None if self._pending is None else self._finish(self._pending)
        self._pending = self._start(index, latents)
        if self._cuda_stream is None or not self._started:
            self._started = True
            yield from self.rest()
        elif ready is not None:
            yield ready

    def rest(self) -> Iterator[tuple[int, Frames, torch.Tensor]]:
        """Yield what remains after the last chunk."""
        ready, self._pending = self._pending, None
        if ready is not None:
            yield self._finish(ready)

    def _start(self, index: int, latents: torch.Tensor) -> _Job:
        """Launch the decoding of a chunk."""
        if self._cuda_stream is None:
            return _Job(index, latents, self._decoder.decode(latents))
        self._cuda_stream.wait_stream(torch.cuda.current_stream(latents.device))
        latents.record_stream(self._cuda_stream)
        with torch.cuda.stream(self._cuda_stream):
            return _Job(index, latents, self._decoder.decode(latents))

    def _finish(self, job: _Job) -> tuple[int, Frames, torch.Tensor]:
        if self._cuda_stream is None:
            return job.index, self._frames(job), job.latents
        with torch.cuda.stream(self._cuda_stream):
            frames = self._frames(job)
        consumer = torch.cuda.current_stream(job.latents.device)
        consumer.wait_stream(self._cuda_stream)
        if isinstance(frames, torch.Tensor) and frames.is_cuda:
            frames.record_stream(consumer)
        return job.index, frames, job.latents

    def _frames(self, job: _Job) -> Frames:
        """Convert the pixels of a chunk to the output type; raises FloatingPointError for NaN or infinity."""
        if not job.pixels.isfinite().all():
            raise FloatingPointError(
                f"NaN or infinity in the decoded frames of chunk {job.index}: run the VAE in float32"
            )
        frames: Any = self._processor.postprocess_video(job.pixels, output_type=self._output_type)
        return frames
