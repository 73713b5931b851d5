"""Which input channels of every layer are outliers: from weights, or from what was seen of the inputs, over all blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config import QARVDConfig
from ..quantization.qparams import LinearQParams
from ..rollout.pass_info import PassInfo
from .capture import InputCapture
from .outliers import OutlierSet, find_outliers, quietest_split
from .processes import Processes
from .targets import repeated_name, word_linears

Extent = tuple[Tensor, Tensor]  # smallest and largest value of every channel, float32 `[K]`


def split_inputs(
    transformer: nn.Module,
    linears: Mapping[str, nn.Linear],
    groups: Sequence[Sequence[str]],
    config: QARVDConfig,
    extents: Sequence[Extent] | None = None,
) -> list[OutlierSet]:
    """One outlier set per group of layers that read one tensor, from their stacked weights.

    The same layer of every block gets the largest count of any block, except under `reference_compat`: blocks that differ
    in a number are compiled one by one, and torch gives up after eight.

    Args:
        transformer: float model.
        linears: its layers by name.
        groups: their partition.
        config: detector and alignment.
        extents: per group, for the detector `input`. Layers whose input is made of the prompt's words (`word_linears`) are
            split by their weights all the same: a few prompts hold few words, and say little of what others will bring.

    Raises:
        ValueError: a weight is on the meta device or not finite; named.
    """
    for name, linear in linears.items():
        if linear.weight.is_meta:
            raise ValueError(
                f"the weight of {name} is on the meta device: remove offloading hooks, quantize, offload again"
            )
        weight = (
            linear.weight.float() if linear.weight.dtype.itemsize == 1 else linear.weight
        )  # of 8-bit floats nobody can ask
        if not bool(weight.isfinite().all()):
            raise ValueError(f"the weight of {name} holds NaN or infinity: the checkpoint is damaged")
    words = word_linears(transformer, linears)

    def find(index: int, at_least: int = 0) -> OutlierSet:
        weights, detector = [linears[name].weight for name in groups[index]], _detector(groups[index][0], config)
        if extents is not None and groups[index][0] not in words:
            return quietest_split(weights, *extents[index], config.outlier_alignment, at_least)
        return find_outliers(weights, detector, config.outlier_alignment, config.reference_compat, at_least)

    found = [find(index) for index in range(len(groups))]
    if config.reference_compat:
        return found
    largest: dict[str, int] = defaultdict(int)
    for group, outliers in zip(groups, found, strict=True):
        largest[repeated_name(group[0])] = max(largest[repeated_name(group[0])], outliers.num_outliers)
    counts = [largest[repeated_name(group[0])] for group in groups]
    return [
        outliers if outliers.num_outliers == count else find(index, count)
        for index, (outliers, count) in enumerate(zip(found, counts, strict=True))
    ]


def _detector(name: str, config: QARVDConfig) -> str:
    """Of the weights. The reference implementation looks for outliers inside the numbered blocks only."""
    in_block = any(part.isdigit() for part in name.split("."))
    if config.reference_compat and not in_block:
        return "none"
    return "mad_zscore" if config.resolved_outlier_detector == "input" else config.resolved_outlier_detector


def stored_split(layer: LinearQParams) -> OutlierSet:
    """The outlier set that a layer was quantized with."""
    return OutlierSet(layer.channel_order, layer.description.num_outliers, 0.0)


def input_extents(
    linears: Mapping[str, nn.Linear],
    groups: Sequence[Sequence[str]],
    run: Callable[[Callable[[PassInfo], None]], None],
    config: QARVDConfig,
    processes: Processes,
) -> list[Extent]:
    """Watch one set of rollouts: what every channel of every group's input extends to."""
    found: list[Extent | None] = [None] * len(groups)

    def observe(index: int, x: Tensor, info: PassInfo) -> None:
        found[index] = _joined(found[index], x.detach().flatten(0, -2).to(torch.float32).aminmax(dim=0))

    with torch.no_grad(), InputCapture(linears, groups, observe) as capture:
        run(capture.on_pass)
    if capture.ran or processes.count == 1:  # of many processes some may have had no prompt
        capture.check(range(config.calibration_chunks))
    everywhere: list[Extent | None] = [None] * len(groups)
    for seen in processes.gather([extent and tuple(each.cpu() for each in extent) for extent in found]):
        everywhere = [_joined(mine, other) for mine, other in zip(everywhere, seen, strict=True)]
    return everywhere


def _joined(a: Extent | None, b: Extent | None) -> Extent | None:
    if a is None or b is None:
        return a or b
    return torch.minimum(a[0], b[0]), torch.maximum(a[1], b[1])
