"""Define the values that are passed between our nodes.

They are never changed: ComfyUI caches node results and returns them again.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import comfy.model_management as management
import comfy.model_patcher
import torch
from comfy_api.latest import io

from .compat import NodeError

if TYPE_CHECKING:
    from qarvd_diffusers import ARVDPipeline
    from qarvd_diffusers.rollout.saved_state import SavedStream

PipelineType = io.Custom("QARVD_PIPELINE")
CalibrationType = io.Custom("QARVD_CALIBRATION")
StateType = io.Custom("QARVD_STATE")
ACTIVATION_CHUNKS = 16  # working memory of a pass, in units of one chunk's hidden states

# What to do if a component does not fit.
_REMEDIES = {
    "transformer": "Quantize it to w4a8, or stream in Python with a memory preset: ARVDPipeline.from_pretrained(..., "
    'memory="8GB") moves weights in and out.',
    "vae": "Free memory in other programs.",
    "text_encoder": "Encode the prompt with ComfyUI's own Load CLIP (device cpu) and CLIP Text Encode.",
}


class _Shell(torch.nn.Module):
    """Wrap a component for ComfyUI's memory management, which sets `device`; diffusers' models do not allow that."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


class WholePatcher(comfy.model_patcher.ModelPatcher):
    """Load and unload a component as a whole: nothing in it can compute with weights on two devices.

    The dynamic patcher of later versions is not used. It sets one tensor after the other without notifying the model,
    so what the model derived from its weights for a kernel would stay on the GPU.

    Attributes:
        streamed: the component moves its own weights and must not be loaded any more.
    """

    streamed = False

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, **options: Any) -> Any:
        """Load the whole component, however little ComfyUI asks for."""
        with _ordinary_mode():
            return super().partially_load(device_to, 1e32, **options)

    def unpatch_model(self, *args: Any, **options: Any) -> None:
        """Restore the weights; called when ComfyUI unloads the component, which any node may cause."""
        with _ordinary_mode():
            super().unpatch_model(*args, **options)

    def partially_unload(self, *_: Any, **__: Any) -> int:
        """Free nothing: ComfyUI then unloads the whole component."""
        return 0


