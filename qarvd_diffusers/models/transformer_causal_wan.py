"""`CausalWanTransformer3DModel`: diffusers' Wan transformer, run chunk by chunk against a `KVCache`.

Nothing of the stock forward is copied. The parts that a causal pass needs (`causal_parts`) are installed once; a pass binds
its cache and offset to them and lets the stock forward run.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import add_hook_to_module
from diffusers import ContextParallelConfig, WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

import qarvd_kernels as ops

from ..linear import unwrapped
from .causal_parts import CausalTimesteps, CausalWanAttnProcessor, CausalWanRotaryPosEmbed
from .context_parallel import ContextParallel, TokenSplit
from .fused_pass import FusedPass, refusal
from .kv_cache import KVCache
from .single_file import read_single_file

if TYPE_CHECKING:
    from diffusers.models._modeling_parallel import ParallelConfig, TensorParallelConfig

logger = logging.getLogger(__name__)

_NO_CACHE = "every block has to write its keys and values into the K/V cache that later chunks attend to"


class CausalWanTransformer3DModel(WanTransformer3DModel):
    """Wan transformer for autoregressive video diffusion: a `WanTransformer3DModel` that can attend to a `KVCache`.

    Parameters, state dict, config and their names on disk are those of `WanTransformer3DModel` (the saved config names that
    class, so that stock diffusers loads what this class saves). Without `kv_cache` and `frame_offset` the forward equals
    the stock one bit by bit.

    A pass binds its cache to the model while it runs: one model serves any number of interleaved streams, but not two
    threads at a time.

    Attributes:
        fused_pass: whether cached passes of a statically quantized model run on fused integer kernels (`FusedPass`); None,
            the default, means wherever kernels for the device exist.
        context_parallel: the processes that make one stream together, after `enable_parallelism`, or None.
    """

    _skip_keys = ["kv_cache"]  # noqa: RUF012 - accelerate must hand the cache through, not copy it

    @functools.wraps(WanTransformer3DModel.__init__)  # keeps the signature that diffusers reads config keys from
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._install_causal_parts()

    def _install_causal_parts(self) -> None:
        self.fused_pass: bool | None = None
        self._fused_pass: FusedPass | None = None
        self.context_parallel: ContextParallel | None = None
        self.rope = CausalWanRotaryPosEmbed(self.rope)
        self.condition_embedder.timesteps_proj = CausalTimesteps(self.condition_embedder.timesteps_proj)
        for block in self.blocks:
            block.attn1.set_processor(CausalWanAttnProcessor())
            block.attn2.set_processor(CausalWanAttnProcessor())

    @classmethod
    def from_transformer(cls, transformer: WanTransformer3DModel) -> CausalWanTransformer3DModel:
        """Upgrade a loaded (possibly quantized) Wan transformer; all parameters and submodules are shared, not copied.

        The given module's blocks get the attention processors of this class. Do not keep using it in a bidirectional
        pipeline: whatever is done to one (device, hooks, adapters) is done to both.

        Raises:
            TypeError: if `transformer` is no `WanTransformer3DModel`.
            ValueError: if it is split over several devices already, or skips blocks by one of diffusers' caches.
        """
        transformer = unwrapped(transformer)
        if isinstance(transformer, cls):
            return transformer
        if not isinstance(transformer, WanTransformer3DModel):
            raise TypeError(f"transformer is a {type(transformer).__name__}, expected a WanTransformer3DModel")
        if transformer._parallel_config is not None:
            raise ValueError(
                "enable_parallelism() was called on the stock transformer, which knows no K/V cache: call it on the "
                "transformer of the finished pipeline"
            )
        if transformer.is_cache_enabled:
            raise ValueError(
                f"enable_cache() was called on the stock transformer, but {_NO_CACHE}: disable_cache() first"
            )
        model = cls.__new__(cls)
        # accelerate's hook wraps `forward` of the instance it sits on; it is moved over below.
        # A compiled call is bound to the instance too, and cannot be.
        hooked = {"forward", "_old_forward", "_hf_hook", "_compiled_call_impl"}
        if transformer._compiled_call_impl is not None:
            logger.warning(
                "The compiled forward of the stock transformer is dropped: call compile() on the pipeline's."
            )
        model.__dict__.update({name: value for name, value in transformer.__dict__.items() if name not in hooked})
        for name in ("_modules", "_parameters", "_buffers"):
            model.__dict__[name] = dict(transformer.__dict__[name])
        model._install_causal_parts()
        if "_hf_hook" in transformer.__dict__:
            add_hook_to_module(model, transformer._hf_hook)
        return model

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        kv_cache: KVCache | None = None,
        frame_offset: int = 0,
        cache_only: bool = False,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """One pass over one chunk.

        Args:
            hidden_states: latents `[B, C, F, H, W]` in the model's dtype.
            timestep: `[B]`, `[B, F]` (one per latent frame) or `[B, tokens]`, in `[0, 1000]`, any real dtype.
            encoder_hidden_states: text embeddings `[B, text_tokens, text_dim]`. With a cache they are projected to K/V at
                the first pass only; call `kv_cache.reset_text()` to change the prompt.
            encoder_hidden_states_image: as in `WanTransformer3DModel`.
            return_dict: return a `Transformer2DModelOutput` instead of a tuple.
            attention_kwargs: as in `WanTransformer3DModel` (`scale` of adapters).
            kv_cache: K/V of earlier frames; this pass attends to them and writes (or overwrites) its own.
            frame_offset: absolute index of the first latent frame, for RoPE and for the cache.
            cache_only: the pass is made for its K/V alone; what it returns is unspecified, and may not be computed.

        Returns:
            The flow `[B, C, F, H, W]` (noise minus clean latents).

        Raises:
            ValueError: for a timestep of another shape, a position beyond the RoPE table, or a pass that does not fit the
                cache.
        """
        fused = None
        plain = encoder_hidden_states_image is None and not attention_kwargs
        if kv_cache is not None and kv_cache.rope_mode == "absolute" and plain:  # kernels store keys after RoPE
            fused = self._fused(timestep, hidden_states)
        timestep = self._expand_timestep(timestep, hidden_states) if fused is None else timestep
        split = self._split(kv_cache, frame_offset, hidden_states, timestep, encoder_hidden_states)
        if split is not None and timestep.ndim == 2:
            timestep = split.own_groups(timestep)
        with self._bind(kv_cache, frame_offset, hidden_states, split):
            if fused is not None:
                flow = fused(self, hidden_states, timestep, encoder_hidden_states, kv_cache, cache_only)
                return Transformer2DModelOutput(sample=flow) if return_dict else (flow,)
            return super().forward(
                hidden_states,
                timestep,
                encoder_hidden_states,
                encoder_hidden_states_image=encoder_hidden_states_image,
                return_dict=return_dict,
                attention_kwargs=attention_kwargs,
            )

    def _fused(self, timestep: torch.Tensor, hidden_states: torch.Tensor) -> FusedPass | None:
        """The fused form of this pass, if there is one and it is wanted."""
        wanted = self.fused_pass if self.fused_pass is not None else ops.accelerated(hidden_states.device)
        if not wanted or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        batch, frames = hidden_states.shape[0], hidden_states.shape[2] // self.config.patch_size[0]
        if timestep.shape not in ((batch,), (batch, frames)):
            return None
        if self._fused_pass is None or not self._fused_pass.fits(self):
            self._fused_pass = None if self.fusion_refusal is not None else self._build_fused_pass()
        return self._fused_pass

    def _build_fused_pass(self) -> FusedPass | None:
        try:
            return FusedPass(self)
        except ops.LayerRefused as error:
            logger.warning("This model runs layer by layer, not on fused kernels: %s", error)
            self.fused_pass = False
            return None

    @property
    def fusion_refusal(self) -> str | None:
        """Why no pass of this model can run on fused integer kernels; None if nothing in the model stands against it."""
        return refusal(self)

    def _tokens_per_frame(self, hidden_states: torch.Tensor) -> int:
        _, p_h, p_w = self.config.patch_size
        return (hidden_states.shape[3] // p_h) * (hidden_states.shape[4] // p_w)

    def _expand_timestep(self, timestep: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """The stock model takes one timestep per sample or per token; spread one per frame over its tokens."""
        batch, frames = hidden_states.shape[0], hidden_states.shape[2] // self.config.patch_size[0]
        tokens = self._tokens_per_frame(hidden_states)
        if timestep.shape == (batch, frames):
            return timestep.repeat_interleave(tokens, dim=1)
        if timestep.shape not in ((batch,), (batch, frames * tokens)):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}, expected [{batch}], [{batch}, {frames}] (per latent frame) or "
                f"[{batch}, {frames * tokens}] (per token)"
            )
        return timestep

    def enable_parallelism(
        self, *, config: ParallelConfig | ContextParallelConfig | TensorParallelConfig, cp_plan: Any = None
    ) -> None:
        """Make one stream on several GPUs: all processes run the same program on the same inputs, and get the same result.

        As in diffusers, for `ContextParallelConfig(ulysses_degree=N)`: every process works on its part of the tokens, in
        self-attention on its heads, and its `KVCache` holds these heads. Any number of tokens, float or quantized layers,
        and every kind of cache work; passes need a `kv_cache` and `torch.no_grad()`.

        Args:
            config: diffusers' context-parallel config; another kind is diffusers' own business.
            cp_plan: as in diffusers, for another kind of `config`.

        Raises:
            ValueError: for ring attention, heads that cannot be shared out, or a model that attends to images.
            RuntimeError: if called twice, or outside of processes started by `torchrun`.
        """
        wanted = getattr(config, "context_parallel_config", config)
        if not isinstance(wanted, ContextParallelConfig):
            super().enable_parallelism(config=config, cp_plan=cp_plan)
            return
        if self.context_parallel is not None:
            raise RuntimeError("this transformer runs on several GPUs already: enable_parallelism() was called before")
        if self.config.added_kv_proj_dim is not None:
            raise ValueError("a model that attends to images cannot run on several GPUs")
        self.context_parallel = ContextParallel.from_config(wanted, self.config.num_attention_heads, self.device)
        self._parallel_config = config

    def _split(self, kv_cache: KVCache | None, frame_offset: int, *inputs: torch.Tensor) -> TokenSplit | None:
        """How this pass is shared out between processes, if it is; `inputs` are latents, timestep and text."""
        if self.context_parallel is None:
            return None
        if kv_cache is None or torch.is_grad_enabled():
            raise ValueError(
                "a transformer that runs on several GPUs makes passes with a kv_cache and without gradients: give one, "
                "under torch.no_grad()"
            )
        frames = inputs[0].shape[2] // self.config.patch_size[0]
        # Once a chunk, and where a prompt is seen for the first time: asking costs a look at the device.
        if kv_cache.frames[-frames:][:1] != [frame_offset] or kv_cache.layers[0].get_text() is None:
            names = ("latents", "timestep", "prompt embeddings")
            place = torch.tensor(frame_offset, device=inputs[0].device)
            self.context_parallel.require_same(dict(zip((*names, "frame offset"), (*inputs, place), strict=True)))
        return self.context_parallel.split(frames * self._tokens_per_frame(inputs[0]))

    @contextmanager
    def _bind(
        self, kv_cache: KVCache | None, frame_offset: int, hidden_states: torch.Tensor, split: TokenSplit | None
    ) -> Iterator[None]:
        """Hand cache, frame offset and split to the installed parts for the length of one stock forward."""
        sinusoid = self.condition_embedder.timesteps_proj
        processors = [(block.attn1.processor, block.attn2.processor) for block in self.blocks]
        layers, start, position, window = [None] * len(processors), None, frame_offset, None
        if kv_cache is not None:
            self._check_bindable(kv_cache, processors)
            processes = 1 if split is None else split.parallel.size
            heads = (self.config.num_attention_heads // processes, self.config.attention_head_dim)
            frames = hidden_states.shape[2] // self.config.patch_size[0]
            tokens = self._tokens_per_frame(hidden_states)
            start = kv_cache.begin_pass(frame_offset, frames, tokens, heads, hidden_states)
            layers = kv_cache.layers
            if kv_cache.rope_mode == "window":
                window = len(kv_cache.frames)
                position = window - frames + kv_cache.shift
            else:
                position = kv_cache.reindex(frames, self.rope.max_seq_len, self.rope.turn)
        hooks = []
        if split is not None:  # what comes before the blocks and behind them, every process computes for itself
            hooks.append(self.patch_embedding.register_forward_hook(split.own_patches))
            hooks.append(self.proj_out.register_forward_hook(split.gathered))
        try:
            self.rope.frame_offset, self.rope.cache_start, self.rope.window_frames = position, start, window
            self.rope.split = split
            sinusoid.float64 = kv_cache is not None
            for pair, layer in zip(processors, layers, strict=True):
                for processor in pair:
                    processor.cache, processor.split = layer, split
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.rope.frame_offset, self.rope.cache_start, self.rope.window_frames = 0, None, None
            self.rope.split = None
            sinusoid.float64 = False
            for pair in processors:
                for processor in pair:
                    processor.cache = processor.split = None

    def _check_bindable(self, kv_cache: KVCache, processors: list[tuple[Any, Any]]) -> None:
        if len(kv_cache.layers) != len(processors):
            raise ValueError(
                f"kv_cache has {len(kv_cache.layers)} layers, the transformer has {len(processors)} blocks"
            )
        foreign = {type(p).__name__ for pair in processors for p in pair if not isinstance(p, CausalWanAttnProcessor)}
        if foreign:
            raise ValueError(
                f"attention processors {sorted(foreign)} cannot read a kv_cache; "
                "restore them with transformer.set_attn_processor(CausalWanAttnProcessor())"
            )
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            raise ValueError(
                "gradient checkpointing recomputes blocks after the kv_cache has moved on: call "
                "disable_gradient_checkpointing(), or run without kv_cache"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> CausalWanTransformer3DModel:
        """Behind `to`, `cpu` and their like; a fused pass must not hold on to weights that have moved elsewhere."""
        super()._apply(fn, recurse)
        if self._fused_pass is not None and not self._fused_pass.fits(self):
            self._fused_pass = None
        return self

    def to(self, *args: Any, **kwargs: Any) -> CausalWanTransformer3DModel:
        """Move the model. A quantized model keeps its dtypes: a requested dtype is dropped, the device is honoured."""
        if not getattr(self, "is_quantized", False):
            return super().to(*args, **kwargs)
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        return self if device is None else super().to(device=device, non_blocking=non_blocking)

    def enable_cache(self, config: Any) -> None:
        """Refused: diffusers' caches skip blocks, whose keys and values would be missing from the K/V cache of later chunks.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"enable_cache({type(config).__name__}) skips blocks of a pass, but {_NO_CACHE}: a causal transformer runs without it"
        )

    def enable_layerwise_casting(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; refused on a quantized model, whose packed weights are smaller than any cast."""
        self._refuse_if_quantized("enable_layerwise_casting", "leave it out, or use it on the float model")
        super().enable_layerwise_casting(*args, **kwargs)

    def fuse_qkv_projections(self) -> None:
        """Fuse q, k and v; refused on a quantized model, where it would silently bring float weights back."""
        self._refuse_if_quantized("fuse_qkv_projections", "fuse before quantizing")
        super().fuse_qkv_projections()

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Fuse adapters; refused on a quantized model, where the adapter would be lost silently."""
        self._refuse_if_quantized(
            "fuse_lora", "keep the adapter unfused, or fuse into the float model and quantize that"
        )
        super().fuse_lora(*args, **kwargs)

    def unload_lora(self) -> None:
        """Remove all adapters, and what they added to parameters that are no Linear's."""
        if hasattr(self, "lora_differences"):
            from .lora_differences import remove_differences  # imports PEFT

            remove_differences(self)
        super().unload_lora()

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path_or_dict: Any, **kwargs: Any
    ) -> CausalWanTransformer3DModel:
        """As in diffusers; a file that Q-ARVD wrote tells its config and quantization itself, so that no other is needed.

        Args:
            pretrained_model_link_or_path_or_dict: file with original key names.
            **kwargs: those of diffusers, such as `dtype` and, for a file of another origin, `config`.

        Raises:
            ValueError: the file is truncated, or does not hold exactly the tensors that its header tells.
        """
        given = pretrained_model_link_or_path_or_dict
        local = isinstance(given, str | os.PathLike) and os.path.isfile(given) and str(given).endswith(".safetensors")
        header = read_single_file(given) if local and not {"config", "quantization_config"} & kwargs.keys() else None
        source = str(given) if local else given
        if header is None:
            return super().from_single_file(source, **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
                json.dump({"_class_name": cls.__name__, **header.transformer}, file)
            kwargs |= {"config": folder, "quantization_config": header.quantization}
            model = super().from_single_file(source, **kwargs)
        model.register_to_config(_name_or_path=str(given))
        if header.quantization is not None:
            model.register_to_config(quantization_config=header.quantization)
        return model

    def _refuse_if_quantized(self, method: str, remedy: str) -> None:
        if getattr(self, "is_quantized", False):
            raise ValueError(f"{method}() cannot change packed integer weights of a quantized transformer: {remedy}")

    def to_json_string(self) -> str:
        """The config as JSON, naming the stock class (plain diffusers loads what is saved) and no local path."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        config["_class_name"] = WanTransformer3DModel.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"
