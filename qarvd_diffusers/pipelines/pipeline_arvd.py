"""Define `ARVDPipeline`, which generates video from text or a start, chunk by chunk, with a causal Wan model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, SchedulerMixin, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import replace_example_docstring
from diffusers.video_processor import VideoProcessor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from ..kv_cache.cache import KVCache
from ..memory.plan import apply_choice
from ..models.transformer_causal_wan import CausalWanTransformer3DModel
from ..rollout.config import RolloutConfig
from ..rollout.inputs import StreamInputs, check_generator, resolve_num_chunks
from ..rollout.output import ARVDPipelineOutput, concatenate
from ..rollout.video_start import Picture
from ..vae.streaming import StreamingVAEDecoder
from .arguments import loading_arguments, require_wan
from .arvd_mixin import ARVDMixin
from .components import clean_prompt, fit_scheduler, latent_size, plan_memory
from .lora import LoraMixin
from .picture import PictureMixin, check_picture, latent_channels, picture_condition
from .single_file import SingleFileMixin
from .world import WorldMixin

if TYPE_CHECKING:
    from typing_extensions import Self

EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> import torch
        >>> from diffusers.utils import export_to_video
        >>> from qarvd_diffusers import ARVDPipeline, bundled_model_path

        >>> pipe = ARVDPipeline.from_pretrained(bundled_model_path())
        >>> generator = torch.Generator().manual_seed(0)
        >>> video = pipe("a red circle moves left", num_chunks=7, generator=generator).frames[0]
        >>> export_to_video(video, "circle.mp4", fps=pipe.config.fps)

        >>> for chunk in pipe.stream("a red circle moves left"):  # without end
        ...     show(chunk.frames)
        ```
"""

DEFAULT_CHUNKS = 7  # 81 frames, the length the family is trained at


