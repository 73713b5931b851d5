"""Find out, in one float rollout, which Linears run, which read the same tensor, and what they read."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import QARVDConfig, named_by
from ..quantization.as_linear import ExpertView, experts_run
from ..rollout.pass_info import PassInfo
from .targets import Targets, kept_float, partition, quantizable_linears

# A Linear that never reads more rows in a call reads no tokens, but the timestep or another vector for each video.
MODULATION_ROWS = 4

NEVER_CALLED, EMPTY = "never called in the first rollout", "reads nothing in the first rollout"


@dataclass
class _Reads:
    """Record what one Linear read.

    Attributes:
        calls: how often it ran.
        rows: most rows in a call.
        turn: when it ran first.
        inputs: digests of its inputs in the first denoising step.
        changes: whether it read anything else later.
    """

    calls: int = 0
    rows: int = 0
    turn: int = 0
    inputs: set[tuple[Any, ...]] = field(default_factory=set)
    changes: bool = False


def scout(
    transformer: nn.Module, config: QARVDConfig, run: Callable[[Callable[[PassInfo], None]], Any]
) -> tuple[Targets, QARVDConfig]:
    """Run a float rollout and select what to quantize by what runs.

    Linears that never run, or read nothing, stay float. Those that read a few rows without tokens (modulation) get 8
    bits and activations that are quantized at run time: static scales do not reach from the timesteps of calibration
    to others.

    Args:
        transformer: float model, without wrapper.
        config: what to calibrate for.
        run: performs a rollout, calling its argument right before every pass.

    Returns:
        The targets, and the config with the bits of those that read no tokens.

    Raises:
        ValueError: see `quantizable_linears`; or none of them ran.
    """
    selected = quantizable_linears(transformer, config)
    experts = {name for name, linear in selected.items() if isinstance(linear, ExpertView)}
    watcher = _Watcher(selected)
    with watcher, torch.no_grad():
        run(watcher.on_pass)
    reads = watcher.reads
    kept = kept_float(transformer, config)
    idle = [name for name in selected if not reads[name].rows and name not in experts]
    kept |= {name: EMPTY if reads[name].calls else NEVER_CALLED for name in idle}
    linears = {name: linear for name, linear in selected.items() if name not in kept}
    if not any(reads[name].rows for name in linears):
        raise ValueError(f"no Linear in the repeated blocks of {type(transformer).__name__} ran in the first rollout")
    modulation = {name for name in linears.keys() - experts if reads[name].rows <= MODULATION_ROWS}
    config = _with_eight_bits(config, modulation)
    leader = {name: name for name in linears}
    if config.recipe.tie_inputs:
        leader |= {name: watcher.leader(name) for name in linears.keys() - experts}
    dynamic = frozenset(modulation | experts & linears.keys())
    seen = frozenset(name for name in experts & linears.keys() if reads[name].rows)
    groups = sorted(partition(leader, config), key=lambda names: (names[0] in dynamic) * (2 - (names[0] in seen)))
    prompt = watcher.unchanged() & (linears.keys() - dynamic)
    words = prompt | (watcher.last_beside(prompt) & linears.keys())
    return Targets(linears, groups, kept, frozenset(prompt), frozenset(words), dynamic, seen, observed=True), config


def _with_eight_bits(config: QARVDConfig, names: Collection[str]) -> QARVDConfig:
    """Give some layers 8 bits in a 4-bit scheme, but for those whose bits the user chose."""
    chosen = [name for name in names if not any(named_by(name, p) for p in config.module_bits or ())]
    if config.resolved_scheme.weight_bits != 4 or not chosen:
        return config
    return config.replace(module_bits={**(config.module_bits or {}), **dict.fromkeys(sorted(chosen), 8)})


class _Watcher:
    """Record, inside a `with`, what every Linear reads."""

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        self._linears = linears
        self.reads = {name: _Reads() for name in linears}
        self._together: Counter[tuple[str, str]] = Counter()  # calls in which two layers read one tensor
        self._recent: dict[str, dict[str, weakref.ref[Tensor]]] = defaultdict(dict)  # by the module they belong to
        self._first: tuple[Any, ...] | None = None  # the first denoising step
        self._in_first = self._several = False
        self._turns = itertools.count()
        self._ends = ExitStack()

    def on_pass(self, info: PassInfo) -> None:
        """Announce the next pass."""
        place = (info.chunk, info.role, info.step, info.timestep)
        self._first = self._first or place
        self._in_first = place == self._first
        self._several |= not self._in_first
        for recent in self._recent.values():
            recent.clear()

    def __enter__(self) -> _Watcher:
        self._ends.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code does not see new hooks
        self._ends.enter_context(experts_run(self._linears.values()))
        for name, linear in self._linears.items():
            self._ends.callback(linear.register_forward_pre_hook(self._hook(name), with_kwargs=True).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._ends.close()

    def _hook(self, name: str) -> Callable[..., None]:
        """Make the forward pre-hook of one layer."""
        reads, recent = self.reads[name], self._recent[name.rpartition(".")[0]]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if not reads.calls:
                reads.turn = next(self._turns)
            reads.calls += 1
            reads.rows = max(reads.rows, x.numel() // x.shape[-1])
            for other, read in recent.items():
                if other != name and read() is x:
                    self._together[other, name] += 1
            recent[name] = weakref.ref(x)
            if self._in_first:
                reads.inputs.add(_digest(x))
            elif not reads.changes:
                reads.changes = _digest(x) not in reads.inputs

        return hook

    def leader(self, name: str) -> str:
        """Return the layer that ran first of those of a module that read the same tensor in every call."""
        calls, parent = self.reads[name].calls, name.rpartition(".")[0]
        beside = [other for other in self.reads if other.rpartition(".")[0] == parent]
        tied = [other for other in beside if self._together[other, name] == calls == self.reads[other].calls and calls]
        return min(tied, key=lambda other: self.reads[other].turn, default=name)

    def unchanged(self) -> set[str]:
        """Select what reads in no later pass anything that it did not read in the first denoising step."""
        if not self._several:
            return set()
        return {name for name, reads in self.reads.items() if reads.calls and not reads.changes}

    def last_beside(self, names: set[str]) -> set[str]:
        """Select the Linear that runs last in every module with two of some direct Linears: keys and values."""
        parents = Counter(name.rpartition(".")[0] for name in names)
        inside = {
            parent: [name for name in self.reads if name.startswith(f"{parent}.") and self.reads[name].calls]
            for parent, count in parents.items()
            if count > 1
        }
        return {max(some, key=lambda name: self.reads[name].turn) for some in inside.values()}


def _digest(x: Tensor) -> tuple[Any, ...]:
    """Describe a tensor by its shape and two sums."""
    values = x.detach().float()
    return (*x.shape, values.sum().item(), values.square().sum().item())
