"""`ARVDPipeline`: text (or a given start) to video, chunk by chunk, for the causal Wan family."""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, SchedulerMixin, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import is_ftfy_available, replace_example_docstring
from diffusers.video_processor import VideoProcessor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from ..config import INVISIBLE, QARVDConfig
from ..kv_cache.cache import KVCache
from ..memory.plan import apply_choice, choose
from ..memory.shapes import ModelShapes
from ..models.transformer_causal_wan import CausalWanTransformer3DModel
from ..rollout.config import RolloutConfig
from ..rollout.inputs import StreamInputs, check_generator, resolve_num_chunks, whole_number
from ..rollout.output import ARVDPipelineOutput, concatenate
from ..rollout.video_start import Picture, encode_pixels, fit_length, start_pixels
from ..schedulers import ChunkUniPCScheduler, FewStepRenoiseScheduler
from ..vae.streaming import StreamingVAEDecoder
from .arguments import loading_arguments, require_wan
from .arvd_mixin import ARVDMixin
from .lora import LoraMixin
from .quantization import split_config
from .single_file import SingleFileMixin

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

logger = logging.getLogger(__name__)

DEFAULT_CHUNKS = 7  # 81 frames, the length the family is trained at


def clean_prompt(text: str) -> str:
    """Repair mojibake (where ftfy is installed), resolve HTML entities, collapse white space, as Wan's pipeline does.

    Beyond that, a byte order mark and zero-width spaces are left out: nobody means them.
    """
    if is_ftfy_available():
        import ftfy

        text = ftfy.fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text)).translate(INVISIBLE)).strip()


