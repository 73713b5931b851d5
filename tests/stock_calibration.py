"""Calibrates a transformer of diffusers on rollouts of its own pipeline, by watching what the pipeline calls.

Only what is public today: a hook tells `calibrate` the chunk and step of every pass, and a first rollout finds the
Linears that have to stay float.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from qarvd_diffusers import QARVDConfig, calibrate
from qarvd_diffusers.calibration.targets import input_groups, quantizable_linears
from qarvd_diffusers.quantizer import install
from qarvd_diffusers.rollout.pass_info import PassInfo

MODULATION_ROWS = 2  # a Linear that never reads more rows reads the time embedding, not the tokens


class Watch:
    """Read chunk and step off the calls of a transformer: a chunk begins where the timestep rises."""

    def __init__(self, transformer: nn.Module):
        self._signature = inspect.signature(inspect.unwrap(type(transformer).forward))
        self._name = next(name for name in self._signature.parameters if name.endswith(("timestep", "timesteps")))
        self._transformer = transformer
        self.chunks = 0

    def __call__(self, rollouts: Iterable[Callable[[], Any]], on_pass: Callable[[PassInfo], None]) -> None:
        """Run rollouts and call `on_pass` right before every pass."""
        self._on_pass = on_pass
        with self._transformer.register_forward_pre_hook(self._hook, with_kwargs=True, prepend=True):
            for rollout in rollouts:
                self._chunk, self._step, self._last = 0, 0, float("inf")
                rollout()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = float(self._signature.bind(module, *args, **kwargs).arguments[self._name].max())
        if timestep > self._last:
            self._chunk, self._step = self._chunk + 1, 0
        elif timestep < self._last:
            self._step += 1
        self._last = timestep
        self.chunks = max(self.chunks, self._chunk + 1)
        self._on_pass(PassInfo(self._chunk, "denoise", self._step, timestep, 0, 1))


def scout(
    transformer: nn.Module, config: QARVDConfig, watch: Watch, rollout: Callable[[], Any]
) -> tuple[list[str], bool]:
    """Run one float rollout.

    Returns:
        The Linears that stay float: outside repeated blocks, beside experts (a router: its error sends a token to
        another expert), not called in every pass, called on nothing, or reading the time embedding; and whether the
        layers that the config ties read the same tensors.
    """
    linears = quantizable_linears(transformer, config)
    blocks = tuple(
        f"{name}."
        for name, module in transformer.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len(set(map(type, module))) == 1
    )
    experts = [name for name, tensor in transformer.named_parameters() if tensor.ndim == 3 and name[-7:] != ".weight"]
    routing = {name.rpartition(".")[0].rpartition(".")[0] for name in experts} - {""}
    rows, inputs, passes = defaultdict(list), {}, []

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows[name].append(args[0].numel() // module.in_features)
            inputs[name] = args[0]

        return hook

    hooks = [linear.register_forward_pre_hook(record(name)) for name, linear in linears.items()]
    try:
        watch([rollout], passes.append)
    finally:
        for hook in hooks:
            hook.remove()
    kept = [
        name
        for name in linears
        if not name.startswith(blocks)
        or name.rpartition(".")[0] in routing
        or len(rows[name]) < len(passes)
        or min(rows[name]) == 0
        or max(rows[name]) <= MODULATION_ROWS
    ]
    groups = input_groups(transformer, [name for name in linears if name not in kept], config)
    return kept, all(inputs[name] is inputs[group[0]] for group in groups for name in group)


@torch.no_grad()
def quantize(transformer: nn.Module, rollouts: list[Callable[[], Any]], config: QARVDConfig) -> None:
    """Calibrate a float transformer on rollouts and quantize it, in place."""
    watch = Watch(transformer)
    kept, tied = scout(transformer, config, watch, rollouts[0])
    config = config.replace(modules_to_not_convert=tuple(kept), calibration_chunks=watch.chunks)
    if not tied:
        config = config.replace(tie_inputs=False)
    install(transformer, calibrate(transformer, lambda on_pass: watch(rollouts, on_pass), config), config)
