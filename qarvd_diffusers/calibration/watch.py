"""Watch what a pipeline calls: read the place of every transformer pass off the call itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..rollout.pass_info import PassInfo

# Tells the place of a pass from that of the pass before it in the rollout (None for the first) and from the arguments
# of the call, by name and in the order of the signature.
ReadPass = Callable[[PassInfo | None, Mapping[str, Any]], PassInfo]


def by_timestep(last: PassInfo | None, arguments: Mapping[str, Any]) -> PassInfo:
    """Tell the place of a pass from its timestep: a chunk begins where it rises; a pass at 0 fills a cache.

    A pass at 0 before any denoising encodes a context. Guidance repeats a timestep, which is no new step. Of several
    timesteps (one for each frame or token) the largest counts.

    Args:
        last: the pass before this one in the same rollout; None for the first.
        arguments: of the call; the timestep is the argument of this name, or the first whose name contains it.

    Raises:
        ValueError: there is no timestep.
    """
    named = sorted((name for name in arguments if "timestep" in name), key=lambda name: name != "timestep")
    values = [arguments[name] for name in named if _is_time(arguments[name])]
    if not values:
        raise ValueError(
            f"a pass with the arguments {sorted(arguments)} has no timestep, which tells its chunk: pass pass_info, a "
            "function of the pass before it and these arguments that returns a PassInfo"
        )
    timestep = float(values[0].max() if isinstance(values[0], Tensor) else values[0])
    if last is None or last.role == "context":
        return PassInfo(-1, "context", 0, timestep) if timestep == 0 else PassInfo(0, "denoise", 0, timestep)
    if timestep == 0:
        return PassInfo(last.chunk, "refresh", 0, timestep)
    if timestep > last.timestep:
        return PassInfo(last.chunk + 1, "denoise", 0, timestep)
    return PassInfo(last.chunk, "denoise", last.step + (timestep < last.timestep), timestep)


def _is_time(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > 0 and value.dtype.is_complex is False
    return isinstance(value, int | float) and not isinstance(value, bool)


class Watch:
    """Run rollouts and announce every pass of a transformer in them.

    Args:
        transformer: whose passes are announced.
        rollouts: callables without arguments; each generates once.
        read_pass: tells the place of a pass.

    Attributes:
        chunks: of the longest rollout so far.
    """

    def __init__(
        self, transformer: nn.Module, rollouts: Sequence[Callable[[], Any]], read_pass: ReadPass = by_timestep
    ) -> None:
        self._transformer, self._read_pass = transformer, read_pass
        self._signature = inspect.signature(inspect.unwrap(type(transformer).forward))
        self.rollouts = tuple(rollouts)
        wrong = [rollout for rollout in self.rollouts if not callable(rollout)]
        if wrong or not self.rollouts:
            got = f"a {type(wrong[0]).__name__}" if wrong else "none"
            raise ValueError(f"rollouts has {got}, expected functions without arguments, each of which generates once")
        self.chunks = 0
        self._last: PassInfo | None = None

    def run(
        self, on_pass: Callable[[PassInfo], None], rollouts: Sequence[Callable[[], Any]] | None = None
    ) -> list[Any]:
        """Run rollouts, all by default, and return what they generate; `on_pass` is called right before every pass.

        Raises:
            ValueError: a rollout never calls the transformer.
        """

        def announce(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            """Announce the pass that begins."""
            bound = self._signature.bind(module, *args, **kwargs).arguments
            arguments = dict(list(bound.items())[1:])
            arguments |= arguments.pop("kwargs", {})
            self._last = self._read_pass(self._last, arguments)
            self.chunks = max(self.chunks, 1, self._last.chunk + 1, *(c + 1 for c in self._last.chunks))
            on_pass(self._last)

        generated = []
        handle = self._transformer.register_forward_pre_hook(announce, prepend=True, with_kwargs=True)
        try:
            for index, rollout in enumerate(self.rollouts if rollouts is None else rollouts):
                self._last = None
                generated.append(rollout())
                if self._last is None:
                    raise ValueError(
                        f"rollout {index} never called this {type(self._transformer).__name__}: it has to generate "
                        "with the transformer that is quantized"
                    )
        finally:
            handle.remove()
        return generated
