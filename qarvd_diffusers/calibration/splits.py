"""Choose the outlier channels of every layer over all blocks, from the weights or from observed inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import QARVDConfig
from ..quantization.qparams import LinearQParams
from ..rollout.pass_info import PassInfo
from .capture import InputCapture
from .outliers import OutlierSet, balanced, find_outliers, min_noise_split
from .processes import Processes
from .targets import Targets, repeated_name


class Extent(NamedTuple):
    """Describe the channels of an input, float32 `[K]` each.

    Attributes:
        low: smallest values.
        high: largest values.
        magnitude: largest root mean square of any pass.
    """

    low: Tensor
    high: Tensor
    magnitude: Tensor


def split_inputs(
    transformer: nn.Module,
    linears: Mapping[str, nn.Linear],
    groups: Sequence[Sequence[str]],
    config: QARVDConfig,
    extents: Sequence[Extent | None] | None = None,
    words: Collection[str] = (),
    rotations: Mapping[str, int] = MappingProxyType({}),
) -> list[OutlierSet]:
    """Find one outlier set per group of layers that read one tensor, from their stacked weights.

    With `Recipe.equal_counts` the same layer of every block gets the largest count of any block: blocks that differ in
    a number are compiled one by one, and torch gives up after eight.

    Args:
        transformer: float model.
        linears: its layers by name.
        groups: their partition.
        config: detector and alignment.
        extents: per group, for the detector `input` and for layers with a scale per token.
        words: layers that are split by their weights even then: a few prompts have few words, and do not represent
            others.
        rotations: layers that are not split, since their activations have a scale per token -> channels of a block.

    Raises:
        ValueError: a weight is on the meta device or not finite; the message names the layer.
    """
    for name, linear in linears.items():
        if linear.weight.is_meta:
            raise ValueError(
                f"the weight of {name} is on the meta device: remove offloading hooks, quantize, offload again"
            )
        # torch has no isfinite for 8-bit floats.
        weight = linear.weight.float() if linear.weight.dtype.itemsize == 1 else linear.weight
        if not bool(weight.isfinite().all()):
            raise ValueError(f"the weight of {name} holds NaN or infinity: the checkpoint is damaged")

    def find(index: int, at_least: int = 0) -> OutlierSet:
        """Find the outliers of one group."""
        weights, detector = [linears[name].weight for name in groups[index]], _detector(groups[index][0], config)
        extent = None if extents is None or groups[index][0] in words else extents[index]
        if groups[index][0] in rotations:
            return balanced(weights, None if extent is None else extent.magnitude, rotations[groups[index][0]])
        if extent is not None and config.recipe.detector == "input":
            return min_noise_split(weights, extent.low, extent.high, config.outlier_alignment, at_least)
        return find_outliers(weights, detector, config.outlier_alignment, config.recipe, at_least)

    splits = [find(index) for index in range(len(groups))]
    if not config.recipe.equal_counts:
        return splits
    largest: dict[str, int] = defaultdict(int)
    for group, outliers in zip(groups, splits, strict=True):
        largest[repeated_name(group[0])] = max(largest[repeated_name(group[0])], outliers.num_outliers)
    counts = [largest[repeated_name(group[0])] for group in groups]
    return [
        outliers if outliers.num_outliers == count else find(index, count)
        for index, (outliers, count) in enumerate(zip(splits, counts, strict=True))
    ]


def _detector(name: str, config: QARVDConfig) -> str:
    """Name the detector that looks at the weights of a layer."""
    in_block = any(part.isdigit() for part in name.split("."))
    if not in_block and not config.recipe.outliers_outside_blocks:
        return "none"
    return "mad_zscore" if config.recipe.detector == "input" else config.recipe.detector


def stored_split(layer: LinearQParams) -> OutlierSet:
    """Return the outlier set that a layer was quantized with."""
    module = layer.description
    return OutlierSet(layer.channel_order, module.num_outliers, 0.0, layer.channel_scale, module.rotation)


def input_extents(
    targets: Targets,
    run: Callable[[Callable[[PassInfo], None]], object],
    config: QARVDConfig,
    processes: Processes,
) -> list[Extent]:
    """Observe one set of rollouts: every channel of the input of measured groups."""
    groups = targets.measured
    extents: list[Extent | None] = [None] * len(groups)

    def observe(index: int, x: Tensor, info: PassInfo) -> None:
        """Extend the extent of one group."""
        rows = x.detach().flatten(0, -2).to(torch.float32)
        extents[index] = _joined(extents[index], Extent(*rows.aminmax(dim=0), rows.square().mean(0).sqrt()))

    with torch.no_grad(), InputCapture(targets.linears, groups, observe, not targets.observed) as capture:
        run(capture.on_pass)
    if capture.ran or processes.count == 1:  # of many processes some may have had no prompt
        capture.check(range(config.calibration_chunks))
    joined: list[Extent | None] = [None] * len(groups)
    for others in processes.gather([extent and Extent(*(value.cpu() for value in extent)) for extent in extents]):
        joined = [_joined(a, b) for a, b in zip(joined, others, strict=True)]
    return joined


def _joined(a: Extent | None, b: Extent | None) -> Extent | None:
    """Join two extents, either of which may be None."""
    if a is None or b is None:
        return a or b
    return Extent(torch.minimum(a.low, b.low), torch.maximum(a.high, b.high), torch.maximum(a.magnitude, b.magnitude))
