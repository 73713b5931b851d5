"""Detect what a checkpoint is: its network, its weights, and its family by the names of file and folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.safetensors import TensorSpec
from ..hub.model_card import is_non_commercial, stated_licence
from .checkpoint import NESTINGS, Checkpoint, open_checkpoint
from .families import FAMILIES, NETWORKS, Family, available, find_family
from .float8 import find_scales, without_scales
from .names import to_diffusers_keys
from .network import has_controls

_LORA_FILES = ("lora.pt", "lora.safetensors")
_SHOWN_PARTS = 3  # of a path: a Hub repository, a folder, the file


@dataclass(frozen=True, eq=False)
class Detected:
    """Describe a checkpoint.

    Attributes:
        family: key of `FAMILIES`.
        release: the family's description.
        network: key of `NETWORKS`, None for another size.
        checkpoint: the open checkpoint, with the chosen and the available weights.
        specs: shapes and dtypes of its tensors under diffusers names.
        lora: LoRA file next to a base that needs one, else None.
        licence: licence stated by the card next to the file, else the known licence of the release, else None.
        reasons: sentences that say how the above was determined.
    """

    family: str
    release: Family
    network: str | None
    checkpoint: Checkpoint
    specs: Mapping[str, TensorSpec]
    lora: Path | None
    licence: str | None
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain JSON types."""
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
    """Detect what an original checkpoint is; only headers are read.

    Args:
        src: file or folder of shards, see `open_checkpoint`.
        family: key of `FAMILIES`, or `auto`: by the names of file and folders, among the families of its size.
        weights: nested state dict to use; None takes the family's `weights`.

    Raises:
        ValueError: if the family cannot be determined, cannot run, or has another size than the file.
    """
    src = Path(src)
    first = open_checkpoint(src, weights)
    specs = _diffusers_specs(first)
    network = network_of(specs)
    reasons = [f"network: {network or 'no released size'}, by its tensor shapes"]
    if family == "auto":
        family, why = _family_of(src, network)
        reasons.append(why)
    release = find_family(family)
    _check_size(src, network, family, has_controls(specs))
    checkpoint = first
    if weights is None and {"generator", "generator_ema"} <= {name.partition(".")[0] for name in first.found}:
        checkpoint = open_checkpoint(src, None, (release.weights, *NESTINGS))
        specs = _diffusers_specs(checkpoint)
        reasons.append(f"weights: {checkpoint.weights}, the weights that {family} uses")
    elif weights is None and len(first.found) > 1:
        reasons.append(f"weights: {first.weights or 'flat'}, of {', '.join(first.found)}; select others with weights=")
    reasons += checkpoint.reasons
    if scaled := len(checkpoint.specs) - len(specs):
        reasons.append(f"8-bit weights with scales ({scaled} tensors): multiplied in float32")
    folder = src if src.is_dir() else src.parent
    # The card is next to the file, or in the root of its repository.
    licence = stated_licence(folder) or stated_licence(folder.parent) or release.licence
    reasons.append(f"licence: {licence or 'not known'}{' (non-commercial)' if is_non_commercial(licence) else ''}")
    lora = _lora_in(folder) if release.has_lora else None
    return Detected(family, release, network, checkpoint, specs, lora, licence, tuple(reasons))


def _check_size(src: Path, network: str | None, family: str, controls: bool) -> None:
    """Raise ValueError if a family has another size than the file, or only one of them has controls."""
    expected = FAMILIES[family].network
    if controls != NETWORKS[expected].controls:
        has, expects = ("layers", "none") if controls else ("no layers", "some")
        raise ValueError(f"{src} has {has} for controls, the family {family!r} has {expects}: pass another family")
    if network not in (None, expected):
        raise ValueError(
            f"{src} is a {network} network, the family {family!r} is {expected}. Families of this size: "
            f"{', '.join(_families(network)) or 'none that can run'}"
        )


def _lora_in(folder: Path) -> Path | None:
    """Return the LoRA file of a release in a folder, None if there is none."""
    return next((folder / name for name in _LORA_FILES if (folder / name).is_file()), None)


def _diffusers_specs(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """Return the specs of a checkpoint's parameters under diffusers names, without scales of 8-bit weights."""
    try:
        specs = to_diffusers_keys(checkpoint.specs)
        find_scales(specs)
        return without_scales(specs)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None


def network_of(specs: Mapping[str, TensorSpec]) -> str | None:
    """Return the key of `NETWORKS` for tensors under diffusers names, None for another size."""
    patch = specs.get("patch_embedding.weight")
    blocks = {key.split(".")[1] for key in specs if key.startswith("blocks.")}
    if patch is None:
        return None
    size = (patch.shape[0], len(blocks), patch.shape[1], has_controls(specs))
    sizes = {name: (n.dim, n.num_layers, n.in_channels, n.controls) for name, n in NETWORKS.items()}
    return next((name for name, released in sizes.items() if released == size), None)


def _family_of(src: Path, network: str | None) -> tuple[str, str]:
    """Return the family by the names of file and folders, and a sentence that says why."""
    path = "/".join(src.absolute().parts[-_SHOWN_PARTS:]).lower()
    # A match nearest to the end of the path is the most specific; among those the longest.
    matches = [
        (path.rfind(text) + len(text), len(text), family, text)
        for family, release in FAMILIES.items()
        for text in release.file_names
        if text in path and network in (None, release.network)
    ]
    if matches:
        _, _, family, text = max(matches, key=lambda match: match[:2])  # of equals the first of the table
        return family, f"family: {family}, by {text!r} in its path"
    raise ValueError(
        f"{src}: the family cannot be determined: all families, and bidirectional models, have the same tensors, and "
        f"neither file nor folder has a known name. Found: {network or 'a size that was not released'}. Pass the "
        f"family: {', '.join(_families(network) or available())}"
    )


def _families(network: str | None) -> list[str]:
    return [name for name in available() if FAMILIES[name].network == network]


def _count(spec: TensorSpec) -> int:
    return spec.nbytes // spec.dtype.itemsize
