"""Choose the outlier channels of every layer over all blocks, from the weights or from observed inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config import QARVDConfig
from ..quantization.qparams import LinearQParams
from ..rollout.pass_info import PassInfo
from .capture import InputCapture
from .outliers import OutlierSet, find_outliers, min_noise_split
from .processes import Processes
from .targets import Targets, repeated_name

Extent = tuple[Tensor, Tensor]  # smallest and largest value of every channel, float32 `[K]`


def split_inputs(
    transformer: nn.Module,
    linears: Mapping[str, nn.Linear],
    groups: Sequence[Sequence[str]],
    config: QARVDConfig,
    extents: Sequence[Extent | None] | None = None,
    words: Collection[str] = (),
    whole: Collection[str] = (),
) -> list[OutlierSet]:
    """Find one outlier set per group of layers that read one tensor, from their stacked weights.

    With `Recipe.equal_counts` the same layer of every block gets the largest count of any block: blocks that differ in
    a number are compiled one by one, and torch gives up after eight.

    Args:
        transformer: float model.
        linears: its layers by name.
        groups: their partition.
        config: detector and alignment.
        extents: per group, for the detector `input`.
        words: layers that are split by their weights even then: a few prompts have few words, and do not represent
            others.
        whole: layers that are not split: their activations have a scale per token.

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
        if groups[index][0] in whole:
            return find_outliers(weights, "none")
        extent = None if extents is None or groups[index][0] in words else extents[index]
        if extent is not None:
            return min_noise_split(weights, *extent, config.outlier_alignment, at_least)
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
    return OutlierSet(layer.channel_order, layer.description.num_outliers, 0.0)


def input_extents(
    targets: Targets,
    groups: Sequence[tuple[str, ...]],
    run: Callable[[Callable[[PassInfo], None]], object],
    config: QARVDConfig,
    processes: Processes,
) -> list[Extent]:
    """Observe one set of rollouts: smallest and largest value of every channel of the input of some groups."""
    extents: list[Extent | None] = [None] * len(groups)

    def observe(index: int, x: Tensor, info: PassInfo) -> None:
        """Extend the extent of one group."""
        extents[index] = _joined(extents[index], x.detach().flatten(0, -2).to(torch.float32).aminmax(dim=0))

    with torch.no_grad(), InputCapture(targets.linears, groups, observe, not targets.observed) as capture:
        run(capture.on_pass)
    if capture.ran or processes.count == 1:  # of many processes some may have had no prompt
        capture.check(range(config.calibration_chunks))
    joined: list[Extent | None] = [None] * len(groups)
    for others in processes.gather([extent and (extent[0].cpu(), extent[1].cpu()) for extent in extents]):
        joined = [_joined(a, b) for a, b in zip(joined, others, strict=True)]
    return joined


def _joined(a: Extent | None, b: Extent | None) -> Extent | None:
    """Join two extents, either of which may be None."""
    if a is None or b is None:
        return a or b
    return torch.minimum(a[0], b[0]), torch.maximum(a[1], b[1])
