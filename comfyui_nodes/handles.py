"""The values that travel between our nodes. None of them is ever changed: ComfyUI keeps and hands out node results again."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.model_management as management
import comfy.model_patcher
import torch
from comfy_api.latest import io

if TYPE_CHECKING:
    from qarvd_diffusers import ARVDPipeline

PipelineType = io.Custom("QARVD_PIPELINE")
CalibrationType = io.Custom("QARVD_CALIBRATION")
StateType = io.Custom("QARVD_STATE")

_ModelPatcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
_COMPONENTS = ("transformer", "vae", "text_encoder")


class _Shell(torch.nn.Module):
    """A component as ComfyUI's memory management wants it: `device` can be set, which diffusers' models do not allow."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


class PipelineHandle:
    """A pipeline whose parts ComfyUI loads to the GPU and unloads, like its own models.

    Attributes:
        pipe: the pipeline; not to be changed.
        name: for reports.
    """

    def __init__(self, pipe: ARVDPipeline, name: str, parts: dict[str, Any] | None = None) -> None:
        self.pipe, self.name = pipe, name
        self._parts = dict(parts or {})
        for part in _COMPONENTS:
            module = getattr(pipe, part)
            if module is not None and part not in self._parts:
                self._parts[part] = _ModelPatcher(
                    _Shell(module),
                    load_device=management.get_torch_device(),
                    offload_device=management.unet_offload_device(),
                )

    def with_transformer(self, transformer: torch.nn.Module, name: str) -> PipelineHandle:
        """The same pipeline around another transformer; the other parts are shared."""
        pipe = self._rebuilt(transformer=transformer)
        return PipelineHandle(pipe, name, {part: p for part, p in self._parts.items() if part != "transformer"})

    def for_streaming(self, **fields: Any) -> ARVDPipeline:
        """A pipeline without text encoder, whose parts are on one device, with some fields of its config replaced."""
        pipe = self._rebuilt(text_encoder=None, tokenizer=None, scheduler=None, **fields)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _rebuilt(self, **replaced: Any) -> ARVDPipeline:
        # Not from_pipe, which casts what the two pipelines share.
        names = inspect.signature(type(self.pipe).__init__).parameters
        fields = {name: self.pipe.config[name] for name in names if name in self.pipe.config}
        pipe = type(self.pipe)(**{**fields, **self.pipe.components, **replaced})
        pipe.source = self.pipe.source
        return pipe

    def load(self, *parts: str, memory: int = 0) -> None:
        """Bring parts to the compute device, after making room for them and for `memory` bytes more."""
        patchers = [self._parts[part] for part in parts if part in self._parts]
        management.load_models_gpu(patchers, memory_required=memory)

    @property
    def device(self) -> torch.device:
        """Where the parts run."""
        return management.get_torch_device()


@dataclass(frozen=True)
class StreamState:
    """Where a stream stands.

    Attributes:
        model: name of the pipeline it came from.
        latents: clean normalized latents `[1, C, F, H, W]` of all frames so far.
        generator: state of the noise generator.
    """

    model: str
    latents: torch.Tensor
    generator: torch.Tensor
