"""LoRA for `ARVDPipeline`: diffusers' own methods, every common file layout, quantized models included."""

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


class LoraMixin(WanLoraLoaderMixin):
    """`load_lora_weights`, `set_adapters`, `unload_lora_weights` and their kin, as every diffusers pipeline has them.

    A quantized layer keeps its integer weights and gets the adapter's two float products added, so adapters may be
    stacked, scaled and removed at will. What an adapter adds to norms, modulation and patch embedding is added to these
    parameters, which are float in every model, and taken off with it. Fusing is refused: integer weights cannot take up an
    adapter.
    """

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor], **kwargs: Any
    ) -> Any:
        """The tensors of a LoRA under diffusers names; ranks and alphas as `LoraConfig` arguments beside them.

        Args:
            pretrained_model_name_or_path_or_dict: a state dict, a folder or Hub id (see diffusers), or a `.safetensors`,
                `.pt`, `.pth` or `.bin` file (`weights_only=True`); original Wan, diffusers, PEFT, kohya or ComfyUI names.
            **kwargs: those of diffusers; `return_lora_metadata` adds the `LoraConfig` arguments to the result.

        Raises:
            ValueError: for another kind of adapter or architecture, and for damaged files; see `read_lora`.
        """
        with_metadata = kwargs.pop("return_lora_metadata", False)
        given = pretrained_model_name_or_path_or_dict
        source = "the LoRA" if isinstance(given, dict) else str(given)
        if not isinstance(given, dict):
            file = Path(given, kwargs.get("subfolder") or "", kwargs.get("weight_name") or "")
            if file.is_file() and file.suffix != ".safetensors":
                source, given = str(file), load_checkpoint(file, nestings=LORA_NESTINGS)
        if isinstance(given, dict):  # the adapter's layers keep these tensors, and hot-swapping writes to them
            given = {key: tensor.clone() for key, tensor in given.items()}
        try:
            tensors, metadata = _fetch(given, **kwargs)
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{source}: unreadable or truncated ({error}); download the file again") from error
        lora = read_lora(tensors, source)
        if metadata is None:
            tensors, metadata = to_peft(lora)
        return (tensors, metadata) if with_metadata else tensors

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
            ValueError: it was made for other layers or another size, its name cannot be that of a module, or what it adds to
                is offloaded; nothing is changed then.
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
        _check_at_hand(transformer, differences)
        pairs, metadata = _with_biases(pairs, dict(metadata or {}), biases, linears)
        super().load_lora_into_transformer(pairs, transformer, adapter_name=name, metadata=metadata or None, **kwargs)
        add_differences(transformer, name, differences)


def _free_name(transformer: nn.Module) -> str:
    used = getattr(transformer, "peft_config", {})
    return next(name for number in range(len(used) + 1) if (name := f"default_{number}") not in used)


def _checked_name(name: str) -> str:
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter_name is {name!r}: PyTorch keeps an adapter as a module of that name, which must not be empty, hold a dot "
            "or be a method of a dictionary; take letters, digits and underscores"
        )
    return name


def _parameter_sizes(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all float parameters, a weight's under the name of its module; adapters do not show."""
    found = {}
    for name, parameter in transformer.named_parameters():
        if "lora_" not in name and parameter.is_floating_point():
            found[name.replace(".base_layer.", ".").removesuffix(".weight")] = tuple(parameter.shape)
    return found


def _check_at_hand(transformer: nn.Module, differences: Mapping[str, torch.Tensor]) -> None:
    away = [name for name in differences if transformer.get_parameter(name).is_meta]
    if away:
        raise ValueError(
            f"the adapter adds to {len(away)} parameters that are offloaded to the meta device (first: {away[0]}): load it before "
            "enable_sequential_cpu_offload(), or use enable_group_offload()"
        )


def _with_biases(
    pairs: dict[str, torch.Tensor],
    metadata: dict[str, Any],
    biases: Mapping[str, torch.Tensor],
    linears: Mapping[str, tuple[int, int]],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Pairs and `LoraConfig` arguments with a pair of zeros for every layer of which the adapter changes the bias alone.

    An adapter without any pair gets one as well: PEFT knows adapters by their layers.
    """
    prefix = "transformer."
    added = [key.removesuffix(".bias") for key in biases] or ([] if pairs else [next(iter(linears))])
    if not added:
        return pairs, metadata
    some = next(iter([*biases.values(), *pairs.values()]), torch.zeros(()))
    for name in added:
        rows, columns = linears[name]
        pairs[f"{prefix}{name}.lora_A.weight"] = some.new_zeros(1, columns)
        pairs[f"{prefix}{name}.lora_B.weight"] = some.new_zeros(rows, 1)
        for pattern in ("rank_pattern", "alpha_pattern"):
            metadata[f"{prefix}{pattern}"] = {**metadata.get(f"{prefix}{pattern}", {}), f"^{name}": 1}
    metadata[f"{prefix}target_modules"] = [*metadata.get(f"{prefix}target_modules", ()), *added]
    if biases:
        metadata[f"{prefix}lora_bias"] = True
        for key in [key for key in pairs if key.endswith(".lora_B.weight")]:
            module = key.removesuffix(".lora_B.weight")
            zero = pairs[key].new_zeros(pairs[key].shape[0])
            pairs.setdefault(f"{module}.lora_B.bias", biases.get(f"{module.removeprefix(prefix)}.bias", zero))
    return pairs, metadata


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


def layer_scales(transformer: nn.Module) -> dict[str, dict[str, float]]:
    """The active adapters of a transformer: adapter -> layer -> its scale there."""
    found: dict[str, dict[str, float]] = {}
    for path, module in transformer.named_modules():
        if not hasattr(module, "use_rslora") or module.disable_adapters:
            continue
        for name in module.active_adapters:
            if name in module.scaling and module.lora_alpha[name]:  # with an alpha of 0 a layer adds nothing
                rank = module.r[name] ** 0.5 if module.use_rslora[name] else module.r[name]
                found.setdefault(name, {})[path] = round(module.scaling[name] * rank / module.lora_alpha[name], 6)
    return found


def adapter_scales(transformer: nn.Module) -> dict[str, float]:
    """The active adapters of a transformer and their scales.

    Raises:
        ValueError: an adapter has different scales in different layers, which one number per adapter cannot say.
    """
    found = {name: set(scales.values()) for name, scales in layer_scales(transformer).items()}
    uneven = sorted(name for name, scales in found.items() if len(scales) > 1)
    if uneven:
        raise ValueError(
            f"adapters {uneven} have different scales in different layers, which a checkpoint cannot record: give each one "
            "scale with set_adapters before calibrating, or merge them into the float model"
        )
    return {name: scales.pop() for name, scales in found.items()}
