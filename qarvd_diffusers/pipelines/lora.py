"""LoRA for `ARVDPipeline`: diffusers' own methods, every common file layout, quantized models included."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import WanLoraLoaderMixin
from torch import nn

from ..calibration.targets import base_linears
from ..conversion import LORA_NESTINGS, check_fit, load_checkpoint, read_lora, to_peft


class LoraMixin(WanLoraLoaderMixin):
    """`load_lora_weights`, `set_adapters`, `unload_lora_weights` and their kin, as every diffusers pipeline has them.

    A quantized layer keeps its integer weights and gets the adapter's two float products added, so adapters may be
    stacked, scaled and removed at will. Fusing is refused: integer weights cannot take up an adapter.
    """

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor], **kwargs: Any
    ) -> Any:
        """The tensors of a LoRA under diffusers names; ranks and alphas as `LoraConfig` arguments beside them.

        Args:
            pretrained_model_name_or_path_or_dict: a state dict, a folder or Hub id (see diffusers), or a `.safetensors`,
                `.pt` or `.pth` file (`weights_only=True`); original Wan, diffusers, PEFT, kohya or ComfyUI names.
            **kwargs: those of diffusers; `return_lora_metadata` adds the `LoraConfig` arguments to the result.

        Raises:
            ValueError: for another kind of adapter or architecture, and for damaged files; see `read_lora`.
        """
        with_metadata = kwargs.pop("return_lora_metadata", False)
        given = pretrained_model_name_or_path_or_dict
        source = "the LoRA" if isinstance(given, dict) else str(given)
        if not isinstance(given, dict) and Path(given).is_file() and Path(given).suffix in (".pt", ".pth"):
            given = load_checkpoint(given, nestings=LORA_NESTINGS)
        tensors, metadata = _fetch(given, **kwargs)
        if metadata is None:
            tensors, metadata = to_peft(read_lora(tensors, source))
        return (tensors, metadata) if with_metadata else tensors

    @classmethod
    def load_lora_into_transformer(
        cls, state_dict: Mapping[str, torch.Tensor], transformer: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter to a transformer.

        Raises:
            ValueError: it was made for other layers or another size; nothing is changed then.
        """
        sizes = {name: (layer.out_features, layer.in_features) for name, layer in base_linears(transformer).items()}
        check_fit(read_lora(state_dict), sizes)
        super().load_lora_into_transformer(state_dict, transformer, *args, **kwargs)


def _fetch(given: Any, **kwargs: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """The file's own tensors and, where diffusers wrote it, its `LoraConfig` arguments; pickles are never opened."""
    from diffusers.loaders.lora_base import _fetch_state_dict

    names = (
        "weight_name",
        "local_files_only",
        "cache_dir",
        "force_download",
        "proxies",
        "token",
        "revision",
        "subfolder",
    )
    options = {name: kwargs.get(name) for name in names}
    user_agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    return _fetch_state_dict(given, use_safetensors=True, allow_pickle=False, user_agent=user_agent, **options)


def adapter_scales(transformer: nn.Module) -> dict[str, float]:
    """The active adapters of a transformer and their scales.

    Raises:
        ValueError: an adapter has different scales in different layers, which one number per adapter cannot say.
    """
    found: dict[str, set[float]] = {}
    for module in transformer.modules():
        if not hasattr(module, "base_layer") or getattr(module, "disable_adapters", False):
            continue
        for name in module.active_adapters:
            if name in module.scaling:
                rank = module.r[name] ** 0.5 if module.use_rslora[name] else module.r[name]
                found.setdefault(name, set()).add(round(module.scaling[name] * rank / module.lora_alpha[name], 6))
    uneven = sorted(name for name, scales in found.items() if len(scales) > 1)
    if uneven:
        raise ValueError(
            f"adapters {uneven} have different scales in different layers, which a checkpoint cannot record: give each one "
            "scale with set_adapters before calibrating, or merge them into the float model"
        )
    return {name: scales.pop() for name, scales in found.items()}
