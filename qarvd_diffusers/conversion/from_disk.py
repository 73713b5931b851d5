"""Quantize a model folder that does not fit into memory: layer by layer from its shards, one block at a time."""

from __future__ import annotations

import dataclasses
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin, WanTransformer3DModel
from torch import nn

from ..calibration.blocks import block_name
from ..calibration.calibrate import Progress
from ..calibration.splits import split_inputs
from ..calibration.targets import describe, input_groups, quantizable_linears, rotations_of
from ..calibration.weights import quantize_weight
from ..config import QARVDConfig
from ..files.atomic import atomic_directory
from ..files.safetensors import TensorSpec, write_shards
from ..files.schema import read_json
from ..hub.model_card import CARD_FILE, model_card, stated_licence
from ..models import CausalWanTransformer3DModel
from ..models.world import WorldWanTransformer3DModel, transformer_class
from ..quantization.packing import pack
from ..quantization.qparams import LinearQParams, stored_tensors
from .checkpoint import STEM, folder_tensors
from .float8 import is_float8
from .network import load_transformer_config

_WAN = tuple(
    kind.__name__ for kind in (WanTransformer3DModel, CausalWanTransformer3DModel, WorldWanTransformer3DModel)
)


def quantize_folder(
    src: str | Path, out_dir: str | Path, config: QARVDConfig, progress: Progress | None = None
) -> dict[str, int]:
    """Quantize the transformer of a diffusers folder, with a scheme that needs no data, without loading it.

    The result is bit-identical to that of `from_pretrained(src, quantization_config=config)`. One block is in memory
    at a time, and every block becomes a shard.

    Args:
        src: diffusers folder of a float model, with a transformer of any diffusers class.
        out_dir: folder to create; must not exist yet. It appears only when complete.
        config: a scheme without calibration, rounded to nearest.
        progress: called for every layer.

    Returns:
        Sizes in bytes, as `stored_bytes` of the quantized model.

    Raises:
        ValueError: if the scheme needs calibration, the folder is quantized or incomplete, or a weight is not finite.
        FileExistsError: if `out_dir` exists.
    """
    src, out_dir = Path(src), Path(out_dir)
    if config.needs_calibration:
        raise ValueError(
            f"scheme {config.scheme} with rounding {config.resolved_rounding!r} has to run the model and cannot work "
            "from disk: use w8a8_dynamic, w8a16 or w4a16 with rounding='nearest', or load the pipeline and call "
            "quantize"
        )
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists; give a new folder or remove it first")
    path = src / "transformer" / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: expected a diffusers folder with a transformer")
    model = _empty_model(path)
    specs, fetch = _without_float8(*folder_tensors(path.parent))
    missing = sorted(model.state_dict().keys() - specs.keys())
    if missing:
        raise ValueError(f"{path.parent} lacks {len(missing)} tensors (first: {missing[0]}): a shard is missing")
    work = _FromDisk(model, specs, fetch, config, progress)
    final = config.for_checkpoint(work.descriptions)
    with atomic_directory(out_dir) as folder:
        shutil.copytree(src, folder, dirs_exist_ok=True, ignore=_transformer_weights)
        write_shards(folder / "transformer", STEM, work.shards(), work)
        model.register_to_config(quantization_config=final)
        model.save_config(folder / "transformer")
        licence, pipeline = stated_licence(src), _pipeline_of(src, model)
        card = model_card(final, work.sizes(), None, final.base_model, licence, pipeline=pipeline)
        (folder / CARD_FILE).write_text(str(card), encoding="utf-8")
    return work.sizes()


