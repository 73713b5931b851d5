"""Random LoRAs for the tests, written the way the various trainers write them."""

from __future__ import annotations

import torch

from qarvd_diffusers.calibration.targets import base_linears
from qarvd_diffusers.conversion import LoraLayer, to_original_keys


def random_lora(transformer, rank=3, alpha=5.0, seed=0, ranks=None):
    """A LoRA for every Linear inside the blocks, as `read_lora` returns it; `ranks` overrides some by name."""
    generator = torch.Generator().manual_seed(seed)

    def layer(name, linear):
        r = (ranks or {}).get(name, rank)
        down = torch.randn(r, linear.in_features, generator=generator) * 0.2
        return LoraLayer(down, torch.randn(linear.out_features, r, generator=generator) * 0.2, alpha)

    return {name: layer(name, linear) for name, linear in base_linears(transformer).items() if "blocks." in name}


def original_name(module):
    (key,) = to_original_keys({f"{module}.weight": torch.empty(0)}, prefix="")
    return key.removesuffix(".weight")


def as_file(lora, layout):
    """State dict of a LoRA under the names of one ecosystem; layouts without alpha get it multiplied in."""

    def write(name, layer):
        up, alpha = layer.up * layer.scale, {"alpha": torch.tensor(layer.alpha)}
        return {
            "original": {
                f"{original_name(name)}.lora_A.weight": layer.down,
                f"{original_name(name)}.lora_B.weight": up,
            },
            "longlive": {
                f"base_model.model.model.{original_name(name)}.lora_A.default.weight": layer.down,
                f"base_model.model.model.{original_name(name)}.lora_B.default.weight": up,
            },
            "diffusers": {f"transformer.{name}.lora_A.weight": layer.down, f"transformer.{name}.lora_B.weight": up},
            "comfyui": {
                f"diffusion_model.{original_name(name)}.lora_down.weight": layer.down,
                f"diffusion_model.{original_name(name)}.lora_up.weight": layer.up,
                **{f"diffusion_model.{original_name(name)}.{k}": v for k, v in alpha.items()},
            },
            "kohya": {
                f"lora_unet_{original_name(name).replace('.', '_')}.lora_down.weight": layer.down,
                f"lora_unet_{original_name(name).replace('.', '_')}.lora_up.weight": layer.up,
                **{f"lora_unet_{original_name(name).replace('.', '_')}.{k}": v for k, v in alpha.items()},
            },
        }[layout]

    return {key: tensor for name, layer in lora.items() for key, tensor in write(name, layer).items()}


LAYOUTS = ("original", "longlive", "diffusers", "comfyui", "kohya")
