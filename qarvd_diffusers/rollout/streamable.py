"""Make a causal video pipeline streamable, by a mixin."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import nn

from ..kv_cache.cache import KVCache
from ..kv_cache.storage import check_storage
from ..quantization.model import align_float_tensors
from .arguments import check_cache_maker, check_scheduler, start_arguments
from .chunk_loop import ChunkLoop
from .config import RolloutConfig
from .decoder import CheckedDecoder, Decoder, check_decoder
from .generate import run_stream
from .inputs import StreamInputs, check_tensors
from .pass_info import PassInfo
from .saved_state import SavedStream
from .session import StepCallback, StreamRequest, StreamSession
from .steerable import SteerableMixin
from .stream import Stream
from .text_encoder import load_prompt_embeds, offload_text_encoder, text_encoder_at_work

if TYPE_CHECKING:
    from typing_extensions import Self

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class StreamableMixin(SteerableMixin, ABC):
    """Stream from a causal `DiffusionPipeline`; put it (through `ARVDMixin`) before `DiffusionPipeline` among the
    bases.

    The host pipeline has a `transformer`, a `scheduler` (see `ChunkScheduler`), a `video_processor`, and the fields of
    `RolloutConfig` in its config. It implements `encode_prompt`, `check_stream_inputs`, `run_pass`, `make_cache` and
    `make_decoder`.

    A stream owns all of its state (K/V cache, scheduler copy, decoder memory). Any number of streams can be
    interleaved on one pipeline, and a stream that is closed early or fails leaves nothing behind.

    Attributes:
        kv_cache: storage of keys and values if a call does not say, see `KVCache`; a run-time choice that is not
            saved.
        text_encoder_offload: where the text encoder is kept between prompts, see `offload_text_encoder`.
        window: latent frames that streams keep, instead of the config's `local_attention_frames`; not saved either.
    """

    if TYPE_CHECKING:  # the host's, most of them `DiffusionPipeline`'s
        config: Mapping[str, Any]
        components: dict[str, Any]
        transformer: Any
        scheduler: Any
        text_encoder: nn.Module | None
        video_processor: Any
        vae_scale_factor_temporal: int
        device: torch.device
        _execution_device: torch.device
        _callback_tensor_inputs: Sequence[str]

        def maybe_free_model_hooks(self) -> None: ...

        def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any: ...

    kv_cache: str = "auto"
    text_encoder_offload: str = "keep"
    window: int | None = None
    _num_timesteps: int | None = None
    _current_timestep: float | None = None
    _interrupt: bool = False

    @abstractmethod
    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return text embeddings `[B, text_tokens, text_dim]` for the transformer, zero beyond each prompt."""

    @abstractmethod
    def check_stream_inputs(self, **arguments: Any) -> StreamInputs:
        """Check the arguments of `stream`, and return those about noise, size and length."""

    @abstractmethod
    def run_pass(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        *,
        kv_cache: KVCache,
        frame_offset: int,
        cache_only: bool = False,
    ) -> torch.Tensor | None:
        """Run one transformer pass over a chunk: flow of `latents [B, C, F, H, W]` at `timestep [B]`.

        With `cache_only` the flow is not used and need not be computed.
        """

    @abstractmethod
    def make_cache(self, num_frames: int | None, storage: str = "auto") -> KVCache:
        """Return an empty K/V cache for `num_frames` latent frames (None: unknown); `storage` as in `KVCache`."""

    @abstractmethod
    def make_decoder(self) -> Decoder:
        """Return a decoder for one stream."""

    def encode_frames(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels `[B, 3, F, height, width]` in [-1, 1] to normalized latents; used if
        `RolloutConfig.reencodes`.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot encode frames")

    @property
    def rollout_config(self) -> RolloutConfig:
        """How the model rolls out; raises ValueError for a `window` that cannot hold sink and chunk."""
        fields = RolloutConfig.from_config(self.config)
        return fields if self.window is None else dataclasses.replace(fields, local_attention_frames=self.window)

    @property
    def causal_fields(self) -> RolloutConfig:
        """Return `rollout_config`; the name of version 0.1."""
        warnings.warn("causal_fields was renamed: use rollout_config instead", DeprecationWarning, stacklevel=2)
        return self.rollout_config

    def stream(
        self,
        prompt: str | list[str] | None = None,
        *,
        prompt_embeds: torch.Tensor | str | os.PathLike[str] | None = None,
        num_chunks: int | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
        renoise_latents: torch.Tensor | Sequence[torch.Tensor] | None = None,
        initial_latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        max_sequence_length: int | None = None,
        kv_cache: str | None = None,
        overlap_decoding: bool = False,
        decoder: Decoder | Callable[[], Decoder] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        on_pass: Callable[[PassInfo], None] | None = None,
        controls: Any = None,
        **start: Any,
    ) -> Stream:
        """Generate chunk by chunk; arguments are checked at once, work starts with the first `next`.

        Args:
            prompt: one prompt, or one per sample.
            prompt_embeds: `[B, text_tokens, text_dim]` instead of `prompt`, or a file of `save_prompt_embeds`.
            num_chunks: chunks to generate; None, with no other argument that says the length, never ends.
            num_frames: length of the whole video in pixel frames instead of `num_chunks`; must give whole chunks.
            height: pixels; None takes the size of `latents` or `initial_latents`, else the pipeline config's.
            width: see `height`.
            latents: starting noise of all chunks, `[B, C, F, H, W]`.
            renoise_latents: noise between the steps, `[num_chunks, num_steps - 1, B, C, frames, H, W]`, or one tensor
                `[num_steps - 1, B, C, frames, H, W]` per chunk.
            initial_latents: clean normalized latents `[B, C, F, H, W]` of the frames that the video starts with; they
                come out first, as chunk -1.
            generator: source of the noise that is not passed. It is drawn chunk by chunk: starting noise, then one
                draw per re-noising step, so that streams of different lengths agree.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`, see `Frames`.
            max_sequence_length: text tokens; None takes the pipeline config's.
            kv_cache: dtype in which keys and values of earlier frames are kept: `"auto"` (the model's), `"bf16"`,
                `"int8"` or `"fp8"`; None takes the pipeline's `kv_cache`.
            overlap_decoding: on a CUDA device, decode on a second CUDA stream while the next chunk is denoised. Chunks
                then come out one chunk later, except the first, and a prompt takes effect one chunk later.
            decoder: decodes instead of the pipeline's VAE, which may then be missing: an object with `decode(latents)`
                (see `Decoder`) and the `latents_mean` and `latents_std` it was made for, or a function that makes one
                for
                this stream. An object remembers earlier frames of one stream: do not interleave two streams over it.
            callback_on_step_end: called as `(pipeline, step, timestep, tensors)` after every denoising step; `step`
                counts over all chunks. May return replaced tensors, and may set `pipeline._interrupt = True` to end
                the
                stream.
            callback_on_step_end_tensor_inputs: names among `_callback_tensor_inputs` to pass to the callback.
            on_pass: called with a `PassInfo` right before every transformer pass.
            controls: what steers each chunk, for a model that takes controls: a sequence, tensor, mapping or iterator
                with one entry per chunk, or a function of the chunk's index; see `steering.control_source`. For
                `ARVDPipeline` entries are what `Control.of` reads, and a file of `controls.recording` will do too.
            **start: further ways to start that the pipeline has, such as `image` and `video` of `ARVDPipeline`.

        Returns:
            An iterator over `Chunk`s in order.

        Raises:
            TypeError: for an argument that the pipeline does not have.
            ValueError: for arguments that do not fit each other or the model.
            FloatingPointError: if NaN or infinity appears; names chunk and step.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {unknown}, expected names among "
                f"{self._callback_tensor_inputs}"
            )
        if overlap_decoding and self.rollout_config.reencodes:
            raise ValueError(
                "overlap_decoding cannot be combined with a model whose next chunk needs the decoded frames of the "
                "last"
            )
        steps = len(self.rollout_config.denoising_timesteps)
        start = {**self.stream_defaults, **start}
        controls = start.pop("controls", None) if controls is None else controls
        start = start_arguments(type(self).__name__, start, self.check_stream_inputs, self.stream, steps)
        check_scheduler(self.scheduler)
        storage = check_storage(kv_cache or self.kv_cache)
        check_cache_maker(self.make_cache, storage)
        prompt_embeds = load_prompt_embeds(prompt_embeds)
        check_tensors(latents=latents, renoise_latents=renoise_latents, initial_latents=initial_latents)
        own_decoder = self._check_decoder(decoder)
        inputs = self.stream_inputs(
            controls,
            prompt=prompt,
            prompt_embeds=prompt_embeds,
            num_chunks=num_chunks,
            num_frames=num_frames,
            height=height,
            width=width,
            latents=latents,
            renoise_latents=renoise_latents,
            initial_latents=initial_latents,
            generator=generator,
            output_type=output_type if own_decoder is None else "latent",  # the pipeline's VAE is not used
            **start,
        )
        text = {"prompt": prompt, "prompt_embeds": prompt_embeds, "max_sequence_length": max_sequence_length}
        callback = StepCallback(callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))
        session = StreamSession(
            StreamRequest(inputs, text, output_type, storage, overlap_decoding, callback, on_pass, own_decoder)
        )
        session.steered = controls is not None
        return Stream(self, session, run_stream(self, session))

    def restore_stream(
        self,
        path: str | os.PathLike[str] | SavedStream,
        *,
        num_chunks: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str | None = None,
        decoder: Decoder | Callable[[], Decoder] | None = None,
        callback_on_step_end: Callable | None = None,
        on_pass: Callable[[PassInfo], None] | None = None,
        controls: Any = None,
    ) -> Stream:
        """Resume a stream that `Stream.save_state` saved; its output is bit-identical to an uninterrupted run.

        Args:
            path: a file of `Stream.save_state`, or what `Stream.state` returned.
            num_chunks: chunks of the whole video, those made before the save included; None takes the saved stream's.
            generator: draws the noise, after its state was set to the saved one; None makes a generator.
            output_type: see `Frames`; None takes that of the saved stream.
            decoder: the decoder that the stream was started with, if it was not the pipeline's.
            callback_on_step_end: see `stream`; its tensors are the latents.
            on_pass: see `stream`.
            controls: of the whole video, if the stream had controls, which are not saved.

        Raises:
            ValueError: if the file is not a saved stream, is one of another model or rollout config, or an argument
                does not fit the saved stream.
        """
        saved = path if isinstance(path, SavedStream) else SavedStream.load(path)
        saved.check(self)
        callback = StepCallback(callback_on_step_end, ("latents",))
        session = saved.session(output_type, on_pass, self._check_decoder(decoder), num_chunks, generator, callback)
        inputs = session.request.inputs
        if controls is not None:
            inputs = self.steered_by(inputs, controls)
        elif session.steered:
            raise ValueError(f"{saved.path} was steered by controls, which are not saved: pass controls= again")
        else:
            inputs = self.with_default_controls(inputs)
        session.request = dataclasses.replace(session.request, inputs=inputs)
        session.steered = controls is not None
        return Stream(self, session, run_stream(self, session))

    def _check_decoder(self, decoder: Decoder | Callable[[], Decoder] | None) -> CheckedDecoder | None:
        if decoder is None:
            return None
        config = getattr(getattr(self, "vae", None), "config", {})
        sizes = self.transformer.config
        channels = getattr(sizes, "out_channels", None) or sizes.in_channels
        return check_decoder(decoder, channels, config.get("latents_mean"), config.get("latents_std"))

    def make_loop(self, inputs: StreamInputs, kv_cache: str | None = None, **text: Any) -> ChunkLoop:
        """Return a loop at the start of a stream; `text` are the arguments of `encode_prompt`."""
        self.align_modules()
        storage = kv_cache or self.kv_cache
        return ChunkLoop(
            self.run_pass,
            copy.deepcopy(self.scheduler),
            # A pipeline's own cache need not have a storage argument: it gets one only if the caller asks for a
            # storage.
            self.make_cache(inputs.num_latent_frames, **({} if storage == "auto" else {"storage": storage})),
            inputs,
            self.embed_prompt(**text),
            device=self._execution_device,
            dtype=self.transformer.dtype,
        )

    def embed_prompt(self, **text: Any) -> torch.Tensor:
        """Encode a prompt on the transformer's device and in its dtype, and offload the text encoder."""
        text = {**text, "device": self._execution_device, "dtype": self.transformer.dtype}
        if text.get("prompt_embeds") is not None:
            return self.encode_prompt(**text)
        with text_encoder_at_work(self):
            return self.encode_prompt(**text)

    def offload_text_encoder(self, mode: str, device: torch.device | str | None = None) -> None:
        """Choose where the text encoder is kept between prompts.

        Args:
            mode: `"keep"` with the other components; `"cpu"` in host memory, as a whole; `"stream"` in host memory,
                moving to the device layer by layer while it runs; `"free"` nowhere: it is dropped after the first
                prompt.
            device: where a streamed encoder runs; None takes the pipeline's device.
        """
        offload_text_encoder(self, mode, device)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the pipeline, see `DiffusionPipeline.to`; an offloaded text encoder stays on the CPU."""
        waiting = getattr(self, "text_encoder", None) if self.text_encoder_offload != "keep" else None
        if waiting is None:
            return super().to(*args, **kwargs)  # type: ignore[misc]
        self.__dict__["text_encoder"] = None  # not by assignment, which would remove it from the config
        try:
            super().to(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__["text_encoder"] = waiting
        if (dtype := torch._C._nn._parse_to(*args, **kwargs)[1]) is not None:
            waiting.to(dtype=dtype)
        return self

    def check_prompt(
        self, prompt: str | list[str] | None, prompt_embeds: torch.Tensor | None, batch: int | None = None
    ) -> int:
        """Check a prompt, and its batch size if `batch` is not None; return the batch size.

        Raises:
            ValueError: if both or neither are passed, for another type, or for another batch size.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError(f"give either prompt or prompt_embeds, got {'neither' if prompt is None else 'both'}")
        if prompt is not None and not isinstance(prompt, str | list):
            raise ValueError(f"prompt is a {type(prompt).__name__}, expected a string or a list of strings")
        if isinstance(prompt, list) and not (prompt and all(isinstance(text, str) for text in prompt)):
            odd = next(((i, text) for i, text in enumerate(prompt) if not isinstance(text, str)), None)
            got = "an empty list" if odd is None else f"a list with {odd[1]!r} at {odd[0]}"
            raise ValueError(f"prompt is {got}, expected a string, or a list of one string per sample")
        samples = prompt if prompt_embeds is None else prompt_embeds
        count = 1 if samples is None or isinstance(samples, str) else len(samples)
        if batch not in (None, count):
            raise ValueError(f"{count} prompts for a stream of batch size {batch}: give {batch}")
        return count

    @property
    def num_timesteps(self) -> int | None:
        """Denoising steps of the latest stream, over all chunks; None if it is endless."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> float | None:
        """Timestep of the current or latest transformer pass; None while no stream runs."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the stream is to end after the current step."""
        return self._interrupt

    def align_modules(self) -> None:
        """Make results on the CPU independent of the file offsets that float weights are mapped from."""
        if self._execution_device.type == "cpu":
            for component in self.components.values():
                if isinstance(component, torch.nn.Module):
                    align_float_tensors(component)
