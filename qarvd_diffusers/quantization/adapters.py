"""Read the adapters (PEFT) of a model."""

from __future__ import annotations

from torch import nn


def adapter_scales(transformer: nn.Module) -> dict[str, float]:
    """Read the active adapters of a transformer and their scales.

    Raises:
        ValueError: an adapter has different scales in different layers, which one number per adapter cannot say.
    """
    different = {name: set(scales.values()) for name, scales in layer_scales(transformer).items()}
    uneven = sorted(name for name, scales in different.items() if len(scales) > 1)
    if uneven:
        raise ValueError(
            f"adapters {uneven} have different scales in different layers, which a checkpoint cannot record: give "
            "each one scale with set_adapters before calibrating, or merge them into the float model"
        )
    return {name: scales.pop() for name, scales in different.items()}


def layer_scales(transformer: nn.Module) -> dict[str, dict[str, float]]:
    """Read the active adapters of a transformer: adapter -> layer -> its scale there."""
    scales: dict[str, dict[str, float]] = {}
    for path, module in transformer.named_modules():
        if not hasattr(module, "use_rslora") or module.disable_adapters:
            continue
        for name in module.active_adapters:
            if name in module.scaling and module.lora_alpha[name]:  # with an alpha of 0 a layer adds nothing
                rank = module.r[name] ** 0.5 if module.use_rslora[name] else module.r[name]
                scales.setdefault(name, {})[path] = round(module.scaling[name] * rank / module.lora_alpha[name], 6)
    return scales
