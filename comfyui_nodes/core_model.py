"""A pipeline's transformer as a ComfyUI MODEL: our quantized layers inside ComfyUI's own causal Wan model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import comfy.ops
import comfy.sd
import comfy.utils
import comfyui_version
import torch

from .compat import NodeError
from .handles import PipelineHandle
from .library import library


def to_model(handle: PipelineHandle) -> Any:
    """A ModelPatcher of ComfyUI's causal Wan model that computes with the pipeline's layers.

    Raises:
        NodeError: this ComfyUI has no causal Wan model.
    """
    try:
        import comfy.ldm.wan.ar_model
    except ImportError:
        raise NodeError(
            f"ComfyUI {comfyui_version.__version__} has no causal Wan model, which came with 0.21.",
            "Update ComfyUI, or generate with Q-ARVD Stream Generate.",
        ) from None
    transformer = handle.pipe.transformer
    layers = library().quantized_linears(transformer)
    named = {
        name: tensor
        for name, tensor in transformer.state_dict().items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }
    # ComfyUI tells the architecture from shapes of weights; these take no memory.
    named |= {
        f"{name}.weight": torch.empty(layer.out_features, layer.in_features, dtype=layer.dtype, device="meta")
        for name, layer in layers.items()
    }
    original = library().to_original_keys(named, prefix="")
    pairs = [
        (old.removesuffix(".weight"), new.removesuffix(".weight")) for old, new in zip(named, original, strict=True)
    ]
    modules = {new: layers[old] for old, new in pairs if old in layers}
    patcher = comfy.sd.load_diffusion_model_state_dict(
        {key: tensor.clone() if tensor.device.type != "meta" else tensor for key, tensor in original.items()},
        model_options={"custom_operations": _operations(modules), "dtype": transformer.dtype},
        metadata=library("models.single_file").comfyui_metadata(transformer.config),
    )
    if handle.pipe.vae is not None:
        patcher.model.latent_format = _latent_format(patcher.model.latent_format, handle.pipe.vae.config)
    return patcher


def _latent_format(core: Any, config: Any) -> Any:
    """ComfyUI's latent format with the statistics of the pipeline's own VAE."""
    own = copy.copy(core)
    for name, values in (("latents_mean", config.latents_mean), ("latents_std", config.latents_std)):
        setattr(own, name, torch.tensor(values).view(1, -1, 1, 1, 1))
    return own


def _operations(layers: dict[str, torch.nn.Module]) -> type:
    """ComfyUI's operations with a Linear that becomes one of `layers` (by its name) when the weights are loaded."""
    packed_linear = _packed_linear(library().QARVDLinear)

    class Operations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
                layer = layers.get(prefix[:-1])
                if layer is None:
                    super()._load_from_state_dict(state_dict, prefix, *args)
                    return
                self.__class__ = packed_linear
                self.__dict__ = copy.deepcopy(layer).__dict__

    return Operations


def _packed_linear(base: type) -> type:
    class PackedLinear(base):
        """A quantized layer that ComfyUI can lay a LoRA over.

        `weight` reads as the de-quantized weight. Writing to it keeps the difference beside the packed weight, and writing the
        original back drops it: that is how ComfyUI applies and removes a LoRA.
        """

        difference: torch.Tensor | None = None

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "weight":
                self.set_weight(value)
            else:
                super().__setattr__(name, value)

        def set_weight(self, weight: torch.Tensor, **_: Any) -> None:
            difference = weight.detach().float() - self.weight.to(weight.device).float()
            kept = difference.to(self.dtype) if bool(difference.any()) else None
            object.__setattr__(self, "difference", kept)

        @property
        def _stand_in(self) -> torch.Tensor:
            """Something of the weight's shape that takes one byte."""
            return self.weight_packed.new_zeros(1, 1).expand(self.out_features, self.in_features)

        # ComfyUI looks for "weight" in these two places.
        def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
            yield from super().named_parameters(*args, **options)
            yield "weight", self._stand_in

        def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}weight"] = self._stand_in

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = super().forward(x)
            if self.difference is not None:
                result = result + torch.nn.functional.linear(x, self.difference.to(x))
            return result

    return PackedLinear
