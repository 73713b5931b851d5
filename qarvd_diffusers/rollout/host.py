"""Declare what a rollout, and what is built on rollouts, needs of the pipeline that hosts it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .chunk_loop import ChunkLoop
from .config import RolloutConfig
from .decoder import Decoder
from .inputs import StreamInputs
from .output import Chunk
from .steering import ControlSource


class StreamHost(Protocol):
    """A pipeline, as one stream uses it; `StreamableMixin` makes one of a `DiffusionPipeline`.

    Attributes:
        transformer: the causal model.
        text_encoder: None if prompts are embeddings.
        text_encoder_offload: one of `text_encoder.OFFLOADS`.
        video_processor: converts pixels to the output type.
        vae_scale_factor_temporal: pixel frames per latent frame.
    """

    transformer: nn.Module
    text_encoder: nn.Module | None
    text_encoder_offload: str
    video_processor: Any
    vae_scale_factor_temporal: int
    _interrupt: bool
    _current_timestep: float | None
    _num_timesteps: int | None

    @property
    def device(self) -> torch.device:
        """Device of the components."""

    @property
    def _execution_device(self) -> torch.device:
        """Device of the passes; another than `device` if components are offloaded."""

    @property
    def rollout_config(self) -> RolloutConfig:
        """How the model rolls out."""

    def make_loop(self, inputs: StreamInputs, kv_cache: str | None = None, **text: Any) -> ChunkLoop:
        """Return a loop at the start of a stream; `text` are the arguments of `encode_prompt`."""

    def make_decoder(self) -> Decoder:
        """Return a decoder for one stream."""

    def embed_prompt(self, **text: Any) -> Tensor:
        """Return text embeddings `[B, text_tokens, text_dim]` on the transformer's device, in its dtype."""

    def encode_frames(self, pixels: Tensor) -> Tensor:
        """Encode pixels `[B, 3, F, height, width]` in [-1, 1] to normalized latents."""

    def check_prompt(
        self, prompt: str | list[str] | None, prompt_embeds: Tensor | None, batch: int | None = None
    ) -> int:
        """Check a prompt and return its batch size; raises ValueError if that is not `batch`."""

    def held(self, entry: Any, inputs: StreamInputs) -> ControlSource:
        """Check controls that are set while a stream runs, and prepare a source that holds them."""

    def prepare_controls(
        self, source: ControlSource, inputs: StreamInputs, chunks: Iterable[int] = ()
    ) -> ControlSource:
        """Return what `run_pass` gets as `controls` for each chunk; raises ValueError where it takes none."""

    def maybe_free_model_hooks(self) -> None:
        """Move offloaded components back, see `DiffusionPipeline`."""

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> AbstractContextManager[Any]:
        """Return a progress bar, see `DiffusionPipeline`."""


class PipelineHost(StreamHost, Protocol):
    """A pipeline, as calibration, memory plans and evaluation use it: they run whole rollouts and move the pipeline.

    Attributes:
        config: the pipeline's fields.
        source: folder or Hub id that it was loaded from, or None.
        kv_cache: storage of keys and values of new streams.
        window: latent frames that new streams keep, or None.
        stream_defaults: arguments of `stream` for calls that leave them out.
        vae: None if the caller passes a decoder.
    """

    config: Mapping[str, Any]
    source: str | None
    kv_cache: str
    window: int | None
    stream_defaults: Mapping[str, Any]
    vae: nn.Module | None

    def encode_prompt(self, prompt: str | list[str] | None = None, **options: Any) -> Tensor:
        """Return text embeddings `[B, text_tokens, text_dim]`, zero beyond each prompt."""

    def stream_inputs(self, controls: Any = None, **arguments: Any) -> StreamInputs:
        """Check the arguments of `stream`, and return those about noise, size, length, start and controls."""

    def stream(self, prompt: str | list[str] | None = None, **options: Any) -> Iterator[Chunk]:
        """Generate chunk by chunk."""

    def offload_text_encoder(self, mode: str, device: torch.device | str | None = None) -> None:
        """Choose where the text encoder is kept between prompts; `mode` is one of `text_encoder.OFFLOADS`."""

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set options of progress bars, see `DiffusionPipeline`."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move the pipeline, see `DiffusionPipeline`."""