class ARVDPipeline(ARVDMixin, LoraMixin, SingleFileMixin, DiffusionPipeline):
    """Autoregressive video generation with a causal Wan transformer (Self-Forcing and its family).

    One class serves the family: members differ in the config fields of `RolloutConfig`. A stock `WanTransformer3DModel` is
    upgraded to `CausalWanTransformer3DModel` sharing all its parameters, a stock scheduler is replaced by the
    one that the config tells. Distilled models need no guidance: there is no negative prompt.

    Args:
        tokenizer: tokenizer of the text encoder.
        text_encoder: UMT5 encoder; with None, pass `prompt_embeds`.
        vae: Wan's VAE; with None, ask for `output_type="latent"`.
        transformer: the causal transformer, or a stock Wan transformer.
        scheduler: None or any stock scheduler (both give way to one built from the fields), or a `FewStepRenoiseScheduler`
            or `ChunkUniPCScheduler` that agrees with the fields.
        num_frames_per_chunk, denoising_timesteps, first_chunk_timesteps, warp_timesteps, timestep_shift, context_noise,
            local_attention_frames, sink_frames, independent_first_frame, on_prompt_switch, global_sink, rope_mode,
            sink_ema, shot_rope_offset, shot_prefix, pin_shots, context_mode, keep_first_frame, clamped_start, sampler: see
            `RolloutConfig`.
        height: pixels of a frame when a call does not say.
        width: see `height`.
        max_sequence_length: text tokens when a call does not say.
        fps: frames per second the model was trained at; for writing files.

    Attributes:
        vae_frames_at_once: see `StreamingVAEDecoder`; 1 takes least memory.
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
        super().__init__()
        fields = RolloutConfig(
            num_frames_per_chunk=num_frames_per_chunk,
            denoising_timesteps=tuple(denoising_timesteps),
            first_chunk_timesteps=first_chunk_timesteps,
            warp_timesteps=warp_timesteps,
            timestep_shift=timestep_shift,
            context_noise=context_noise,
            local_attention_frames=local_attention_frames,
            sink_frames=sink_frames,
            independent_first_frame=independent_first_frame,
            on_prompt_switch=on_prompt_switch,
            global_sink=global_sink,
            rope_mode=rope_mode,
            sink_ema=sink_ema,
            shot_rope_offset=shot_rope_offset,
            shot_prefix=shot_prefix,
            pin_shots=pin_shots,
            context_mode=context_mode,
            keep_first_frame=keep_first_frame,
            clamped_start=clamped_start,
            sampler=sampler,
        )
        self.register_to_config(
            **fields.to_dict(), height=height, width=width, max_sequence_length=max_sequence_length, fps=fps
        )
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=_sampler(scheduler, fields),
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, memory: str | None = None, **kwargs: Any
    ) -> Self:
        """Load a pipeline, see `QuantizableMixin.from_pretrained`, so that its streams fit into a GPU's memory.

        Args:
            pretrained_model_name_or_path: folder or Hub id, float or quantized.
            memory: `"8GB"`, `"12GB"`, `"16GB"` or any other size: the K/V cache's bits, where the text encoder waits, the
                window and, of a float model without `quantization_config`, the data-free scheme are chosen to fit (see
                `memory.choose`), and the pipeline is put onto the GPU if there is one. `"max"` only does the last.
            **kwargs: those of `QuantizableMixin.from_pretrained`; `height` and `width` plan for another picture size.

        Raises:
            ValueError: before anything is loaded, if nothing fits, or if the model is no Wan model.
        """
        kwargs = loading_arguments(cls, kwargs)
        if kwargs.get("transformer") is None:
            require_wan(cls, pretrained_model_name_or_path, kwargs)
        if memory is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        given, _ = split_config(kwargs.get("quantization_config"))
        size = {name: kwargs.pop(name) for name in ("height", "width") if name in kwargs}
        on_gpu = torch.cuda.is_available()
        dtype = kwargs.setdefault("dtype", torch.bfloat16 if on_gpu else torch.float32)
        shapes = ModelShapes.read(
            pretrained_model_name_or_path, **{k: kwargs[k] for k in ("revision", "token", "cache_dir") if k in kwargs}
        )
        plan = choose(shapes, memory, scheme=given and given.scheme, dtype=dtype, **size)
        if plan.choice.scheme and given is None:
            kwargs["quantization_config"] = QARVDConfig(plan.choice.scheme)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        apply_choice(pipe, plan.choice)
        return pipe

    def fit_component(self, name: str, value: Any) -> Any:
        """A component as the pipeline needs it, be it given to the constructor, loaded, or assigned later.

        Raises:
            TypeError: the transformer is no Wan transformer.
            ValueError: the scheduler is of our kind, but disagrees with the pipeline's fields.
        """
        if name == "transformer" and value is not None:
            return CausalWanTransformer3DModel.from_transformer(value)
        if name == "scheduler":
            if "scheduler" in self.__dict__ and not isinstance(value, (type(None), *_SAMPLERS.values())):
                logger.warning(
                    "The scheduler %s is replaced by %s, built from the pipeline's config: flow_shift or shift is its "
                    "timestep_shift, the steps are its denoising_timesteps; pass them to from_pretrained.",
                    type(value).__name__,
                    _SAMPLERS[self.rollout_config.sampler].__name__,
                )
            return _sampler(value, self.rollout_config)
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
        """Text embeddings `[B, max_sequence_length, text_dim]`, zero beyond each prompt.

        Args:
            prompt: one prompt, or one per sample; longer ones are cut.
            prompt_embeds: ready embeddings, passed through.
            max_sequence_length: tokens; None takes the pipeline config's.
            device: where to put them; None takes the execution device.
            dtype: None takes the text encoder's.
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
        got = super().check_prompt(prompt, prompt_embeds, batch)
        if prompt is not None and (self.text_encoder is None or self.tokenizer is None):
            gone = " any more (text_encoder_offload is 'free')" if self.text_encoder_offload == "free" else ""
            raise ValueError(f"the pipeline has no text encoder or tokenizer{gone}: pass prompt_embeds")
        expected = self.transformer.config.text_dim
        if prompt_embeds is not None and (prompt_embeds.ndim != 3 or prompt_embeds.shape[2] != expected):
            raise ValueError(f"prompt_embeds has shape {list(prompt_embeds.shape)}, expected [B, tokens, {expected}]")
        return got

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
    ) -> StreamInputs:
        """See `ARVDMixin.check_stream_inputs`; a stream may start with an `image` or a `video`, see `encode_start`."""
        batch = self.check_prompt(prompt, prompt_embeds)
        check_generator(generator, batch)
        if output_type != "latent" and self.vae is None:
            raise ValueError("the pipeline has no vae: ask for output_type='latent'")
        if output_type != "latent":
            self.make_decoder()  # raises where streaming decode cannot work
        if self.rollout_config.reencodes and self.vae is None:
            raise ValueError(
                "this model encodes decoded frames anew and the pipeline has no vae: load one, or load the model with "
                "keep_first_frame=True"
            )
        if image is not None or video is not None:
            if initial_latents is not None:
                raise ValueError("give either initial_latents or an image or video as a start, got both")
            initial_latents = self.encode_start(image, video, height, width, batch)
        start = latents if latents is not None else initial_latents
        shape = (batch, self.transformer.config.in_channels, *self._latent_size(height, width, start))
        fields, given = self.rollout_config, initial_latents
        num_chunks = resolve_num_chunks(
            fields,
            0 if given is None or given.ndim != 5 else fields.context_frames(given.shape[2]),
            num_chunks=num_chunks,
            num_frames=num_frames,
            latents=latents,
            renoise_latents=renoise_latents,
            temporal_scale=self.vae_scale_factor_temporal,
        )
        return StreamInputs(fields, shape, num_chunks, latents, renoise_latents, initial_latents, generator)

    def encode_start(
        self,
        image: Picture | Sequence[Picture] | None = None,
        video: Any = None,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
    ) -> torch.Tensor:
        """Initial latents `[B, C, F, h, w]` of a picture or a clip.

        Args:
            image: a picture, or one per sample; see `Picture` for the forms. Where the model has no single first frame, it
                stands still for one chunk.
            video: a clip, or one per sample; as much of its end is taken as makes whole chunks.
            height: pixels; the middle of each picture that has this aspect ratio is resized to it. None takes the pipeline
                config's.
            width: see `height`.
            batch: samples; one start serves all.

        Raises:
            ValueError: if there is no VAE, the clip is too short, or starts and samples differ in number.
        """
        if self.vae is None:
            raise ValueError("the pipeline has no vae to encode a start with: pass initial_latents")
        scale = self.vae_scale_factor_spatial
        size = [scale * pixels for pixels in self._latent_size(height, width, None)]
        pixels = start_pixels(image, video, self.video_processor, tuple(size))
        if len(pixels) not in (1, batch):
            raise ValueError(
                f"{len(pixels)} starts for a batch of {batch}: give one, or one per sample; a clip is video="
            )
        pixels = fit_length(pixels, self.rollout_config, self.vae_scale_factor_temporal)
        self.align_modules()
        return self.encode_frames(pixels).expand(batch, -1, -1, -1, -1)

    def encode_frames(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `ARVDMixin.encode_frames`."""
        return encode_pixels(self.vae, pixels, self._execution_device)

    def _latent_size(self, height: int | None, width: int | None, given: torch.Tensor | None) -> tuple[int, int]:
        """Latent height and width, from pixels, from given latents, or from the config."""
        scale = self.vae_scale_factor_spatial
        if given is not None and given.ndim == 5:
            sizes = tuple(given.shape[-2:])
            for name, pixels, size in (("height", height, sizes[0]), ("width", width, sizes[1])):
                if pixels not in (None, size * scale):
                    raise ValueError(f"{name} is {pixels}, but the given latents are {size * scale} pixels in {name}")
            return sizes
        pixels = tuple(
            self.config[name] if value is None else whole_number(name, value, "a positive number of pixels, or None")
            for name, value in (("height", height), ("width", width))
        )
        for name, value, patch in zip(
            ("height", "width"), pixels, self.transformer.config.patch_size[1:], strict=True
        ):
            if value % (scale * patch) or value < 1:
                raise ValueError(f"{name} is {value}, expected a multiple of {scale * patch}")
        return pixels[0] // scale, pixels[1] // scale

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
        """See `ARVDMixin.run_pass`."""
        return self.transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=prompt_embeds,
            kv_cache=kv_cache,
            frame_offset=frame_offset,
            cache_only=cache_only,
            return_dict=False,
        )[0]

    def make_cache(self, num_frames: int | None, storage: str = "auto") -> KVCache:
        """See `ARVDMixin.make_cache`."""
        fields, layers = self.rollout_config, self.transformer.config.num_layers
        window = (fields.local_attention_frames, fields.sink_frames)
        return KVCache(layers, *window, num_frames, storage, fields.rope_mode, fields.sink_ema)

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
        """Generate a whole video: `stream`, joined.

        Args are those of `stream`, `image` and `video` (see `encode_start`) included; without anything that tells a length,
        7 chunks are generated. What the video starts with is part of the result.

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


_SAMPLERS = {"renoise": FewStepRenoiseScheduler, "unipc": ChunkUniPCScheduler}


def _sampler(scheduler: SchedulerMixin | None, fields: RolloutConfig) -> FewStepRenoiseScheduler | ChunkUniPCScheduler:
    """The given scheduler if it is of our kind and agrees with the pipeline's fields, else one built from the fields."""
    names = ("denoising_timesteps", "first_chunk_timesteps", "warp_timesteps", "timestep_shift")
    wanted = _SAMPLERS[fields.sampler](**{name: getattr(fields, name) for name in names})
    if not isinstance(scheduler, tuple(_SAMPLERS.values())):
        return wanted

    def plain(value: Any) -> Any:
        return tuple(value) if isinstance(value, list | tuple) else value

    differing = [name for name in names if plain(scheduler.config[name]) != plain(wanted.config[name])]
    if type(scheduler) is not type(wanted):
        differing.append("sampler")
    if differing:
        raise ValueError(
            f"scheduler and pipeline disagree on {differing}: pass the values to the pipeline, which is what is saved"
        )
    return scheduler
