"""Report what a quantization did to a transformer, as a value, one line and a JSON file: `Report`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..config import QARVDConfig, QuantizedModule
from ..files.atomic import write_json
from ..quantization.as_linear import weight_key
from ..quantization.result import CalibrationResult
from .targets import PUBLISHED_FAMILY, Targets, is_published_family, repeated_blocks

FORMAT = "qarvd-report-1"
NOT_A_LINEAR, NOT_RUN = "not a Linear", "not run"


@dataclass(frozen=True)
class Report:
    """Tell what was quantized, what stayed float and why.

    Attributes:
        model: class of the transformer.
        scheme: name of the scheme.
        layers: every quantized layer.
        ties: layers that read one tensor, and share outlier channels and quantizer.
        kept: modules with parameters that stayed float -> the reason.
        parameters: numbers of parameters: `total`, `quantized`, and `in_blocks`, `quantized_in_blocks` of the repeated
            blocks.
        bytes: `before` and `after` quantization.
        chunk_weights: weight of every chunk in calibration, and `why` these; None for data-free schemes.
    """

    model: str
    scheme: str
    layers: Mapping[str, QuantizedModule]
    ties: tuple[tuple[str, ...], ...]
    kept: Mapping[str, str]
    parameters: Mapping[str, int]
    bytes: Mapping[str, int]
    chunk_weights: Mapping[str, Any] | None

    @property
    def share(self) -> float:
        """Share of all parameters that is quantized."""
        return self.parameters["quantized"] / self.parameters["total"]

    @property
    def share_of_blocks(self) -> float:
        """Share of the parameters in repeated blocks that is quantized."""
        return self.parameters["quantized_in_blocks"] / max(1, self.parameters["in_blocks"])

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(self.kept.values()).most_common())
        weights = f"; chunk weights {self.chunk_weights['why']}" if self.chunk_weights else ""
        return (
            f"{self.model} quantized to {self.scheme}: {len(self.layers)} layers, {len(self.ties)} tied groups, "
            f"{self.share:.1%} of the parameters ({self.share_of_blocks:.1%} in blocks), {self.bytes['before']:,} -> "
            f"{self.bytes['after']:,} bytes; float: {reasons or 'nothing'}{weights}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values; shares are for readers and follow from the numbers."""
        return {"format": FORMAT, **asdict(self), "share": self.share, "share_of_blocks": self.share_of_blocks}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one JSON file, or `report.json` in a folder; see `write_json`."""
        return write_json(self.to_dict(), Path(path, "report.json") if Path(path).is_dir() else path)


def with_chunk_weights(transformer: nn.Module, config: QARVDConfig) -> tuple[QARVDConfig, str]:
    """Replace published chunk weights by uniform ones for a family that they were not measured on.

    Returns:
        The config, and which weights it has and why.
    """
    if config.chunk_weights == "uniform":
        return config, "uniform: as configured"
    if not isinstance(config.chunk_weights, str):
        return config, "measured: as configured"
    if is_published_family(transformer):
        return config, f"published: measured on the family of {PUBLISHED_FAMILY}"
    return config.replace(chunk_weights="uniform"), "uniform: the published ones are of another family"


def make_report(
    transformer: nn.Module, targets: Targets, result: CalibrationResult, config: QARVDConfig, why: str = ""
) -> Report:
    """Describe a result before it is put into its float transformer.

    Args:
        transformer: float model.
        targets: what was selected.
        result: what calibration decided.
        config: what it was made with.
        why: why the config has its chunk weights; empty for data-free schemes.
    """
    lists = repeated_blocks(transformer)
    sizes = {name.replace(".base_layer.", "."): tensor for name, tensor in transformer.named_parameters()}
    weights = {weight_key(name, targets.linears[name]) for name in result.layers}
    done = weights | {f"{name}.bias" for name in result.layers} & sizes.keys()
    others = {name.rpartition(".")[0] or name for name in sizes.keys() - done}
    kept = {name: targets.kept.get(name, NOT_A_LINEAR) for name in sorted(others)}
    kept |= dict.fromkeys(targets.linears.keys() - result.layers.keys(), NOT_RUN)
    total = sum(tensor.nbytes for tensor in sizes.values())
    stored = sum(tensor.nbytes for layer in result.layers.values() for tensor in layer.tensors().values())
    return Report(
        model=type(transformer).__name__,
        scheme=config.scheme,
        layers=result.modules(),
        ties=tuple(names for names in targets.groups if len(names) > 1),
        kept=kept,
        parameters={
            "total": _count(sizes, sizes),
            "quantized": _count(sizes, done),
            "in_blocks": _count(sizes, [name for name in sizes if name.startswith(lists)]),
            "quantized_in_blocks": _count(sizes, [name for name in done if name.startswith(lists)]),
        },
        bytes={"before": total, "after": total - sum(sizes[name].nbytes for name in weights) + stored},
        chunk_weights=_weights(config, why),
    )


def _weights(config: QARVDConfig, why: str) -> dict[str, Any] | None:
    if not config.needs_calibration:
        return None
    return {"weights": config.sensitivity(config.calibration_chunks), "why": why}


def _count(sizes: Mapping[str, Any], names: Any) -> int:
    return sum(sizes[name].numel() for name in names)
