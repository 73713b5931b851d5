"""Convert a pipeline's transformer to a ComfyUI MODEL: ComfyUI's own causal Wan model with our quantized layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.lora
import comfy.model_management as management
import comfy.ops
import comfy.sd
import comfyui_version
import torch
from comfy.patcher_extension import CallbacksMP

from .compat import NodeError
from .handles import PipelineHandle
from .library import library


def to_model(handle: PipelineHandle) -> Any:
    """Make a ModelPatcher of ComfyUI's causal Wan model that computes with the pipeline's layers.

    Raises:
        NodeError: if this ComfyUI has no causal Wan model.
    """
    try:
        import comfy.ldm.wan.ar_model
    except ImportError:
        raise NodeError(
            f"ComfyUI {comfyui_version.__version__} has no causal Wan model; version 0.21 added it.",
            "Update ComfyUI, or generate with Q-ARVD Stream Generate.",
        ) from None
    transformer = handle.pipe.transformer
    layers = library().quantized_linears(transformer)
    named = {
        name: tensor
        for name, tensor in transformer.state_dict().items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }
    # ComfyUI detects the architecture from shapes of weights; these take no memory.
    named |= {
        f"{name}.weight": torch.empty(layer.out_features, layer.in_features, dtype=layer.dtype, device="meta")
        for name, layer in layers.items()
    }
    original = library().to_original_keys(named, prefix="")
    pairs = [
        (old.removesuffix(".weight"), new.removesuffix(".weight")) for old, new in zip(named, original, strict=True)
    ]
    modules = {new: layers[old] for old, new in pairs if old in layers}
    offload = management.unet_offload_device()
    patcher = comfy.sd.load_diffusion_model_state_dict(
        {key: tensor if tensor.is_meta else tensor.to(offload, copy=True) for key, tensor in original.items()},
        model_options={"custom_operations": _operations(modules), "dtype": transformer.dtype},
        metadata=library("models.single_file_header").comfyui_metadata(transformer.config),
    )
    patcher.add_callback(CallbacksMP.ON_LOAD, _set_loras)
    patcher.add_callback(CallbacksMP.ON_DETACH, _remove_loras)
    patcher.model.state_dict_for_saving = _save_error(bool(layers))
    if handle.pipe.vae is not None:
        patcher.model.latent_format = _latent_format(patcher.model.latent_format, handle.pipe.vae.config)
    return patcher


def _latent_format(core: Any, config: Any) -> Any:
    """Copy ComfyUI's latent format, with the statistics of the pipeline's own VAE."""
    own = copy.copy(core)
    for name, values in (("latents_mean", config.latents_mean), ("latents_std", config.latents_std)):
        setattr(own, name, torch.tensor(values).view(1, -1, 1, 1, 1))
    return own


def _operations(layers: dict[str, torch.nn.Module]) -> type:
    """Make ComfyUI operations whose Linear turns into the layer of its name in `layers` when weights are loaded."""
    packed_linear = _packed_linear(library().QARVDLinear)

    class Operations(comfy.ops.manual_cast):
        """Replace ComfyUI's Linear."""

        class Linear(comfy.ops.manual_cast.Linear):
            """Turn into a quantized layer when weights are loaded."""

            def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
                layer = layers.get(prefix[:-1])
                if layer is None:
                    super()._load_from_state_dict(state_dict, prefix, *args)
                    return
                self.__class__ = packed_linear
                self.__dict__ = copy.deepcopy(layer).to(management.unet_offload_device()).__dict__

    return Operations


