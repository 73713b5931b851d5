"""Read the JSON files of a model folder, and count bytes from shapes alone, before any weight is read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, ModelMixin
from huggingface_hub import hf_hub_download
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, UMT5EncoderModel

from ..calibration.targets import describe, input_groups, quantizable_linears
from ..config import QARVDConfig
from ..files.schema import read_json
from ..models.transformer_causal_wan import CausalWanTransformer3DModel
from ..models.world import WorldWanTransformer3DModel, transformer_class
from ..quantization.qparams import stored_tensors
from ..rollout.config import RolloutConfig

_PLANNED = ("WanTransformer3DModel", WorldWanTransformer3DModel.__name__)


@dataclass(frozen=True)
class ModelShapes:
    """Hold the configs of a pipeline folder.

    Attributes:
        name: folder or Hub id; not compared.
        index: `model_index.json`.
        transformer: `transformer/config.json`.
        vae: `vae/config.json`, or None.
        text_encoder: `text_encoder/config.json`, or None.
    """

    name: str = field(compare=False)
    index: Mapping[str, Any]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any] | None
    text_encoder: Mapping[str, Any] | None

    def __hash__(self) -> int:
        """Hash the configs: estimates are cached per model."""
        return hash(json.dumps([self.index, self.transformer, self.vae, self.text_encoder], sort_keys=True))

    @classmethod
    def read(cls, name: str | os.PathLike[str], **hub: Any) -> ModelShapes:
        """Read the JSON files of a folder or Hub repository, and nothing else.

        Raises:
            OSError: if a file is missing.
            ValueError: if the folder holds another kind of model.
        """

        def read(file: str) -> dict[str, Any]:
            local = Path(name) / file
            path = local if Path(name).is_dir() else hf_hub_download(str(name), file, **hub)
            return read_json(path)

        index = read("model_index.json")
        if (index.get("transformer") or [None, None])[1] not in _PLANNED:
            raise ValueError(f"{name} has no WanTransformer3DModel: its memory cannot be planned")
        parts = {
            part: read(f"{part}/config.json") if (index.get(part) or [None])[0] is not None else None
            for part in ("transformer", "vae", "text_encoder")
        }
        return cls(str(name), index, **parts)

    @property
    def fields(self) -> RolloutConfig:
        """How the model rolls out."""
        return RolloutConfig.from_config(self.index)

    @property
    def quantization(self) -> QARVDConfig | None:
        """The config of a quantized checkpoint, or None."""
        config = self.transformer.get("quantization_config")
        return None if config is None else QARVDConfig.from_dict(config)

    def empty_transformer(self, layers: int | None = None) -> CausalWanTransformer3DModel:
        """Return the float transformer on the meta device, all of it or its first `layers` blocks."""
        config = {key: value for key, value in self.transformer.items() if key[0] != "_"}
        config.pop("quantization_config", None)
        config["num_layers"] = layers or config["num_layers"]
        with torch.device("meta"):
            return transformer_class(config)(**config).eval()

    def empty_vae(self) -> AutoencoderKLWan:
        """Return the VAE on the meta device."""
        with torch.device("meta"):
            return AutoencoderKLWan.from_config(dict(self.vae)).eval()

    def empty_text_encoder(self) -> nn.Module:
        """Return the text encoder on the meta device."""
        values = dict(self.text_encoder)
        with torch.device("meta"):
            return UMT5EncoderModel(AutoConfig.for_model(values.pop("model_type"), **values)).eval()


def cast(model: nn.Module, dtype: torch.dtype) -> int:
    """Cast a model's parameters as loading in `dtype` does, and return their bytes.

    Some parts are kept in float32: by diffusers always, by transformers in float16 only.
    """
    keeps = isinstance(model, ModelMixin) or dtype == torch.float16
    kept = (keeps and getattr(model, "_keep_in_fp32_modules", None)) or ()
    for name, parameter in model.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    return sum(parameter.nbytes for parameter in model.parameters())


def quantized_bytes(model: nn.Module, config: QARVDConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of the model quantized by `config`, and of the largest weight that is dequantized in use."""
    modules = config.modules
    if not modules:
        linears = quantizable_linears(model, config)
        modules = describe(linears, input_groups(model, linears, config), config)
    total, largest = cast(model, dtype), 0
    for name, description in modules.items():
        layer = model.get_submodule(name)
        size = layer.weight.numel()
        stored = stored_tensors(layer.in_features, layer.out_features, description).values()
        total += sum(math.prod(shape) * kind.itemsize for shape, kind in stored) - layer.weight.nbytes
        expanded = dtype.itemsize if description.activation == "none" else int(description.weight_bits == 4)
        largest = max(largest, size * expanded)
    return total, largest


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors created since the start that are still in use; the peak is between operators."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {storage_id(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and storage_id(tensor) not in inputs:
                storage = tensor.untyped_storage()
                self._known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._known = {key: entry for key, entry in self._known.items() if not entry[0].expired()}
        self.now = sum(size for _, size in self._known.values())
        self.peak = max(self.peak, self.now)
        return out


def storage_id(tensor: torch.Tensor) -> int:
    """Return a number that tensors over the same memory share."""
    return tensor.untyped_storage()._cdata


class _AsOnAGPU(TorchFunctionMode):
    """Make meta tensors allocate as a GPU does: no attention scores, and channels-last convolutions stay
    channels-last.

    On the meta device torch would allocate all scores, and count copies that a GPU does not make.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        out = func(*args, **kwargs)
        layout = {F.conv2d: torch.channels_last, F.conv3d: torch.channels_last_3d}.get(func)
        if layout is None or not args[1].is_contiguous(memory_format=layout):
            return out
        _, channels, *sizes = out.shape
        strides = [channels * math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        return out.as_strided(out.shape, [channels * math.prod(sizes), 1, *strides])


@torch.no_grad()
def live_bytes(run: Callable[[], Any]) -> tuple[int, int]:
    """Return the peak bytes while `run` works on meta tensors, and the bytes still in use when it has ended."""
    with _LiveBytes() as live, _AsOnAGPU(), torch.device("meta"):
        kept = run()
        del kept
        torch.empty(0)  # one more dispatch, so that the mode counts live storages again
    return live.peak, live.now
