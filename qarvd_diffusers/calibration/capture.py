"""Capture the inputs of layers during rollouts, by hooks that a `with` removes, with a completeness check."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..config import QARVDConfig
from ..quantization.as_linear import experts_run
from ..rollout.pass_info import PassInfo


def pass_weight(config: QARVDConfig) -> Callable[[PassInfo], float]:
    """Return the function that weighs a pass: the sensitivity of its chunk, divided among the chunk's passes."""
    weights = config.sensitivity(config.calibration_chunks)

    def weight(info: PassInfo) -> float:
        """Weigh one pass."""
        # Every chunk reads the initial latents: they weigh as much as the first chunk.
        return weights[min(max(info.chunk, 0), len(weights) - 1)] * info.share

    return weight


class InputCapture:
    """Pass the input of every group of layers to `observe`, with the pass it belongs to, inside a `with`.

    The rollout calls `on_pass` right before every transformer pass. When the block ends the hooks are removed; `check`
    then checks that every layer ran in every pass where it should.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        groups: Sequence[Sequence[str]],
        observe: Callable[[int, Tensor, PassInfo], None],
        every_pass: bool = True,
    ) -> None:
        """
        Args:
            linears: layers by name; those of no group are left alone.
            groups: names of layers that read the same tensor; the first one's input is observed.
            observe: called with the index of the group, its input `[..., K]` and the current pass; once for every
                chunk where a pass spans several, and not for inputs without rows.
            every_pass: whether a pass without one of the layers is an error.
        """
        self._every_pass = every_pass
        self._linears, self._groups, self._observe = linears, groups, observe
        self._ends = ExitStack()
        self._passes: list[PassInfo] = []
        grouped = {name for group in groups for name in group}
        # Index into _passes, one per call.
        self._called: dict[str, list[int]] = {name: [] for name in linears if name in grouped}

    def on_pass(self, info: PassInfo) -> None:
        """Announce the next transformer pass."""
        self._passes.append(info)

    def __enter__(self) -> InputCapture:
        self._ends.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code does not see new hooks
        self._ends.enter_context(experts_run(self._linears[name] for name in self._called))
        for index, group in enumerate(self._groups):
            last = _Last()
            for position, name in enumerate(group):
                hook = self._hook(index, name, last, leads=position == 0)
                handle = self._linears[name].register_forward_pre_hook(hook, with_kwargs=True)
                self._ends.callback(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._ends.close()

    def _hook(self, index: int, name: str, last: _Last, leads: bool) -> Callable[..., None]:
        """Make the forward pre-hook of one layer; that of the leading layer observes."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else kwargs["input"]
            if not self._passes:
                raise RuntimeError(
                    f"{name} ran before any pass was announced: call on_pass before every transformer pass"
                )
            info = self._passes[-1]
            self._called[name].append(len(self._passes) - 1)
            if not leads:
                last.require_same(x, name, self._groups[index][0])
                return
            last.set(x)
            if not bool(x.isfinite().all()):
                raise ValueError(
                    f"the input of {name} holds NaN or infinity in {_describe(info)}: the float model itself fails "
                    "there, try another dtype or seed"
                )
            for part, place in _chunks(x, info):
                self._observe(index, part, place)

        return hook

    @property
    def ran(self) -> bool:
        """Whether any pass was announced."""
        return bool(self._passes)

    def calls(self, name: str) -> Counter[tuple[int, str]]:
        """Count how often a layer ran, by (chunk, role)."""
        return Counter((self._passes[i].chunk, self._passes[i].role) for i in self._called[name])

    def check(self, chunks: Iterable[int]) -> None:
        """Check that no layer missed a pass.

        A layer may run in every pass, or only in the first pass of every rollout (it reads the prompt alone and its
        output is cached); anything in between is a gap.

        Raises:
            ValueError: no pass was announced, one of `chunks` was never reached, or a layer missed a pass; the message
                names it.
        """
        if not self._passes:
            raise ValueError("calibration ran no pass: run(on_pass) must call on_pass before every transformer pass")
        reached = {chunk for info in self._passes for chunk in (info.chunk, *info.chunks)}
        missing = sorted(set(chunks) - reached)
        if missing:
            raise ValueError(
                f"calibration never reached chunks {missing}, only {sorted(reached)}: generate as many chunks as "
                "config.calibration_chunks says"
            )
        every = set(range(len(self._passes)))
        first = {i for i, info in enumerate(self._passes) if _starts_rollout(info)}
        for name, called in self._called.items():
            if not called:
                raise ValueError(
                    f"{name} was never called in {len(every)} calibration passes: add it to modules_to_not_convert "
                    "if the model does not use it"
                )
            gaps = self._every_pass and min(every - set(called), first ^ set(called), key=len)
            if gaps:
                raise ValueError(
                    f"{name} was not called as often as it should be: it ran in {len(set(called))} of {len(every)} "
                    f"passes (expected all, or the first of each of {len(first)} rollouts), first gap in "
                    f"{_describe(self._passes[min(gaps)])}"
                )


class _Last:
    """Remember the tensor that the first layer of a group read last, without keeping it alive."""

    def __init__(self) -> None:
        self._tensor: Callable[[], Tensor | None] = lambda: None

    def set(self, x: Tensor) -> None:
        """Remember a tensor."""
        self._tensor = weakref.ref(x)

    def require_same(self, x: Tensor, name: str, leader: str) -> None:
        """Check that another layer of the group reads the same tensor."""
        last = self._tensor()
        if last is not x and (last is None or last.data_ptr() != x.data_ptr() or last.shape != x.shape):
            raise ValueError(f"{name} does not read the same tensor as {leader}: set tie_inputs=False for this model")


def _chunks(x: Tensor, info: PassInfo) -> Iterator[tuple[Tensor, PassInfo]]:
    """Divide an input `[..., tokens, K]` among the chunks that its pass spans; tokens are in the order of frames."""
    frames = len(info.chunks)
    if not x.numel():
        return
    if frames == 0 or x.ndim < 2 or x.shape[-2] % frames:
        yield x, info
        return
    parts = x.unflatten(-2, (frames, -1)).movedim(-3, 0)
    for chunk in sorted(set(info.chunks)):
        own = [i for i, c in enumerate(info.chunks) if c == chunk]
        yield parts[own].flatten(0, -2), dataclasses.replace(info, chunk=chunk, share=info.share * len(own) / frames)


def _starts_rollout(info: PassInfo) -> bool:
    """Tell whether a pass is the first of a rollout."""
    # Passes that rebuild the context are at offset 0, too, before later chunks.
    return info.chunk <= 0 and info.frame_offset == 0 and info.step == 0 and info.role != "refresh"


def _describe(info: PassInfo) -> str:
    """Describe a pass in a message."""
    return f"chunk {info.chunk}, {info.role} pass, step {info.step} (timestep {info.timestep:g})"
