"""Protocols of the pipeline that hosts a stream: what a rollout, and what is built on rollouts, may ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .chunk_loop import ChunkLoop
from .config import RolloutConfig
from .decode_queue import Decoder
from .inputs import StreamInputs


class StreamHost(Protocol):
    """What one stream asks of its pipeline.

    Attributes:
        transformer: the causal model.
        device: where the pipeline lies.
        text_encoder: None where embeddings are passed.
        text_encoder_offload: one of `text_encoder.OFFLOADS`.
        video_processor: turns pixels into the output type.
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
    def device(self) -> torch.device: ...

    @property
    def _execution_device(self) -> torch.device: ...

    @property
    def rollout_config(self) -> RolloutConfig: ...

    def make_loop(self, inputs: StreamInputs, kv_cache: str | None = None, **text: Any) -> ChunkLoop: ...

    def make_decoder(self) -> Decoder: ...

    def embed_prompt(self, **text: Any) -> Tensor: ...

    def encode_frames(self, pixels: Tensor) -> Tensor: ...

    def check_prompt(
        self, prompt: str | list[str] | None, prompt_embeds: Tensor | None, batch: int | None = None
    ) -> int: ...

    def maybe_free_model_hooks(self) -> None: ...

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> AbstractContextManager[Any]: ...


class PipelineHost(StreamHost, Protocol):
    """What calibration, memory plans and evaluation ask of a pipeline besides: whole rollouts, and where it lies.

    Attributes:
        config: the pipeline's fields.
        source: folder or Hub id that it was loaded from, or None.
        kv_cache: storage of keys and values of new streams.
        window: latent frames that new streams keep, or None.
        vae: None where another decoder is given.
    """

    config: Mapping[str, Any]
    source: str | None
    kv_cache: str
    window: int | None
    vae: nn.Module | None

    def encode_prompt(self, prompt: str | list[str] | None = None, **options: Any) -> Tensor: ...

    def check_stream_inputs(self, **arguments: Any) -> StreamInputs: ...

    def stream(self, prompt: str | list[str] | None = None, **options: Any) -> Any: ...

    def offload_text_encoder(self, mode: str, device: torch.device | str | None = None) -> None: ...

    def set_progress_bar_config(self, **options: Any) -> None: ...

    def to(self, *args: Any, **kwargs: Any) -> Any: ...
