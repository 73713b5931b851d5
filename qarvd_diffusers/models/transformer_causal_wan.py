"""Run diffusers' Wan transformer chunk by chunk against a `KVCache`.

No code of the stock forward is copied. The parts that a causal pass needs (`causal_parts`) are installed once; a pass
binds its cache and offset to them and runs the stock forward.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import add_hook_to_module
from diffusers import ContextParallelConfig, WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

import qarvd_kernels as ops

from ..kv_cache.cache import KVCache
from ..quantization.model import unwrapped
from ..quantization.stored_model import check_float_values
from .causal_parts import (
    CausalTimesteps,
    CausalWanAttnProcessor,
    CausalWanRotaryPosEmbed,
    bind,
    tokens_per_frame,
)
from .context_parallel import ContextParallel, TokenSplit
from .fused.forward import FusedPass, refusal
from .single_file_header import check_single_file, read_single_file

if TYPE_CHECKING:
    from diffusers.models._modeling_parallel import ParallelConfig, TensorParallelConfig

logger = logging.getLogger(__name__)

_NO_CACHE = "every block has to write its keys and values to the K/V cache that later chunks attend to"
_WITH_CONTROLS = "WorldWanTransformer3DModel"


class CausalWanTransformer3DModel(WanTransformer3DModel):
    """Add a `KVCache` to `WanTransformer3DModel`, for autoregressive video diffusion.

    Parameters, state dict, config and their names on disk are those of `WanTransformer3DModel`. The saved config names
    that class, so that stock diffusers loads what this class saves. Without `kv_cache` and `frame_offset` the output
    is bit-identical to that of the stock forward.

    A cache is bound to the model while a pass runs: one model can run any number of interleaved streams, but only in
    one thread at a time.

    Attributes:
        fused_pass: whether cached passes of a statically quantized model take the fused forward (`FusedPass`). None,
            the default: if there are kernels for the device.
        context_parallel: the processes that compute one stream together, after `enable_parallelism`, or None.
    """

    _skip_keys = ["kv_cache"]  # noqa: RUF012 - accelerate must pass the cache on, not copy it

    @functools.wraps(WanTransformer3DModel.__init__)  # diffusers reads config keys from the signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of `WanTransformer3DModel`."""
        super().__init__(*args, **kwargs)
        self._install_causal_parts()

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> CausalWanTransformer3DModel:
        """Build a model as in diffusers.

        Raises:
            ValueError: the config describes a model with controls, whose layers this class does not have.
        """
        if "control_dim" in (config or {}) and "control_dim" not in cls._get_init_keys(cls):
            raise ValueError(f"the model has layers for controls: load it with {_WITH_CONTROLS}, not {cls.__name__}")
        return super().from_config(config, **kwargs)

    def _install_causal_parts(self) -> None:
        """Replace stock parts, in place; the new RoPE and sinusoid take over the tables of the stock ones."""
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
        """Make a causal transformer of a loaded (possibly quantized) one; they share all parameters and submodules.

        The blocks of `transformer` get the attention processors of this class. Do not keep using it in a bidirectional
        pipeline: changes to one (device, hooks, adapters) also affect the other.

        Raises:
            TypeError: `transformer` is not a `WanTransformer3DModel`.
            ValueError: it already runs on several devices, or one of diffusers' caches makes it skip blocks.
        """
        transformer = unwrapped(transformer)
        if isinstance(transformer, cls):
            return transformer
        if not isinstance(transformer, WanTransformer3DModel):
            raise TypeError(f"transformer is a {type(transformer).__name__}, expected a WanTransformer3DModel")
        if transformer._parallel_config is not None:
            raise ValueError(
                "enable_parallelism() was called on the stock transformer, which has no K/V cache: call it on the "
                "transformer of the finished pipeline"
            )
        if transformer.is_cache_enabled:
            raise ValueError(
                f"enable_cache() was called on the stock transformer, but {_NO_CACHE}: disable_cache() first"
            )
        model = cls.__new__(cls)
        # accelerate's hook replaces `forward` of one instance; it is added to the new instance below.
        # A compiled call is bound to its instance too, and cannot be moved.
        hooked = {"forward", "_old_forward", "_hf_hook", "_compiled_call_impl"}
        if transformer._compiled_call_impl is not None:
            logger.warning(
                "The causal transformer is not compiled, as the stock one was: call compile() on the pipeline's."
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
        """Run one pass over one chunk.

        Args:
            hidden_states: latents `[B, C, F, H, W]` in the model's dtype.
            timestep: `[B]`, `[B, F]` (one per latent frame) or `[B, tokens]`, in `[0, 1000]`, any real dtype.
            encoder_hidden_states: text embeddings `[B, text_tokens, text_dim]`. With a cache they are projected to K/V
                in the first pass only; call `kv_cache.reset_text()` to change the prompt.
            encoder_hidden_states_image: as in `WanTransformer3DModel`.
            return_dict: return a `Transformer2DModelOutput` instead of a tuple.
            attention_kwargs: as in `WanTransformer3DModel` (`scale` of adapters).
            kv_cache: K/V of earlier frames; this pass attends to them and writes (or overwrites) its own.
            frame_offset: absolute index of the first latent frame, for RoPE and for the cache.
            cache_only: only the K/V of the pass are needed: the result is unspecified and may not be computed.

        Returns:
            The flow `[B, C, F, H, W]` (noise minus clean latents).

        Raises:
            ValueError: the timestep has another shape, a position is beyond the end of the RoPE table, or the pass
                does not fit the cache.
        """
        fused = None
        plain = encoder_hidden_states_image is None and not attention_kwargs
        if kv_cache is not None and kv_cache.rope_mode == "absolute" and plain:  # kernels store keys after RoPE
            fused = self._fused(timestep, hidden_states)
        timestep = self._expand_timestep(timestep, hidden_states) if fused is None else timestep
        split = self._split(kv_cache, frame_offset, hidden_states, timestep, encoder_hidden_states)
        if split is not None and timestep.ndim == 2:
            timestep = split.own_groups(timestep)
        with bind(self, kv_cache, frame_offset, hidden_states, split):
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
        """Return the fused forward if this pass can and should take it, else None."""
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
        """Build the fused forward; if the integer sums of a layer could overflow, warn once and stop trying."""
        try:
            return FusedPass(self)
        except ops.LayerRefused as error:
            logger.warning("The transformer runs layer by layer instead of in the fused forward: %s", error)
            self.fused_pass = False
            return None

    @property
    def fusion_refusal(self) -> str | None:
        """Why the model cannot run in the fused forward, or None if it can."""
        return refusal(self)

    def _expand_timestep(self, timestep: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Repeat a timestep per frame for its tokens: the stock model takes one per sample or one per token.

        Raises:
            ValueError: the timestep has another shape.
        """
        batch, frames = hidden_states.shape[0], hidden_states.shape[2] // self.config.patch_size[0]
        tokens = tokens_per_frame(self, hidden_states)
        if timestep.shape == (batch, frames):
            return timestep.repeat_interleave(tokens, dim=1)
        if timestep.shape not in ((batch,), (batch, frames * tokens)):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}, expected [{batch}], [{batch}, {frames}] (per latent "
                f"frame) or [{batch}, {frames * tokens}] (per token)"
            )
        return timestep

    def enable_parallelism(
        self, *, config: ParallelConfig | ContextParallelConfig | TensorParallelConfig, cp_plan: Any = None
    ) -> None:
        """Compute one stream on several GPUs: all processes get the same inputs and return the same result.

        Called as in diffusers with `ContextParallelConfig(ulysses_degree=N)`. Every process computes a part of the
        tokens, and in self-attention a part of the heads, which are those that its `KVCache` holds. Any number of
        tokens, float and quantized layers, and all storage types of the cache are supported. Passes need a `kv_cache`
        and `torch.no_grad()`.

        Args:
            config: diffusers' context-parallel config; any other config is passed on to diffusers.
            cp_plan: passed on to diffusers with any other config.

        Raises:
            ValueError: ring attention, a number of heads that `ulysses_degree` does not divide, or a model that
                attends to images.
            RuntimeError: called twice, or in a process that `torchrun` did not start.
        """
        wanted = getattr(config, "context_parallel_config", config)
        if not isinstance(wanted, ContextParallelConfig):
            super().enable_parallelism(config=config, cp_plan=cp_plan)
            return
        if self.context_parallel is not None:
            raise RuntimeError("enable_parallelism() was called before on this transformer: call it once")
        if self.config.added_kv_proj_dim is not None:
            raise ValueError("a model that attends to images cannot run on several GPUs")
        self.context_parallel = ContextParallel.from_config(wanted, self.config.num_attention_heads, self.device)
        self._parallel_config = config

    def _split(self, kv_cache: KVCache | None, frame_offset: int, *inputs: torch.Tensor) -> TokenSplit | None:
        """Divide the tokens of this pass among the processes, if any; `inputs` are latents, timestep and text."""
        if self.context_parallel is None:
            return None
        if kv_cache is None or torch.is_grad_enabled():
            raise ValueError(
                "a transformer that runs on several GPUs needs a kv_cache and no gradients: pass a kv_cache, under "
                "torch.no_grad()"
            )
        frames = inputs[0].shape[2] // self.config.patch_size[0]
        # Only once a chunk and once a prompt, because the check waits for the device.
        if kv_cache.frames[-frames:][:1] != [frame_offset] or kv_cache.layers[0].get_text() is None:
            names = ("latents", "timestep", "prompt embeddings")
            offset = torch.tensor(frame_offset, device=inputs[0].device)
            self.context_parallel.require_same(dict(zip((*names, "frame offset"), (*inputs, offset), strict=True)))
        return self.context_parallel.split(frames * tokens_per_frame(self, inputs[0]))

    def _apply(self, fn: Any, recurse: bool = True) -> CausalWanTransformer3DModel:
        """Move or cast the model, for `to`, `cpu` and others; drop the fused forward if its weights have moved."""
        super()._apply(fn, recurse)
        if self._fused_pass is not None and not self._fused_pass.fits(self):
            self._fused_pass = None
        return self

    def to(self, *args: Any, **kwargs: Any) -> CausalWanTransformer3DModel:
        """Move the model. A quantized model keeps its dtypes: only the device of the arguments counts."""
        if not getattr(self, "is_quantized", False):
            return super().to(*args, **kwargs)
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        return self if device is None else super().to(device=device, non_blocking=non_blocking)

    def enable_cache(self, config: Any) -> None:
        """Raise an error: diffusers' caches skip blocks, whose keys and values would be missing from the K/V cache.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"enable_cache({type(config).__name__}) skips blocks of a pass, but {_NO_CACHE}: leave it out"
        )

    def enable_layerwise_casting(self, *args: Any, **kwargs: Any) -> None:
        """Cast layers as in diffusers.

        Raises:
            ValueError: the model is quantized; its packed weights are smaller than any cast.
        """
        self._refuse_if_quantized("enable_layerwise_casting", "leave it out, or use it on the float model")
        super().enable_layerwise_casting(*args, **kwargs)

    def fuse_qkv_projections(self) -> None:
        """Fuse q, k and v as in diffusers.

        Raises:
            ValueError: the model is quantized; the fused layer would have float weights.
        """
        self._refuse_if_quantized("fuse_qkv_projections", "fuse before quantizing")
        super().fuse_qkv_projections()

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Fuse adapters as in diffusers.

        Raises:
            ValueError: the model is quantized; the adapter would have no effect.
        """
        self._refuse_if_quantized(
            "fuse_lora", "keep the adapter unfused, or fuse into the float model and quantize that"
        )
        super().fuse_lora(*args, **kwargs)

    def unload_lora(self) -> None:
        """Remove all adapters, and what they added to parameters outside of Linear layers."""
        if hasattr(self, "lora_differences"):
            from .lora_differences import remove_differences  # imports PEFT

            remove_differences(self)
        super().unload_lora()

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path_or_dict: Any, **kwargs: Any
    ) -> CausalWanTransformer3DModel:
        """Load a single file as in diffusers; one that Q-ARVD wrote holds its config and quantization in its header.

        Args:
            pretrained_model_link_or_path_or_dict: file with original key names.
            **kwargs: those of diffusers, such as `dtype`, and `config` for a file that Q-ARVD did not write.

        Raises:
            ValueError: the file is truncated, does not hold exactly the tensors that its header lists, or has layers
                for controls.
        """
        source = pretrained_model_link_or_path_or_dict
        local = isinstance(source, str | os.PathLike) and os.path.isfile(source)
        local = local and str(source).endswith(".safetensors")
        header = read_single_file(source) if local and not {"config", "quantization_config"} & kwargs.keys() else None
        source = str(source) if local else source
        if header is None:
            return super().from_single_file(source, **kwargs)
        if "control_dim" in header.transformer:
            raise ValueError(
                f"{source} holds a transformer with controls, which is loaded from a folder: convert it with `qarvd "
                "convert FILE FOLDER`"
            )
        found = check_single_file(source, header)
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
                json.dump({"_class_name": cls.__name__, **header.transformer}, file)
            kwargs |= {"config": folder, "quantization_config": header.quantization}
            try:
                model = super().from_single_file(source, **kwargs)
            except ValueError as error:  # of diffusers, and of the quantizer, which is not told the file
                raise ValueError(f"{source}: {error}") from error
        check_float_values(model, found, source)
        model.register_to_config(_name_or_path=str(source))
        if header.quantization is not None:
            model.register_to_config(quantization_config=header.quantization)
        return model

    def _refuse_if_quantized(self, method: str, remedy: str) -> None:
        """Raise a ValueError that names `method` and the remedy, if the model is quantized."""
        if getattr(self, "is_quantized", False):
            raise ValueError(f"{method}() cannot change packed integer weights of a quantized transformer: {remedy}")

    def to_json_string(self) -> str:
        """Return the config as JSON with the stock class's name, which diffusers can load, and no local path."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        config["_class_name"] = WanTransformer3DModel.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"