@contextmanager
def _ordinary_mode() -> Iterator[None]:
    """Leave ComfyUI's inference mode: weights moved inside of it could not be used in calibration any more."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _patcher(module: torch.nn.Module, name: str) -> WholePatcher:
    """Make the patcher of a component; ComfyUI's log shows `name`."""
    shell = type(name, (_Shell,), {})(module)  # ComfyUI's log names a model by its class
    return WholePatcher(
        shell, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


class PipelineHandle:
    """Hold a pipeline whose parts ComfyUI loads to the GPU and unloads, like its own models.

    Attributes:
        pipe: the pipeline; must not be changed.
        name: name in reports and messages.
    """

    def __init__(self, pipe: ARVDPipeline, name: str, parts: dict[str, Any] | None = None) -> None:
        self.pipe, self.name = pipe, name
        self._parts = dict(parts or {})
        for part in _REMEDIES:
            module = getattr(pipe, part)
            if module is not None and part not in self._parts:
                self._parts[part] = _patcher(module, f"{part} of {name}")

    def with_transformer(self, transformer: torch.nn.Module, name: str) -> PipelineHandle:
        """Return a handle with another transformer; the other parts are shared."""
        pipe = self._rebuilt(transformer=transformer)
        return PipelineHandle(pipe, name, {part: p for part, p in self._parts.items() if part != "transformer"})

    def for_streaming(self, **fields: Any) -> ARVDPipeline:
        """Return a pipeline on one device, without text encoder, with some fields of its config replaced."""
        pipe = self._rebuilt(text_encoder=None, tokenizer=None, scheduler=None, **fields)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _rebuilt(self, **replaced: Any) -> ARVDPipeline:
        """Make a pipeline of the same parts, some of them or of the config replaced."""
        # Not from_pipe, which casts the components that the two pipelines share.
        names = inspect.signature(type(self.pipe).__init__).parameters
        fields = {name: self.pipe.config[name] for name in names if name in self.pipe.config}
        pipe = type(self.pipe)(**{**fields, **self.pipe.components, **replaced})
        pipe.source = self.pipe.source
        return pipe

    def load(self, *parts: str, memory: int = 0) -> None:
        """Load parts to the compute device, after making room for them and for `memory` bytes more.

        A text encoder that does not fit is loaded layer by layer from then on, each time it runs.

        Raises:
            NodeError: if another part does not fit, even alone.
        """
        patchers = {
            part: self._parts[part] for part in parts if part in self._parts and not self._parts[part].streamed
        }
        room = float("inf") if management.is_device_cpu(self.device) else management.get_total_memory(self.device)
        error: Exception | None = None
        if sum(patcher.model_size() for patcher in patchers.values()) <= room:
            try:
                management.load_models_gpu(list(patchers.values()), memory_required=memory, force_full_load=True)
                return
            except torch.OutOfMemoryError as caught:
                error, room = caught, management.get_free_memory(self.device)
        for patcher in patchers.values():
            patcher.detach()  # a load that was interrupted left it on two devices
        if "text_encoder" not in patchers or not self._stream_text_encoder():
            raise self._too_large(patchers, room) from error
        self.load(*parts, memory=memory)

    def _stream_text_encoder(self) -> bool:
        """Load the text encoder's layers one by one while it runs; return False if it does not support that."""
        try:
            self.pipe.offload_text_encoder("stream", self.device)
        except ValueError:
            return False
        self._parts["text_encoder"].streamed = True
        logging.info(
            "%s: the text encoder does not fit on %s; its layers are loaded one by one", self.name, self.device
        )
        return True

    def _too_large(self, patchers: dict[str, WholePatcher], room: float) -> NodeError:
        """Make the error for parts that do not fit."""
        sizes = {part: patcher.model_size() for part, patcher in patchers.items()}
        listed = " and ".join(f"{part} ({size / 1e9:.3g} GB)" for part, size in sizes.items())
        return NodeError(
            f"{listed} of {self.name} must be on {self.device} as a whole, but only {room / 1e9:.3g} GB can be "
            "made available.",
            _REMEDIES[max(sizes, key=sizes.get)],
        )

    @property
    def device(self) -> torch.device:
        """Return the device that the parts run on."""
        return management.get_torch_device()


@dataclass(frozen=True)
class StreamState:
    """Hold what a stream continues from.

    Attributes:
        model: name of the pipeline that made it.
        latents: clean normalized latents `[1, C, F, H, W]` of all frames so far.
        generator: state of the noise generator.
        settings: digest of the prompt, the size and the kind of K/V cache, which must be the same to continue exactly.
        saved: what the library continues exactly from. None where the output was not connected: it takes as much host
            memory as the K/V cache.
    """

    model: str
    latents: torch.Tensor
    generator: torch.Tensor
    settings: str
    saved: SavedStream | None = field(compare=False, repr=False)


def working_bytes(pipe: Any, size: tuple[int, int], frames: int) -> int:
    """Estimate the bytes of K/V cache and activations, for ComfyUI to keep free."""
    config = pipe.transformer.config
    scale, patch = pipe.vae_scale_factor_spatial, config.patch_size
    tokens = (size[0] // scale // patch[2]) * (size[1] // scale // patch[1])
    window = pipe.config.local_attention_frames
    width = config.num_attention_heads * config.attention_head_dim
    hidden = tokens * width * pipe.transformer.dtype.itemsize
    cached = 2 * config.num_layers * hidden * (frames if window == -1 else window)
    controls = 2 * config.num_layers if "control_dim" in config else 0  # scale and shift of every block
    return cached + (ACTIVATION_CHUNKS + controls) * hidden * pipe.rollout_config.num_frames_per_chunk
