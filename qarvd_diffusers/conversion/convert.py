"""Convert original checkpoints of causal Wan models to diffusers folders, exactly and in bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..files.atomic import atomic_directory
from ..files.safetensors import DOWNLOAD, TensorSpec, check_finite, read_metadata, write_shards
from ..hub.model_card import converted_card
from ..models import CausalWanTransformer3DModel
from .checkpoint import LORA_NESTINGS, STEM, Checkpoint, open_checkpoint
from .detect import Detected, detect_checkpoint
from .float8 import check_formats, find_scales, is_float8, scaled, without_scales
from .folder import PORTABLE_CLASSES, base_config, copy_base_components, write_pipeline
from .lora import LoraLayer, check_fit, merge_lora, read_lora
from .names import to_diffusers_keys
from .network import control_config, empty_transformer, infer_config

logger = logging.getLogger(__name__)

SHARD_BYTES = 10_000_000_000  # what diffusers writes into one file


def convert_checkpoint(
    src: str | Path,
    out_dir: str | Path,
    family: str = "self-forcing",
    *,
    base: str | Path | None = None,
    weights: str | None = None,
    lora: str | Path | None = None,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write an original checkpoint as a diffusers folder in the portable layout (stock class names only).

    Everything is checked before the first byte is written. Tensors are then copied one by one from the mapped file,
    which takes the memory of the largest tensor.

    Args:
        src: original checkpoint, a file or a folder of shards; see `open_checkpoint`.
        out_dir: folder to create; must not exist yet. It appears only when complete.
        family: key of `FAMILIES`, which decides how the model rolls out, or `auto`: by the file's size and name.
        base: local diffusers folder of the bidirectional model, which provides VAE, text encoder, tokenizer and the
            transformer's config; None writes only transformer and scheduler.
        weights: nested state dict to use; None takes the family's `weights`.
        lora: LoRA file to merge, in any layout that `read_lora` supports; None merges `lora.pt` next to the checkpoint
            if the family's release consists of both, `"none"` merges nothing.
        num_attention_heads: see `infer_config`; not needed with `base`.
        dtype: cast the weights, except those that the model keeps in float32; None keeps the stored dtypes, except
            that 8-bit weights with scales or a merged LoRA become bfloat16.

    Returns:
        `out_dir`.

    Raises:
        ValueError: for an unknown family or one that cannot run, a checkpoint or LoRA that does not fit, or a base
            folder without a required component.
        FileExistsError: if `out_dir` exists.
    """
    out_dir = Path(out_dir)
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists; give a new folder or remove it first")
    found = detect_checkpoint(src, family, weights)
    try:
        config = base_config(base) if base is not None else infer_config(found.specs, num_attention_heads)
        config |= control_config(found.specs)
        model = empty_transformer(found.specs, config)
    except ValueError as error:
        raise ValueError(f"{src}: {error}") from None
    tensors = _Tensors(found.checkpoint, _read_adapters(found, lora), dtype)
    for reason in found.reasons:
        logger.info("%s: %s", src, reason)
    with atomic_directory(out_dir) as folder:
        components = {**copy_base_components(base, folder), "transformer": PORTABLE_CLASSES[type(model).__name__]}
        write_pipeline(folder, found.release.pipeline_config(), components)
        model.save_config(folder / "transformer")
        _write_transformer(folder / "transformer", found.checkpoint, tensors)
        card = converted_card(found.family, found.release.source, found.licence)
        (folder / "README.md").write_text(str(card), encoding="utf-8")
    return out_dir


def _read_adapters(found: Detected, lora: str | Path | None) -> dict[str, LoraLayer]:
    """Read the LoRA to merge and check it against the checkpoint; return an empty dict if there is none."""
    if lora == "none":
        return {}
    path = lora or found.lora
    if path is None:
        if found.release.has_lora:
            raise ValueError(
                f"{found.family} is released as a base and a LoRA ({found.release.source}): pass the LoRA file with "
                "lora=, put it next to the checkpoint as lora.pt, or pass lora='none' to convert only the base"
            )
        return {}
    weights = (found.checkpoint.weights or "generator").partition(".")[0]
    file = open_checkpoint(path, None, (f"{weights}_lora", *LORA_NESTINGS))
    for reason in file.reasons:
        logger.warning("%s: %s", path, reason)
    chosen = (file.weights or "").partition(".")[0]
    if chosen.startswith("generator") and chosen != f"{weights}_lora":
        raise ValueError(
            f"{path}: holds {list(file.found)}, the checkpoint's weights are {weights!r}: averaged (EMA) and plain "
            "weights must not be mixed; select the others with weights="
        )
    tensors = {key: tensor for shard in file.shards for key, tensor in shard.load().items()}
    adapters = read_lora(tensors, str(path))
    sizes = {key.removesuffix(".weight"): spec.shape for key, spec in found.specs.items()}
    check_fit(adapters, sizes, str(path))
    return adapters


