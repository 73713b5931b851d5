"""Load LoRA files of every common layout into `ARVDPipeline`, float or quantized, by diffusers' own methods."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import WanLoraLoaderMixin
from safetensors import SafetensorError
from torch import nn

from ..calibration.targets import base_linears
from ..conversion import LORA_NESTINGS, check_fit, load_checkpoint, read_lora, to_peft
from ..conversion.lora import DIFFERENCES
from ..conversion.peft import with_bias_pairs
from ..files.safetensors import check_finite
from .stored_components import named_errors


class LoraMixin(WanLoraLoaderMixin):
    """Add `load_lora_weights`, `set_adapters`, `unload_lora_weights` and related methods of diffusers pipelines.

    A quantized layer keeps its integer weights, and the adapter's float products are added to its output: adapters can
    be combined, scaled and removed. Differences of norms, modulation and patch embedding are added to these
    parameters, which are float in every model, and subtracted when the adapter is removed. Fusing into integer weights
    raises an error.
    """

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor], **kwargs: Any
    ) -> Any:
        """Return the tensors of a LoRA under diffusers names, and on request its ranks and alphas.

        Args:
            pretrained_model_name_or_path_or_dict: a state dict, a folder or Hub id (see diffusers), or a
                `.safetensors`, `.pt`, `.pth` or `.bin` file (`weights_only=True`); original Wan, diffusers, PEFT,
                kohya or ComfyUI names.
            **kwargs: those of diffusers; `return_lora_metadata` adds the `LoraConfig` arguments to the result.

        Raises:
            ValueError: for another kind of adapter or architecture, or a damaged file; see `read_lora`.
        """
        with_metadata = kwargs.pop("return_lora_metadata", False)
        given = pretrained_model_name_or_path_or_dict
        source = "the LoRA" if isinstance(given, dict) else str(given)
        if not isinstance(given, dict):
            file = Path(given, kwargs.get("subfolder") or "", kwargs.get("weight_name") or "")
            if file.is_file() and file.suffix != ".safetensors":
                source, given = str(file), load_checkpoint(file, nestings=LORA_NESTINGS)
        if isinstance(given, dict):  # the layers keep these tensors, and hot-swapping overwrites them
            given = {key: tensor.clone() for key, tensor in given.items()}
        try:
            tensors, metadata = _fetch(given, **kwargs)
        except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{source}: unreadable or truncated ({error}); download the file again") from error
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                check_finite(tensor, f"{source}: {name}")
        lora = read_lora(tensors, source)
        if metadata is None:
            tensors, metadata = to_peft(lora)
        return (tensors, metadata) if with_metadata else tensors

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """Load an adapter as in diffusers.

        Raises:
            ValueError: as `lora_state_dict` and `load_lora_into_transformer`; the message names the file.
        """
        source = pretrained_model_name_or_path_or_dict
        with named_errors("" if isinstance(source, dict) else str(source), None, ()):
            super().load_lora_weights(source, *args, **kwargs)

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: Mapping[str, torch.Tensor],
        transformer: nn.Module,
        adapter_name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add an adapter to a transformer; arguments as in diffusers.

        Raises:
            ValueError: if it was made for other layers or another size, its name cannot be that of a module, or
                parameters that it adds to are offloaded; the model is not changed then.
        """
        from ..models.lora_differences import add_differences  # imports PEFT

        name = _free_name(transformer) if adapter_name is None else _checked_name(adapter_name)
        linears = {name: (layer.out_features, layer.in_features) for name, layer in base_linears(transformer).items()}
        sizes = linears | _parameter_sizes(transformer)
        check_fit(read_lora(state_dict), sizes)
        differences, pairs = {}, {}
        for key, tensor in state_dict.items():
            match = re.fullmatch(rf"(?:transformer\.)?{DIFFERENCES}\.(.+?)(?:\.lora_difference)?", key)
            (pairs if match is None else differences)[key if match is None else match[1]] = tensor
        biases = {key: differences.pop(key) for key in list(differences) if key.removesuffix(".bias") in linears}
        _check_not_offloaded(transformer, differences)
        pairs, metadata = with_bias_pairs(pairs, dict(metadata or {}), biases, linears)
        super().load_lora_into_transformer(pairs, transformer, adapter_name=name, metadata=metadata or None, **kwargs)
        add_differences(transformer, name, differences)


def _free_name(transformer: nn.Module) -> str:
    """Return the first default adapter name that is not in use."""
    used = getattr(transformer, "peft_config", {})
    return next(name for number in range(len(used) + 1) if (name := f"default_{number}") not in used)


def _checked_name(name: str) -> str:
    """Return an adapter's name; raise ValueError if a module cannot have it."""
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter_name is {name!r}: PyTorch stores an adapter as a module of that name, which must not be empty, "
            "contain a dot or be a method of a dictionary; use letters, digits and underscores"
        )
    return name


def _parameter_sizes(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all float parameters except adapters'; weights have the name of their module."""
    sizes = {}
    for name, parameter in transformer.named_parameters():
        if "lora_" not in name and parameter.is_floating_point():
            sizes[name.replace(".base_layer.", ".").removesuffix(".weight")] = tuple(parameter.shape)
    return sizes


def _check_not_offloaded(transformer: nn.Module, differences: Mapping[str, torch.Tensor]) -> None:
    away = [name for name in differences if transformer.get_parameter(name).is_meta]
    if away:
        raise ValueError(
            f"the adapter adds to {len(away)} parameters that are offloaded to the meta device (first: {away[0]}): "
            "load it before enable_sequential_cpu_offload(), or use enable_group_offload()"
        )


def _fetch(given: Any, **kwargs: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Return a file's tensors and, if diffusers wrote it, its `LoraConfig` arguments; pickles are never opened."""
    from diffusers.loaders.lora_base import _fetch_state_dict

    names = "weight_name local_files_only cache_dir force_download proxies token revision subfolder"
    options = {name: kwargs.get(name) for name in names.split()}
    user_agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    return _fetch_state_dict(given, use_safetensors=True, allow_pickle=False, user_agent=user_agent, **options)
