"""Round block by block: observe the inputs of a few blocks at a time, and keep finished ones for resuming."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..config import QARVDConfig
from ..quantization.as_linear import as_linear, quantized_class
from ..quantization.model import base_layer_name
from ..quantization.qparams import LinearQParams
from ..rollout.pass_info import PassInfo
from .capture import InputCapture, pass_weight
from .groups import LayerGroup, stored_grid
from .processes import SINGLE_PROCESS, Processes
from .resume import ResumeFolder
from .rounding import ROUNDINGS, OnStep, Rounding

# Device memory for the groups that one process observes together; at least one block is observed.
CAPTURE_BYTES = 4 * 2**30

Run = Callable[[Callable[[PassInfo], None]], object]


def round_blocks(
    transformer: nn.Module,
    groups: Sequence[LayerGroup],
    nearest: Mapping[str, LinearQParams],
    run: Run,
    config: QARVDConfig,
    folder: ResumeFolder | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, LinearQParams]:
    """Choose the integer weights of all groups from the data that reaches them; the transformer does not change.

    Args:
        transformer: float model.
        groups: in module order.
        nearest: every layer rounded to nearest; the rounding starts from its ranges.
        run: performs all calibration rollouts, see `calibrate`; called once for every few blocks.
        config: `resolved_rounding`, `rounding_inputs` and the weights of the chunks.
        folder: stores finished groups; those it already holds are not rounded again.
        progress: called after every step of a group with a text, the steps done and the number of steps.
        processes: share the groups; each observes and rounds its own, so the result does not depend on their number.

    Returns:
        Parameters of every layer in `nearest`.
    """
    kind, sequential = ROUNDINGS[config.resolved_rounding], config.rounding_inputs == "quantized"
    by_name, done = {group.name: group for group in groups}, dict(nearest)
    channels = {group.name: group.outliers.channel_order.numel() for group in groups}
    finished = processes.from_main(_restore(groups, folder if processes.is_main else None))
    with _quantized(transformer) as quantize:
        for stage in stages_of(channels, config, finished, processes):
            own = [by_name[name] for name in stage.own]
            rounded_here: dict[str, LinearQParams] = {}
            roundings = _observe(own, kind, run, config) if own else []
            while own:  # a group's statistics are freed before the next one is solved
                group, rounding = own.pop(0), roundings.pop(0)
                rounded = rounding.solve(stored_grid(group, nearest), _report(progress, group))
                layers = group.packed(*rounded, like=nearest)
                rounded_here.update(layers)
                if folder is not None:
                    folder.save(group.name, layers)
            for layers in (*(finished.get(name, {}) for name in stage.groups), *processes.gather(rounded_here)):
                done.update(layers)
            if sequential:
                quantize({name: done[name] for group in stage.groups for name in by_name[group].linears})
    return done


@dataclass(frozen=True)
class Stage:
    """List consecutive groups whose inputs are observed together, in one set of rollouts.

    Attributes:
        groups: their names.
        own: unfinished groups that this process rounds.
    """

    groups: tuple[str, ...]
    own: tuple[str, ...]


def stages_of(
    channels: Mapping[str, int], config: QARVDConfig, finished: Collection[str], processes: Processes
) -> list[Stage]:
    """Divide groups into stages: whole blocks, as many as fit the memory, at least one.

    Args:
        channels: input channels of every group, in module order, by its name.
        config: decides the rounding, and whether blocks are rounded for quantized inputs, one at a time.
        finished: names of groups that are done.
        processes: those that share the groups.
    """
    sizes = {name: ROUNDINGS[config.resolved_rounding].bytes(count) for name, count in channels.items()}
    budget = 0 if config.rounding_inputs == "quantized" else processes.count * CAPTURE_BYTES
    blocks: dict[str, list[str]] = {}
    for name in sizes:
        blocks.setdefault(block_name(name), []).append(name)
    stages: list[list[str]] = []
    room = -math.inf
    for block in blocks.values():
        needed = sum(sizes[name] for name in block)
        if needed > room:
            stages.append([])
            room = budget
        stages[-1].extend(block)
        room -= needed
    return [
        Stage(
            tuple(stage),
            _balanced_share({name: sizes[name] for name in stage if name not in finished}, processes),
        )
        for stage in stages
    ]


def _restore(groups: Iterable[LayerGroup], folder: ResumeFolder | None) -> dict[str, Mapping[str, LinearQParams]]:
    """Load the finished groups, by name."""
    stored = {} if folder is None else {group.name: folder.load(group.name, group.linears) for group in groups}
    return {name: layers for name, layers in stored.items() if layers is not None}


def _balanced_share(sizes: Mapping[str, float], processes: Processes) -> tuple[str, ...]:
    """Return this process's share of some groups: largest first, each goes to the process that has least."""
    shares: list[list[str]] = [[] for _ in range(processes.count)]
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        min(shares, key=lambda share: (sum(map(sizes.__getitem__, share)), len(share))).append(name)
    return tuple(name for name in sizes if name in shares[processes.index])


def _observe(groups: Sequence[LayerGroup], kind: type[Rounding], run: Run, config: QARVDConfig) -> list[Rounding]:
    """Observe one set of rollouts; returns one rounding per group, ready to solve."""
    roundings = [kind(group, config) for group in groups]
    weigh = pass_weight(config)

    def observe(index: int, x: Tensor, info: PassInfo) -> None:
        weighted = config.recipe.weigh_dual_scale or not groups[index].outliers.num_outliers
        roundings[index].add(x, weigh(info) if weighted else 1.0)

    linears = {name: linear for group in groups for name, linear in group.linears.items()}
    names, every_pass = [tuple(group.linears) for group in groups], all(group.every_pass for group in groups)
    with torch.no_grad(), InputCapture(linears, names, observe, every_pass) as capture:
        run(capture.on_pass)
    capture.check(range(config.calibration_chunks))
    return roundings


def _report(progress: Callable[[str, int, int], None] | None, group: LayerGroup) -> OnStep:
    """Make the callback that reports the steps of a group."""

    def report(step: int, steps: int, loss: float) -> None:
        if progress is not None:
            text = "" if math.isnan(loss) else f", loss {loss:.3g}"
            progress(f"rounding {group.name}{text}", step, steps)

    return report


def block_name(name: str) -> str:
    """Return a layer's name up to the first number, which is its block; empty outside the blocks."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


@contextmanager
def _quantized(transformer: nn.Module) -> Iterator[Callable[[Mapping[str, LinearQParams]], None]]:
    """Yield a function that replaces Linears by quantized ones until the `with` ends."""
    kept: dict[str, nn.Module] = {}

    def quantize(layers: Mapping[str, LinearQParams]) -> None:
        """Replace the named Linears by quantized ones."""
        for name, qparams in layers.items():
            name = base_layer_name(transformer, name)
            kept[name] = transformer.get_submodule(name)
            linear = cast(nn.Linear, as_linear(kept[name]))
            transformer.set_submodule(name, quantized_class(linear).from_float(linear, qparams))

    try:
        yield quantize
    finally:
        for name, linear in kept.items():
            transformer.set_submodule(name, linear)
