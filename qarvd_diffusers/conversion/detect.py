"""What a checkpoint is: which network, which weights, and which member of the family its name says it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.safetensors import TensorSpec
from ..hub.model_card import is_non_commercial, stated_licence
from .checkpoint import NESTINGS, Checkpoint, open_checkpoint
from .families import NETWORKS, PRESETS, Preset, available, find_preset
from .float8 import find_scales, without_scales
from .names import to_diffusers_keys

_LORA_FILES = ("lora.pt", "lora.safetensors")
_SHOWN_PARTS = 3  # of a path: a Hub repository, a folder, the file


@dataclass(frozen=True, eq=False)
class Detected:
    """What a checkpoint was found to be.

    Attributes:
        family: key of `PRESETS`.
        preset: its preset.
        network: key of `NETWORKS`, None for another size.
        checkpoint: the open checkpoint; which weights were chosen and which there are.
        specs: its tensors under diffusers names.
        lora: LoRA file that lies beside a base which needs one.
        licence: what the card beside the file states, else what is known of the release, else None.
        reasons: how the above was found out, in words.
    """

    family: str
    preset: Preset
    network: str | None
    checkpoint: Checkpoint
    specs: Mapping[str, TensorSpec]
    lora: Path | None
    licence: str | None
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "family": self.family,
            "network": self.network,
            "weights": self.checkpoint.weights or "flat",
            "found": list(self.checkpoint.found),
            "parameters": sum(_count(spec) for spec in self.specs.values()),
            "dtypes": sorted({str(spec.dtype).removeprefix("torch.") for spec in self.specs.values()}),
            "shards": len(self.checkpoint.shards),
            "lora": None if self.lora is None else str(self.lora),
            "licence": self.licence,
            "reasons": list(self.reasons),
        }


def detect_checkpoint(src: str | Path, family: str = "auto", weights: str | None = None) -> Detected:
    """Find out what an original checkpoint is; nothing but its headers is read.

    Args:
        src: file or folder of shards, see `open_checkpoint`.
        family: key of `PRESETS`, or `auto`: by the names of file and folders, among those of its size.
        weights: which nested state dict to take; None takes the one the family is meant to use.

    Raises:
        ValueError: the family cannot be told, cannot run here, or has another size than the file; says what was found.
    """
    src = Path(src)
    first = open_checkpoint(src, weights)
    specs = _diffusers_specs(first)
    network = network_of(specs)
    reasons = [f"network: {network or 'no released size'}, by its tensor shapes"]
    if family == "auto":
        family, why = _family_of(src, network)
        reasons.append(why)
    preset = find_preset(family)
    if network is not None and network != preset.network:
        raise ValueError(
            f"{src}: is a {network} network, the family {family!r} is {preset.network}. Families of this size: "
            f"{', '.join(_families(network)) or 'none that runs'}"
        )
    checkpoint = first
    if weights is None and {"generator", "generator_ema"} <= {name.partition(".")[0] for name in first.found}:
        checkpoint = open_checkpoint(src, None, (preset.weights, *NESTINGS))
        specs = _diffusers_specs(checkpoint)
        reasons.append(f"weights: {checkpoint.weights}, which {family} is meant to use")
    elif weights is None and len(first.found) > 1:
        reasons.append(f"weights: {first.weights or 'flat'}, of {', '.join(first.found)}; name others with weights=")
    reasons += checkpoint.reasons
    if scaled := len(checkpoint.specs) - len(specs):
        reasons.append(f"8-bit weights with scales ({scaled} tensors of these): they are multiplied out in float32")
    beside = src if src.is_dir() else src.parent
    lora = next((beside / name for name in _LORA_FILES if (beside / name).is_file()), None)
    # The card lies beside the file, or in the root of its repository.
    licence = stated_licence(beside) or stated_licence(beside.parent) or preset.licence
    reasons.append(f"licence: {licence or 'not known'}{' (non-commercial)' if is_non_commercial(licence) else ''}")
    lora = lora if preset.has_lora else None
    return Detected(family, preset, network, checkpoint, specs, lora, licence, tuple(reasons))


def _diffusers_specs(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    try:
        specs = to_diffusers_keys(checkpoint.specs)
        find_scales(specs)
        return without_scales(specs)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None


def network_of(specs: Mapping[str, TensorSpec]) -> str | None:
    """Key of `NETWORKS` for the tensors of a transformer under diffusers names, None for another size."""
    patch, blocks = (
        specs.get("patch_embedding.weight"),
        {key.split(".")[1] for key in specs if key.startswith("blocks.")},
    )
    if patch is None:
        return None
    size = (patch.shape[0], len(blocks), patch.shape[1])
    return next((name for name, n in NETWORKS.items() if (n.dim, n.num_layers, n.in_channels) == size), None)


def _family_of(src: Path, network: str | None) -> tuple[str, str]:
    path = "/".join(src.absolute().parts[-_SHOWN_PARTS:]).lower()
    # The last part of the path says most, and there the longest name.
    matches = [
        (path.rfind(text) + len(text), len(text), family, text)
        for family, preset in PRESETS.items()
        for text in preset.file_names
        if text in path and network in (None, preset.network)
    ]
    if matches:
        _, _, family, text = max(matches)
        return family, f"family: {family}, by {text!r} in its path"
    raise ValueError(
        f"{src}: the family cannot be told, since all members have the same tensors (as do models that are not causal), and "
        f"neither file nor folder is named like one. Found: {network or 'a size that was not released'}. Pass the family: "
        f"{', '.join(_families(network) or available())}"
    )


def _families(network: str | None) -> list[str]:
    return [name for name in available() if PRESETS[name].network == network]


def _count(spec: TensorSpec) -> int:
    return spec.nbytes // spec.dtype.itemsize
