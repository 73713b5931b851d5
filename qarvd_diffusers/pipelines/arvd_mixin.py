"""`ARVDMixin`: what makes a causal video pipeline streamable and quantizable."""

from __future__ import annotations

import copy
import itertools
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..conversion import PIPELINE_STUB
from ..models.causal_fields import CausalFields
from ..models.kv_cache import KVCache
from ..models.kv_storage import check_storage
from ..models.pass_info import PassInfo
from ..serialization import align_float_tensors
from .chunk_loop import ChunkLoop
from .inputs import StreamInputs
from .output import Chunk, Frames
from .quantizable import QuantizableMixin

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# In memory -> on disk. A saved pipeline names stock classes only, so that plain diffusers can load its components.
_PORTABLE_NAMES = {
    "CausalWanTransformer3DModel": ("diffusers", "WanTransformer3DModel"),
    "FewStepRenoiseScheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}


class Decoder(Protocol):
    """Decoder of one stream: successive latents `[B, C, F, H, W]` -> pixels `[B, 3, frames, H, W]` in [-1, 1]."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor: ...


class ARVDMixin(QuantizableMixin, ABC):
    """Streaming and quantization for a causal `DiffusionPipeline`; put it before `DiffusionPipeline` among the bases.

    The host pipeline has a `transformer`, a `scheduler` (`FewStepRenoiseScheduler`), a `video_processor`, the fields of
    `CausalFields` in its config, and implements the contract: `encode_prompt`, `check_stream_inputs`, `run_pass`,
    `make_cache` and `make_decoder`.

    A stream owns all of its state (K/V cache, scheduler copy, decoder memory): any number of streams can be interleaved
    on one pipeline, and one that is closed early or fails leaves nothing behind.

    Attributes:
        kv_cache: storage of keys and values when a call does not say, see `KVCache`; a run-time choice that is not saved.
    """

    kv_cache: str = "auto"

    @abstractmethod
    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Text embeddings `[B, text_tokens, text_dim]` for the transformer, zero beyond each prompt."""

    @abstractmethod
    def check_stream_inputs(self, **arguments: Any) -> StreamInputs:
        """Check the arguments of `stream` and gather those about noise, size and length."""

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
        """One transformer pass over a chunk: flow of `latents [B, C, F, H, W]` at `timestep [B]`.

        With `cache_only` nobody reads the flow, and it need not be computed.
        """

    @abstractmethod
    def make_cache(self, num_frames: int | None, storage: str = "auto") -> KVCache:
        """An empty K/V cache for a rollout of `num_frames` latent frames (None: unknown); `storage` as in `KVCache`."""

    @abstractmethod
    def make_decoder(self) -> Decoder:
        """A decoder for one stream."""

    @property
    def causal_fields(self) -> CausalFields:
        """How the model rolls out."""
        return CausalFields.from_config(self.config)

    def stream(
        self,
        prompt: str | list[str] | None = None,
        *,
        prompt_embeds: torch.Tensor | None = None,
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
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        on_pass: Callable[[PassInfo], None] | None = None,
    ) -> Iterator[Chunk]:
        """Generate chunk by chunk; arguments are checked at once, work starts with the first `next`.

        Args:
            prompt: one prompt, or one per sample.
            prompt_embeds: `[B, text_tokens, text_dim]` instead of `prompt`.
            num_chunks: chunks to generate; None (and nothing else that tells a length) goes on without end.
            num_frames: length of the whole video in pixel frames instead of `num_chunks`; must give whole chunks.
            height: pixels; None takes the size of `latents` or `initial_latents`, else the pipeline config's.
            width: see `height`.
            latents: starting noise of all chunks, `[B, C, F, H, W]`.
            renoise_latents: noise between the steps, `[num_chunks, num_steps - 1, B, C, frames, H, W]`, or one tensor
                `[num_steps - 1, B, C, frames, H, W]` per chunk.
            initial_latents: clean normalized latents `[B, C, F, H, W]` of the frames the video starts with; they come out
                first, as chunk -1.
            generator: source of the noise that is not given. Drawn chunk by chunk: starting noise, then one draw per
                re-noising step, so that streams of different lengths agree.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`, see `Frames`.
            max_sequence_length: text tokens; None takes the pipeline config's.
            kv_cache: dtype in which keys and values of earlier frames are kept: `"auto"` (the model's), `"bf16"`, `"int8"`
                or `"fp8"`; None takes the pipeline's `kv_cache`.
            callback_on_step_end: called as `(pipeline, step, timestep, tensors)` after every denoising step; `step` counts
                over all chunks. May return replaced tensors, and may set `pipeline._interrupt = True` to end the stream.
            callback_on_step_end_tensor_inputs: names among `_callback_tensor_inputs` to hand to the callback.
            on_pass: called with a `PassInfo` right before every transformer pass.

        Yields:
            `Chunk`s in order.

        Raises:
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
                f"callback_on_step_end_tensor_inputs has {unknown}, expected names among {self._callback_tensor_inputs}"
            )
        storage = check_storage(kv_cache or self.kv_cache)
        inputs = self.check_stream_inputs(
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
            output_type=output_type,
        )
        text = {"prompt": prompt, "prompt_embeds": prompt_embeds, "max_sequence_length": max_sequence_length}
        callback = (callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))
        return self._stream(inputs, text | {"kv_cache": storage}, output_type, callback, on_pass)

    @torch.no_grad()
    def _stream(
        self,
        inputs: StreamInputs,
        text: dict[str, Any],
        output_type: str,
        callback: tuple[Callable | None, tuple[str, ...]],
        on_pass: Callable[[PassInfo], None] | None,
    ) -> Iterator[Chunk]:
        self._interrupt = False
        self._num_timesteps = inputs.num_steps
        try:
            loop = self.make_loop(inputs, **text)
            loop.on_pass = on_pass
            loop.interrupted = lambda: self._interrupt
            decoder = None if output_type == "latent" else self.make_decoder()
            with self._stream_bar(inputs.num_steps) as bar:
                loop.on_step = self._step_hook(loop, bar, *callback)
                yield from self._chunks(loop, decoder, output_type)
        finally:
            self._current_timestep = None
            self.maybe_free_model_hooks()

    def make_loop(self, inputs: StreamInputs, kv_cache: str | None = None, **text: Any) -> ChunkLoop:
        """A loop at the start of a stream; `text` are the arguments of `encode_prompt` that tell the prompt."""
        self.align_modules()
        storage = kv_cache or self.kv_cache
        device, dtype = self._execution_device, self.transformer.dtype
        return ChunkLoop(
            self.run_pass,
            copy.deepcopy(self.scheduler),
            # A cache of its own kind need not know about storage until somebody asks for another one.
            self.make_cache(inputs.num_latent_frames, **({} if storage == "auto" else {"storage": storage})),
            inputs,
            self.encode_prompt(**text, device=device, dtype=dtype),
            device=device,
            dtype=dtype,
        )

    def _chunks(self, loop: ChunkLoop, decoder: Decoder | None, output_type: str) -> Iterator[Chunk]:
        """Drive the loop, decode, and time each chunk without the time its consumer takes."""
        rollout = loop.run()
        while True:
            start = time.perf_counter()
            try:
                index, latents = next(rollout)
            except StopIteration:
                return
            frames = latents if decoder is None else self._decode(decoder, index, latents, output_type)
            yield Chunk(index, frames, latents, time.perf_counter() - start)

    def _decode(self, decoder: Decoder, index: int, latents: torch.Tensor, output_type: str) -> Frames:
        pixels = decoder.decode(latents)
        if not pixels.isfinite().all():
            raise FloatingPointError(f"NaN or infinity in the decoded frames of chunk {index}: run the VAE in float32")
        return self.video_processor.postprocess_video(pixels, output_type=output_type)

    def _stream_bar(self, num_steps: int | None) -> Any:
        # tqdm only leaves out the total if it is given something to count.
        return self.progress_bar(itertools.count()) if num_steps is None else self.progress_bar(total=num_steps)

    def _step_hook(self, loop: ChunkLoop, bar: Any, callback: Callable | None, names: tuple[str, ...]) -> Callable:
        """What happens after a denoising step: progress, then the user's callback, whose tensors replace the loop's."""

        def on_step(step: int, timestep: float, latents: torch.Tensor) -> torch.Tensor:
            self._current_timestep = timestep
            bar.update()
            if callback is None:
                return latents
            known = {"latents": latents, "prompt_embeds": loop.prompt_embeds}
            replaced = callback(self, step, timestep, {name: known[name] for name in names}) or {}
            if replaced.get("prompt_embeds", loop.prompt_embeds) is not loop.prompt_embeds:
                loop.replace_prompt(replaced["prompt_embeds"])
            return replaced.get("latents", latents)

        return on_step

    @property
    def num_timesteps(self) -> int | None:
        """Denoising steps of the latest stream, over all chunks; None if it has no end."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> float | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def align_modules(self) -> None:
        """Make results on the CPU independent of where in a file float weights were mapped from."""
        if self._execution_device.type == "cpu":
            for component in self.components.values():
                if isinstance(component, torch.nn.Module):
                    align_float_tensors(component)

    # Saving: the portable layout.

    def register_to_config(self, **kwargs: Any) -> None:
        """Record components under the stock class names they are saved as."""
        portable = {
            name: _PORTABLE_NAMES.get(value[1], value) if isinstance(value, tuple) and len(value) == 2 else value
            for name, value in kwargs.items()
        }
        super().register_to_config(**portable)

    def to_json_string(self) -> str:
        """`model_index.json`, without the path this pipeline was loaded from."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def write_portable_parts(self, folder: Path) -> None:
        """Add what the portable layout has beyond `DiffusionPipeline.save_pretrained`."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=self.causal_fields.timestep_shift)
        scheduler.save_pretrained(folder / "scheduler")
        (folder / "pipeline.py").write_text(PIPELINE_STUB, encoding="utf-8")