def _without_float8(
    specs: Mapping[str, TensorSpec], fetch: Callable[[str], torch.Tensor]
) -> tuple[dict[str, TensorSpec], Callable[[str], torch.Tensor]]:
    """Read 8-bit floats as bfloat16, which represents all of them; torch does not compute with 8-bit floats."""

    def wide(dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if is_float8(dtype) else dtype

    widened = {name: TensorSpec(spec.shape, wide(spec.dtype)) for name, spec in specs.items()}
    return widened, lambda name: fetch(name).to(widened[name].dtype)


def _empty_model(path: Path) -> ModelMixin:
    """Build the transformer that a `config.json` describes, on the meta device."""
    values = read_json(path)
    if values.get("quantization_config") is not None:
        raise ValueError(f"{path.parent.parent} is quantized already: quantize the float model")
    name = values.get("_class_name", WanTransformer3DModel.__name__)
    kind = transformer_class(values) if name in _WAN else getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise ValueError(
            f"{path} describes a {name}, which is not a model class of diffusers: load it by its own class with "
            "quantization_config, and call save_pretrained"
        )
    with init_empty_weights():
        return kind.from_config(load_transformer_config(path) if name in _WAN else values)


def _pipeline_of(src: Path, model: ModelMixin) -> str:
    """Return the dotted name of the class that loads the quantized folder."""
    if isinstance(model, WanTransformer3DModel):
        return "qarvd_diffusers.ARVDPipeline"
    index = src / "model_index.json"
    values = read_json(index) if index.is_file() else {}
    return f"diffusers.{values.get('_class_name', DiffusionPipeline.__name__)}"


def _transformer_weights(folder: str, names: Sequence[str]) -> set[str]:
    excluded = {name for name in names if name.startswith(STEM) or name == "config.json"}
    return excluded if Path(folder).name == "transformer" else set()


class _Linears(Mapping[str, nn.Linear]):
    """Map names to Linears whose weights are on disk; each is read on access and not kept."""

    def __init__(self, empty: Mapping[str, nn.Linear], fetch: Callable[[str], torch.Tensor]) -> None:
        self._empty, self._fetch = empty, fetch

    def __getitem__(self, name: str) -> nn.Linear:
        linear = nn.Linear(*reversed(self._empty[name].weight.shape), bias=False, device="meta")
        linear.weight = nn.Parameter(self._fetch(f"{name}.weight"), requires_grad=False)
        return linear

    def __iter__(self) -> Iterator[str]:
        return iter(self._empty)

    def __len__(self) -> int:
        return len(self._empty)


class _FromDisk:
    """Compute tensors of the quantized model by name, block by block as they are accessed."""

    def __init__(
        self,
        model: nn.Module,
        specs: Mapping[str, TensorSpec],
        fetch: Callable[[str], torch.Tensor],
        config: QARVDConfig,
        progress: Progress | None,
    ) -> None:
        self._specs, self._fetch, self._config, self._progress = specs, fetch, config, progress
        empty = quantizable_linears(model, config)
        self._linears = _Linears(empty, fetch)
        groups = input_groups(model, empty, config)
        described = describe(empty, groups, config)
        splits = split_inputs(model, self._linears, groups, config, rotations=rotations_of(described))
        self._outliers = {name: split for group, split in zip(groups, splits, strict=True) for name in group}
        self.descriptions = {
            name: dataclasses.replace(described[name], num_outliers=self._outliers[name].num_outliers)
            for name in empty
        }
        self._sizes = {name: (linear.in_features, linear.out_features) for name, linear in empty.items()}
        self._quantized: dict[str, torch.Tensor] = {}
        self._done = 0

    def shards(self) -> list[dict[str, TensorSpec]]:
        """Return the specs of the tensors of every block, and of those outside the blocks."""
        shards: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
        for key, spec in self._specs.items():
            module, _, leaf = key.rpartition(".")
            if module not in self.descriptions or leaf != "weight":
                shards[block_name(key)][key] = spec
        for name, description in self.descriptions.items():
            stored = stored_tensors(*self._sizes[name], description)
            shards[block_name(name)] |= {f"{name}.{leaf}": TensorSpec(*spec) for leaf, spec in stored.items()}
        return list(shards.values())

    def __call__(self, key: str) -> torch.Tensor:
        module, _, leaf = key.rpartition(".")
        if module not in self.descriptions or leaf == "bias":
            return self._fetch(key)
        if key not in self._quantized:
            self._quantized = self._quantize(block_name(module))
        return self._quantized.pop(key)

    def _quantize(self, block: str) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for name, description in self.descriptions.items():
            if block_name(name) != block:
                continue
            outliers = self._outliers[name]
            weight = self._linears[name].weight
            codes, grid = quantize_weight(weight, outliers, self._config, name, description.group)
            parts = (pack(codes, grid.bits), grid.scale, grid.stored_zero_point, outliers.channel_order)
            layer = LinearQParams(*parts, None, None, description, outliers.channel_scale)
            tensors |= {f"{name}.{k}": v for k, v in layer.tensors().items()}
            self._done += 1
            if self._progress is not None:
                self._progress("quantizing weights", self._done, len(self.descriptions))
        return tensors

    def sizes(self) -> dict[str, int]:
        """Return what `stored_bytes` returns for the quantized model."""
        shards = self.shards()
        stored = {key: spec for shard in shards for key, spec in shard.items()}
        quantized = sum(spec.nbytes for key, spec in stored.items() if key.rpartition(".")[0] in self.descriptions)
        return {
            "quantized": quantized,
            "bfloat16": sum(
                2 * (k * n + (n if f"{name}.bias" in stored else 0)) for name, (k, n) in self._sizes.items()
            ),
            "total": sum(spec.nbytes for spec in stored.values()),
        }