def _packed_linear(base: type) -> type:
    """Make the class of a quantized layer inside ComfyUI's model; `base` is `QARVDLinear`."""

    class PackedLinear(base):
        """Adapt a quantized layer to ComfyUI's patchers, and add LoRAs to its output.

        Its state dict lists what can be patched: `weight`, the dequantized weight, and `bias`. The packed tensors are
        parameters, so that they are moved, but they cannot be patched or merged.
        """

        _lora: _Lora | None = None

        def set_output_lora(self, lora: _Lora | None) -> None:
            """Add a LoRA to the output from now on, or none."""
            self._lora = lora

        def set_weight(self, *_: Any, **__: Any) -> None:
            """Raise an error: LoRAs are set by the load hook, so only another feature writes a patched weight."""
            raise NodeError(
                "LoRA hooks, which switch a LoRA on and off between steps, do not support quantized layers.",
                "Use Load LoRA (Model), or use the hooks with a float pipeline's model.",
            )

        def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
            packed = sum(tensor.nbytes for name, tensor in self.named_parameters() if name != "bias")
            # An expanded tensor: it reports the bytes of the packed tensors and takes none itself.
            destination[f"{prefix}weight"] = self.weight_packed.new_zeros(1).expand(packed)
            if self.bias is not None:
                destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Map `[..., K]` to `[..., N]`, the LoRA included."""
            result = super().forward(x) if self.weight_packed.device == x.device else self._forward_with_copies(x)
            return result if self._lora is None else result + self._lora(x).to(result)

        def _forward_with_copies(self, x: torch.Tensor) -> torch.Tensor:
            """Copy weights that ComfyUI left on another device to the device of `x`, for this call only."""
            home = self._parameters, self._buffers
            try:
                self.__dict__["_parameters"], self.__dict__["_buffers"] = (_at(x.device, tensors) for tensors in home)
                return super().forward(x)
            finally:
                self.__dict__["_parameters"], self.__dict__["_buffers"] = home

    return PackedLinear


def _at(device: torch.device, tensors: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """Copy tensors to a device."""
    return {name: None if tensor is None else tensor.detach().to(device) for name, tensor in tensors.items()}


class _Lora:
    """Compute what the patches of a layer add to its output: `x @ down.T @ up.T + bias`."""

    def __init__(self, layer: Any, key: str, patches: dict[str, list], bias_is_patched: bool, device: Any) -> None:
        self.down = self.up = self.bias = None
        weight_patches, bias_patches = patches.get(f"{key}.weight", []), patches.get(f"{key}.bias", [])
        if weight_patches and all(map(_is_plain, weight_patches)):
            # Several LoRAs are one LoRA; the ranks add up.
            factors = [_factors(patch, device) for patch in weight_patches]
            self.up = torch.cat([up for up, _ in factors], dim=1).to(layer.dtype)
            self.down = torch.cat([down for _, down in factors]).to(layer.dtype)
        elif weight_patches:
            weight = layer.dequantized().to(device, torch.float32)
            self.up = _difference(weight, weight_patches, f"{key}.weight").to(layer.dtype)
        if bias_patches and layer.bias is not None and not bias_is_patched:
            self.bias = _difference(layer.bias.to(device, torch.float32), bias_patches, f"{key}.bias").to(layer.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[..., K]` to `[..., N]`."""
        if self.up is None:
            return self.bias
        inner = x if self.down is None else torch.nn.functional.linear(x, self.down.to(x))
        return torch.nn.functional.linear(inner, self.up.to(x), None if self.bias is None else self.bias.to(x))


def _is_plain(patch: tuple) -> bool:
    """Tell whether a patch adds the product of two factors to the whole weight, without rescaling."""
    _, value, strength_model, offset, function = patch
    plain = strength_model == 1.0 and offset is None and function is None and type(value).__name__ == "LoRAAdapter"
    return plain and all(part is None for part in value.weights[3:])


def _factors(patch: tuple, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 `[N, rank]` and `[rank, K]`; a plain patch adds their product to the weight."""
    strength, value = patch[:2]
    up, down, alpha = value.weights[:3]
    up, down = (factor.to(device, torch.float32).flatten(start_dim=1) for factor in (up, down))
    return strength * (1.0 if alpha is None else alpha / down.shape[0]) * up, down


def _difference(tensor: torch.Tensor, patches: list, key: str) -> torch.Tensor:
    """Compute what patches of any kind add to a float32 weight or bias."""
    patched = comfy.lora.calculate_weight(patches, tensor.clone(), key)
    if patched.shape != tensor.shape:
        raise NodeError(
            f"A LoRA changes the shape of {key} from {list(tensor.shape)} to {list(patched.shape)}.",
            "Use a LoRA that was trained for this model: quantized layers cannot change their shape.",
        )
    return patched - tensor


def _set_loras(patcher: Any, device: torch.device, *_: Any) -> None:
    """Set the LoRAs of our layers after ComfyUI has loaded the model; its loaders skip these layers."""
    dynamic = getattr(patcher, "is_dynamic", lambda: False)()
    for name, layer in _packed_layers(patcher):
        keys = {f"{name}.weight", f"{name}.bias"} & patcher.patches.keys()
        patched = f"{name}.bias" in patcher.backup and not dynamic  # the static loader patches biases that it moves
        layer.set_output_lora(_Lora(layer, name, patcher.patches, patched, device) if keys else None)


def _remove_loras(patcher: Any, unpatch: bool, *_: Any) -> None:
    """Remove the LoRAs when ComfyUI unloads the model; the next load sets them again."""
    for _name, layer in _packed_layers(patcher) if unpatch else ():
        layer.set_output_lora(None)


def _packed_layers(patcher: Any) -> list[tuple[str, Any]]:
    """List the quantized layers of a patcher's model, with their names."""
    return [(name, layer) for name, layer in patcher.model.named_modules() if hasattr(layer, "set_output_lora")]


def _save_error(quantized: bool) -> Callable:
    """Make a function that raises an error when one of ComfyUI's savers asks the model for its state dict."""

    def raise_error(*_: Any, **__: Any) -> None:
        raise NodeError(
            "ComfyUI's own savers cannot write the model of Q-ARVD To Model in a form that can be loaded.",
            "Save the pipeline with Q-ARVD Save Quantized, as a qarvd folder or as a ComfyUI int8 file."
            if quantized
            else "Connect Q-ARVD Quantize and Q-ARVD Save Quantized, or call pipe.save_single_file(path) in Python.",
        )

    return raise_error