class _Tensors:
    """Read a checkpoint's tensors under diffusers names, one shard at a time: multiply scales, merge adapters, cast.

    Arithmetic is in float32, rounded once.
    """

    def __init__(self, checkpoint: Checkpoint, adapters: Mapping[str, LoraLayer], dtype: torch.dtype | None) -> None:
        self._adapters, self._dtype = adapters, dtype
        self._shards = {key: shard for shard in checkpoint.shards for key in to_diffusers_keys(shard.specs)}
        names = find_scales(to_diffusers_keys(checkpoint.specs))
        for name, spec in without_scales(to_diffusers_keys(checkpoint.specs)).items():
            if not spec.dtype.is_floating_point and name not in names:
                raise ValueError(f"{checkpoint.path}: {name} is {spec}, expected floats: {DOWNLOAD}")
        self._scales: dict[str, torch.Tensor] = {}
        for shard in checkpoint.shards if names else ():  # small, and not always in the same shard as their weights
            tensors = to_diffusers_keys(shard.load())
            notes = {name: tensor for name, tensor in tensors.items() if name.endswith(".comfy_quant")}
            header = read_metadata(shard.path) if shard.path.suffix == ".safetensors" else {}
            check_formats(str(shard.path), notes, header)
            self._scales |= {weight: tensors[name].clone() for weight, name in names.items() if name in tensors}
        self._open, self._tensors = None, {}

    def spec(self, name: str, stored: TensorSpec) -> TensorSpec:
        """Return shape and dtype in the folder; 8-bit dtypes remain only where nothing is computed."""
        kept = any(part in CausalWanTransformer3DModel._keep_in_fp32_modules for part in name.split("."))
        narrow = name in self._scales or is_float8(stored.dtype)
        if self._dtype is None:
            changed = name in self._scales or (narrow and self._adapter(name) is not None)
            dtype = (torch.float32 if kept else torch.bfloat16) if changed else stored.dtype
        else:
            dtype = self._dtype if not kept else torch.float32 if narrow else stored.dtype
        return TensorSpec(stored.shape, dtype)

    def _adapter(self, name: str) -> LoraLayer | None:
        return self._adapters.get(name) or self._adapters.get(name.rpartition(".")[0])

    def __call__(self, name: str) -> torch.Tensor:
        if (shard := self._shards[name]) is not self._open:
            self._tensors.clear()  # frees the mapping of the previous shard
            self._open, self._tensors = shard, to_diffusers_keys(shard.load())
        tensor = self._tensors[name]
        if tensor.is_floating_point():
            check_finite(tensor, f"{shard.path}: {name}")
        dtype = self.spec(name, TensorSpec.of(tensor)).dtype
        if name in self._scales:
            tensor = scaled(tensor, self._scales[name])
        if (adapter := self._adapter(name)) is not None:
            if name.endswith(".bias"):
                tensor = tensor if adapter.bias is None else tensor.float() + adapter.bias.float()
            else:
                tensor, _ = merge_lora(tensor.float(), None, replace(adapter, bias=None))
        return tensor.to(dtype)


def _write_transformer(folder: Path, checkpoint: Checkpoint, tensors: _Tensors) -> None:
    """Write the weights as shards of at most `SHARD_BYTES`."""
    parameters = without_scales(to_diffusers_keys(checkpoint.specs))
    stored = [
        {name: parameters[name] for name in to_diffusers_keys(shard.specs) if name in parameters}
        for shard in checkpoint.shards
    ]
    if sum(spec.nbytes for shard in stored for spec in shard.values()) <= SHARD_BYTES:
        stored = [{name: spec for shard in stored for name, spec in shard.items()}]
    groups: list[dict[str, TensorSpec]] = []
    for shard in stored:  # a group never spans two shards, so each is opened once
        size = SHARD_BYTES + 1
        for name, spec in shard.items():
            spec = tensors.spec(name, spec)
            if size + spec.nbytes > SHARD_BYTES:
                groups.append({})
                size = 0
            groups[-1][name] = spec
            size += spec.nbytes
    write_shards(folder, STEM, groups, tensors)