class ARVDPipeline(WorldMixin, PictureMixin, ARVDMixin, LoraMixin, SingleFileMixin, DiffusionPipeline):
    """Generate video autoregressively with a causal Wan transformer (Self-Forcing and related models).

    Models of the family differ only in the values of `RolloutConfig`. A stock `WanTransformer3DModel` is upgraded to a
    `CausalWanTransformer3DModel` that shares all its parameters. A stock scheduler is replaced by the one that the
    config describes. Distilled models need no guidance, so there is no negative prompt.

    Args:
        transformer: the causal transformer, or a stock Wan transformer.
        scheduler: a `FewStepRenoiseScheduler` or `ChunkUniPCScheduler` that agrees with the config. None and stock
            schedulers are replaced.
        tokenizer: tokenizer of the text encoder.
        text_encoder: UMT5 encoder; without it, pass `prompt_embeds`.
        vae: Wan's VAE; without it, pass `output_type="latent"`.
        num_frames_per_chunk: this and the following arguments up to `sampler` are those of `RolloutConfig`.
        height: pixels of a frame if a call does not specify them.
        width: see `height`.
        max_sequence_length: text tokens if a call does not specify them.
        fps: frames per second of the training videos, for writing files.

    Attributes:
        vae_frames_at_once: see `StreamingVAEDecoder`; 1 takes the least memory.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds"]  # noqa: RUF012 - names are diffusers'
    _optional_components = ["scheduler", "tokenizer", "text_encoder", "vae"]  # noqa: RUF012
    vae_frames_at_once: int | None = None

    def __init__(
        self,
        transformer: CausalWanTransformer3DModel | WanTransformer3DModel,
        scheduler: SchedulerMixin | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: UMT5EncoderModel | None = None,
        vae: AutoencoderKLWan | None = None,
        num_frames_per_chunk: int = 3,
        denoising_timesteps: list | tuple = (1000, 750, 500, 250),
        first_chunk_timesteps: list | tuple | None = None,
        warp_timesteps: bool = True,
        timestep_shift: int | float = 5.0,
        context_noise: int | float = 0,
        local_attention_frames: int = -1,
        sink_frames: int = 0,
        independent_first_frame: bool = False,
        on_prompt_switch: str = "keep",
        global_sink: bool = True,
        rope_mode: str = "absolute",
        sink_ema: float | None = None,
        shot_rope_offset: int = 0,
        shot_prefix: str = "",
        pin_shots: bool = False,
        context_mode: str = "refresh",
        keep_first_frame: bool = False,
        clamped_start: bool = False,
        sampler: str = "renoise",
        height: int = 480,
        width: int = 832,
        max_sequence_length: int = 512,
        fps: int = 16,
    ) -> None:
        arguments = locals()
        super().__init__()
        rollout = RolloutConfig(**{name: arguments[name] for name in RolloutConfig.names()})
        self.register_to_config(
            **rollout.to_dict(), height=height, width=width, max_sequence_length=max_sequence_length, fps=fps
        )
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=fit_scheduler(scheduler, rollout),
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, memory: str | None = None, **kwargs: Any
    ) -> Self:
        """Load a pipeline, optionally such that its streams fit into a GPU's memory.

        Args:
            pretrained_model_name_or_path: folder or Hub id, float or quantized.
            memory: `"8GB"`, `"12GB"`, `"16GB"` or any other size. The bits of the K/V cache, the offloading of the
                text encoder, the window and, for a float model without `quantization_config`, a data-free scheme are
                chosen to fit (see `memory.plan.choose`), and the pipeline is moved to the GPU if there is one. `"max"`
                only moves it.
            **kwargs: those of `QuantizableMixin.from_pretrained`; `height` and `width` plan for another picture size.

        Raises:
            ValueError: before anything is loaded, if nothing fits or the model is not a Wan model.
        """
        kwargs = loading_arguments(cls, kwargs)
        if kwargs.get("transformer") is None:
            require_wan(cls, pretrained_model_name_or_path, kwargs)
        if memory is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        choice = plan_memory(pretrained_model_name_or_path, memory, kwargs)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        apply_choice(pipe, choice)
        return pipe

    def fit_component(self, name: str, value: Any) -> Any:
        """Adapt a component that is passed to the constructor, loaded or assigned later.

        Raises:
            TypeError: if the transformer is not a Wan transformer.
            ValueError: if a few-step scheduler disagrees with the pipeline's config.
        """
        if name == "transformer" and value is not None:
            return CausalWanTransformer3DModel.from_transformer(value)
        if name == "scheduler":
            return fit_scheduler(value, self.rollout_config, warn="scheduler" in self.__dict__)
        if name == "vae" and (value is not None or not hasattr(self, "video_processor")):
            config = getattr(value, "config", None)
            self.vae_scale_factor_temporal = getattr(config, "scale_factor_temporal", 4)
            self.vae_scale_factor_spatial = getattr(config, "scale_factor_spatial", 8)
            self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)
        return value

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Compute text embeddings `[B, max_sequence_length, text_dim]`, zero after the end of each prompt.

        Args:
            prompt: one prompt, or one per sample; longer ones are truncated.
            prompt_embeds: embeddings that are returned instead.
            max_sequence_length: tokens; None takes that of the pipeline's config.
            device: device of the result; None takes the execution device.
            dtype: dtype of the result; None takes that of the text encoder.
        """
        device = device or self._execution_device
        if prompt_embeds is not None:
            return prompt_embeds.to(device=device, dtype=dtype)
        self.align_modules()
        texts = [clean_prompt(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=max_sequence_length or self.config.max_sequence_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(device)
        embeds = self.text_encoder(tokens.input_ids.to(device), mask).last_hidden_state
        return embeds.masked_fill(mask[..., None] == 0, 0).to(dtype or embeds.dtype)

    def check_prompt(
        self, prompt: str | list[str] | None, prompt_embeds: torch.Tensor | None, batch: int | None = None
    ) -> int:
        """See `ARVDMixin.check_prompt`."""
        samples = super().check_prompt(prompt, prompt_embeds, batch)
        if prompt is not None and (self.text_encoder is None or self.tokenizer is None):
            freed = " any more (text_encoder_offload is 'free')" if self.text_encoder_offload == "free" else ""
            raise ValueError(f"the pipeline has no text encoder or tokenizer{freed}: pass prompt_embeds")
        expected = self.transformer.config.text_dim
        if prompt_embeds is not None and (prompt_embeds.ndim != 3 or prompt_embeds.shape[2] != expected):
            raise ValueError(f"prompt_embeds has shape {list(prompt_embeds.shape)}, expected [B, tokens, {expected}]")
        return samples

    def check_stream_inputs(
        self,
        *,
        prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        height: int | None,
        width: int | None,
        output_type: str,
        num_chunks: int | None = None,
        num_frames: int | None = None,
        latents: torch.Tensor | None = None,
        renoise_latents: torch.Tensor | Sequence[torch.Tensor] | None = None,
        initial_latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        image: Picture | None = None,
        video: Any = None,
        image_latents: torch.Tensor | None = None,
    ) -> StreamInputs:
        """See `ARVDMixin.check_stream_inputs`; a stream may start with an `image` or a `video`, see `encode_start`.

        A model with channels for a picture needs an `image`, or its `image_latents`, see `rollout.condition`.
        """
        batch = self.check_prompt(prompt, prompt_embeds)
        check_generator(generator, batch)
        if output_type != "latent" and self.vae is None:
            raise ValueError("the pipeline has no vae: pass output_type='latent'")
        if output_type != "latent":
            self.make_decoder()  # raises where streaming decode cannot work
        if self.rollout_config.reencodes and self.vae is None:
            raise ValueError(
                "this model re-encodes decoded frames and the pipeline has no vae: load one, or load the model with "
                "keep_first_frame=True"
            )
        picture = check_picture(self, image, image_latents, video, initial_latents)
        if not picture and (image is not None or video is not None):
            if initial_latents is not None:
                raise ValueError("pass either initial_latents or an image or video as a start, got both")
            initial_latents = self.encode_start(image, video, height, width, batch)
        start = next((tensor for tensor in (latents, initial_latents, image_latents) if tensor is not None), None)
        shape = (batch, latent_channels(self), *latent_size(self, height, width, start))
        config = self.rollout_config
        has_start = initial_latents is not None and initial_latents.ndim == 5
        num_chunks = resolve_num_chunks(
            config,
            config.context_frames(initial_latents.shape[2]) if has_start else 0,
            num_chunks=num_chunks,
            num_frames=num_frames,
            latents=latents,
            renoise_latents=renoise_latents,
            temporal_scale=self.vae_scale_factor_temporal,
        )
        inputs = StreamInputs(config, shape, num_chunks, latents, renoise_latents, initial_latents, generator)
        return replace(inputs, condition=picture_condition(self, inputs, image, image_latents)) if picture else inputs

    def run_pass(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        *,
        kv_cache: KVCache,
        frame_offset: int,
        cache_only: bool = False,
        controls: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """See `ARVDMixin.run_pass`."""
        steered = {} if controls is None else {"controls": controls}
        return self.transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=prompt_embeds,
            kv_cache=kv_cache,
            frame_offset=frame_offset,
            cache_only=cache_only,
            return_dict=False,
            **steered,
        )[0]

    def make_cache(self, num_frames: int | None, storage: str = "auto") -> KVCache:
        """See `ARVDMixin.make_cache`."""
        config, layers = self.rollout_config, self.transformer.config.num_layers
        window = (config.local_attention_frames, config.sink_frames)
        return KVCache(layers, *window, num_frames, storage, config.rope_mode, config.sink_ema)

    def make_decoder(self) -> StreamingVAEDecoder:
        """See `ARVDMixin.make_decoder`."""
        return StreamingVAEDecoder(self.vae, self.vae_frames_at_once)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
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
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **start: Any,
    ) -> ARVDPipelineOutput | tuple:
        """Generate a whole video: the concatenated chunks of `stream`, after the frames of the start.

        Arguments are those of `stream`, including `image` and `video` (see `encode_start`). If none of them determines
        a length, 7 chunks are generated.

        Examples:

        Returns:
            `ARVDPipelineOutput`, or a tuple of its one field.
        """
        if all(value is None for value in (num_chunks, num_frames, latents, renoise_latents)):
            num_chunks = DEFAULT_CHUNKS
        chunks = self.stream(
            prompt,
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
            max_sequence_length=max_sequence_length,
            kv_cache=kv_cache,
            overlap_decoding=overlap_decoding,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            **start,
        )
        frames = concatenate([chunk.frames for chunk in chunks], output_type)
        return ARVDPipelineOutput(frames=frames) if return_dict else (frames,)
