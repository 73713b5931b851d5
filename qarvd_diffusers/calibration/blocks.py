"""Rounding block by block: the inputs of a few blocks are watched at a time, and what is done need not be done again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..config import QARVDConfig
from ..linear import LinearQParams, QARVDLinear, base_layer_name
from ..models.pass_info import PassInfo
from .capture import InputCapture, pass_weight
from .groups import LayerGroup, stored_grid
from .processes import ALONE, Processes
from .resume import ResumeFolder
from .rounding import ROUNDINGS, OnStep, Rounding

# What the groups that one process watches together may take on the device; at least one block is watched.
CAPTURE_BYTES = 4 * 2**30

Run = Callable[[Callable[[PassInfo], None]], None]


def round_blocks(
    transformer: nn.Module,
    groups: Sequence[LayerGroup],
    nearest: Mapping[str, LinearQParams],
    run: Run,
    config: QARVDConfig,
    folder: ResumeFolder | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    processes: Processes = ALONE,
) -> dict[str, LinearQParams]:
    """Choose the integer weights of all groups anew from the data that reaches them; the transformer is left as it was.

    Args:
        transformer: float model.
        groups: in module order.
        nearest: every layer rounded to nearest; its ranges are where the rounding starts from.
        run: performs all calibration rollouts, see `calibrate`; called once for every few blocks.
        config: `resolved_rounding`, `rounding_inputs` and the weights of the chunks.
        folder: finished groups are stored there, and not done again if it holds them.
        progress: called after every step of a group with a text, the steps done and how many there are.
        processes: share the groups; every one watches and rounds its own, so the result does not depend on their number.

    Returns:
        The parameters of every layer of `nearest`.
    """
    kind, sequential = ROUNDINGS[config.resolved_rounding], config.rounding_inputs == "quantized"
    done = dict(nearest)
    with _quantized(transformer) as quantize:
        for stage in _stages(groups, kind.bytes, 0 if sequential else processes.count * CAPTURE_BYTES):
            finished = processes.from_main(_restore(stage, folder if processes.is_main else None))
            left = [group for group in stage if group.name not in finished]
            mine = _dealt(left, kind.bytes, processes)
            found: dict[str, LinearQParams] = {}
            roundings = _watch(mine, kind, run, config) if mine else []
            while mine:  # a group's statistics are freed before the next one is solved
                group, rounding = mine.pop(0), roundings.pop(0)
                rounded = rounding.solve(stored_grid(group, nearest), _report(progress, group))
                layers = group.packed(*rounded, like=nearest)
                found.update(layers)
                if folder is not None:
                    folder.save(group.name, layers)
            for layers in (*finished.values(), *processes.gather(found)):
                done.update(layers)
            if sequential:
                quantize({name: done[name] for group in stage for name in group.linears})
    return done


def _restore(groups: Iterable[LayerGroup], folder: ResumeFolder | None) -> dict[str, Mapping[str, LinearQParams]]:
    """The finished groups among some, by name."""
    stored = {} if folder is None else {group.name: folder.load(group.name, group.linears) for group in groups}
    return {name: layers for name, layers in stored.items() if layers is not None}


def _dealt(
    groups: Iterable[LayerGroup], size: Callable[[LayerGroup], float], processes: Processes
) -> list[LayerGroup]:
    """This process's share of some groups: the largest are dealt first, each to who has least."""
    groups, hands = list(groups), [[] for _ in range(processes.count)]
    for group in sorted(groups, key=size, reverse=True):
        min(hands, key=lambda hand: (sum(map(size, hand)), len(hand))).append(group)
    return [group for group in groups if group in hands[processes.index]]


def _watch(groups: Sequence[LayerGroup], kind: type[Rounding], run: Run, config: QARVDConfig) -> list[Rounding]:
    roundings = [kind(group, config) for group in groups]
    weigh = pass_weight(config)

    def observe(index: int, x: Tensor, info: PassInfo) -> None:
        # The reference weighs all chunks alike in its dual-scale layers.
        alike = config.reference_compat and groups[index].outliers.num_outliers
        roundings[index].add(x, 1.0 if alike else weigh(info))

    linears = {name: linear for group in groups for name, linear in group.linears.items()}
    with torch.no_grad(), InputCapture(linears, [tuple(group.linears) for group in groups], observe) as capture:
        run(capture.on_pass)
    capture.check(range(config.calibration_chunks))
    return roundings


def _report(progress: Callable[[str, int, int], None] | None, group: LayerGroup) -> OnStep:
    def report(step: int, steps: int, loss: float) -> None:
        if progress is not None:
            text = "" if math.isnan(loss) else f", loss {loss:.3g}"
            progress(f"rounding {group.name}{text}", step, steps)

    return report


def _stages(
    groups: Iterable[LayerGroup], size: Callable[[LayerGroup], float], budget: float
) -> list[list[LayerGroup]]:
    """Consecutive groups in stages: whole blocks, as many as fit the budget, at least one."""
    blocks: dict[str, list[LayerGroup]] = {}
    for group in groups:
        blocks.setdefault(block_name(group.name), []).append(group)
    stages: list[list[LayerGroup]] = []
    room = -math.inf
    for block in blocks.values():
        needed = sum(map(size, block))
        if needed > room:
            stages.append([])
            room = budget
        stages[-1].extend(block)
        room -= needed
    return stages


def block_name(name: str) -> str:
    """The part of a layer's name that names its block, up to the first number; empty outside the blocks."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


@contextmanager
def _quantized(transformer: nn.Module) -> Iterator[Callable[[Mapping[str, LinearQParams]], None]]:
    """Hands out a function that replaces Linears by quantized ones until the block ends."""
    kept: dict[str, nn.Module] = {}

    def quantize(layers: Mapping[str, LinearQParams]) -> None:
        for name, qparams in layers.items():
            name = base_layer_name(transformer, name)
            kept[name] = transformer.get_submodule(name)
            transformer.set_submodule(name, QARVDLinear.from_float(kept[name], qparams))

    try:
        yield quantize
    finally:
        for name, linear in kept.items():
            transformer.set_submodule(name, linear)
