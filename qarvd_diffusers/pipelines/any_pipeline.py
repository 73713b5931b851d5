"""Quantize the transformer of any pipeline by watching the pipeline generate, and measure what that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calibration.calibrate import Progress, calibrate
from ..calibration.mixed_precision import most_costly, require_four_bits
from ..calibration.processes import Processes
from ..calibration.report import Report, make_report, with_chunk_weights
from ..calibration.scout import scout
from ..calibration.sensitivity import SensitivityResult
from ..calibration.switch import QuantizationSwitch
from ..calibration.targets import Targets
from ..calibration.watch import ReadPass, Watch, by_timestep
from ..config import QARVDConfig
from ..quantization.adapters import adapter_scales
from ..quantization.install import quantized_layers
from ..quantization.model import unwrapped
from ..quantization.result import CalibrationResult
from ..quantizer import install
from ..rollout.pass_info import PassInfo

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

Rollout = Callable[[], Any]


@torch.no_grad()
def quantize(
    transformer: ModelMixin,
    rollouts: Iterable[Rollout],
    config: QARVDConfig = QARVDConfig(),  # noqa: B008 - it is frozen
    pass_info: ReadPass = by_timestep,
    progress: Progress | None = None,
) -> Report:
    """Calibrate a float transformer on rollouts of its own pipeline, which stays as it is, and quantize it in place.

    A first float rollout finds which layers run, which read the same tensor, and which read no tokens. What lies in
    repeated blocks is quantized, the rest stays float; `modules_to_convert` and `modules_to_not_convert` of the config
    overrule that. Under `accelerate launch` all processes call this, with the same rollouts, and share the work.

    Args:
        transformer: float model of diffusers.
        rollouts: functions without arguments; each generates once, by the pipeline of the transformer, and does the
            same whenever it is called (seed its generator inside). They run two to four times, and for rounding once
            more for every few blocks.
        config: what to quantize to. `calibration_chunks` becomes that of the longest rollout.
        pass_info: tells the place of a pass from that of the pass before it and the arguments of the call. For a
            pipeline that hands over a `section`:

                def by_section(last, arguments):
                    return PassInfo(arguments["section"], timestep=float(arguments["timestep"].max()))

            A pass that spans several chunks gives that of each of its frames in `PassInfo.chunks`.
        progress: see `calibrate`.

    Returns:
        What was quantized, what stayed float and why.

    Raises:
        ValueError: there is no rollout, one never calls the transformer, a pass does not tell its chunk, the model has
            no repeated blocks or is quantized already, or an activation is not finite. The transformer is then as it
            was, as after any error in a rollout.
    """
    model: Any = unwrapped(transformer)
    watch = Watch(model, tuple(rollouts), pass_info)
    targets, config, result, why = _calibrated(model, watch, config, progress)
    report = make_report(model, targets, result, config, why)
    adapters = adapter_scales(model) if config.needs_calibration else {}
    install(model, result, config.replace(calibration_adapters=adapters or None), report)
    return report


@torch.no_grad()
def measure_rollouts(
    transformer: nn.Module,
    rollouts: Iterable[Rollout],
    config: QARVDConfig = QARVDConfig(),  # noqa: B008 - it is frozen
    pass_info: ReadPass = by_timestep,
) -> SensitivityResult:
    """Measure chunk sensitivity (arXiv 2605.21072) on any pipeline, by whole rollouts with one chunk quantized.

    Every rollout runs once in float and once for every chunk, with quantization only in the passes of that chunk.
    Layers that read the prompt alone stay float. The transformer is float again afterwards.

    Args:
        transformer, rollouts, config, pass_info: see `quantize`; here the rollouts return what they generate: tensors,
            arrays or pictures, also inside an output class of diffusers, lists or tuples. Calibration weighs all
            chunks alike and rounds to nearest.

    Returns:
        The result; `chunk_weights` of it fits `QARVDConfig`. The error of a whole rollout stands for that of each of
        its chunks.

    Raises:
        ValueError: see `quantize`; or a rollout returns nothing, or something else when it is called again.
    """
    model = unwrapped(transformer)
    watch = Watch(model, tuple(rollouts), pass_info)
    config = config.replace(chunk_weights="uniform", rounding="nearest")
    targets, config, result, _ = _calibrated(model, watch, config)
    layers = quantized_layers(model, result)
    if not config.recipe.cached_in_chunk_0:
        layers = {name: layer for name, layer in layers.items() if name not in targets.prompt}
    chunks = range(watch.chunks)
    measured = {"model": type(model).__name__, "config": config.to_diff_dict(), "rollouts": len(watch.rollouts)}
    state = SensitivityResult(measured, len(watch.rollouts), (1,) * len(chunks))
    for index, expected in enumerate(_references(watch, watch.rollouts)):
        errors = []
        for chunk in chunks:
            errors.append(_error(watch, index, expected, model, layers, partial(_is_of, chunk)))
        state = state.with_prompt([[error] * len(chunks) for error in errors])
    return state


@torch.no_grad()
def choose_bits(
    transformer: nn.Module,
    rollouts: Iterable[Rollout],
    config: QARVDConfig,
    budget: float,
    pass_info: ReadPass = by_timestep,
) -> QARVDConfig:
    """Give 8 bits to the layers whose 4-bit weights cause the largest error per byte, on any pipeline.

    Every rollout runs once in float and once for every group of layers that read one tensor, with these quantized.

    Args:
        transformer, rollouts, config, pass_info: see `measure_rollouts`; the scheme has 4-bit weights.
        budget: share of the weights that may get 8 bits.

    Returns:
        The config with `module_bits`.

    Raises:
        ValueError: see `measure_rollouts`; another scheme, or a budget outside (0, 1].
    """
    require_four_bits(config, budget)
    model = unwrapped(transformer)
    watch = Watch(model, tuple(rollouts), pass_info)
    targets, config, result, _ = _calibrated(model, watch, config)
    layers, groups = quantized_layers(model, result), targets.measured
    errors = dict.fromkeys(groups, 0.0)
    for index, expected in enumerate(_references(watch, watch.rollouts)):
        for names in groups:
            some = {name: layers[name] for name in names}
            errors[names] += _error(watch, index, expected, model, some, lambda info: True)
    sizes = {names: sum(targets.linears[name].weight.numel() for name in names) for names in groups}
    chosen = most_costly(errors, sizes, budget * sum(sizes.values()))
    return config.replace(module_bits={name: 8 for names in chosen for name in names})


def _calibrated(
    model: nn.Module, watch: Watch, config: QARVDConfig, progress: Progress | None = None
) -> tuple[Targets, QARVDConfig, CalibrationResult, str]:
    """Calibrate on rollouts; returns the targets, the config that describes it, the result and why these weights."""
    processes = Processes.launched()
    targets, scouted = scout(model, config, partial(watch.run, rollouts=watch.rollouts[:1]))
    processes.require_same([targets.groups, watch.chunks], "what the first rollout does")
    config, why = with_chunk_weights(model, config.replace(calibration_chunks=watch.chunks))
    changes = {"chunk_weights": config.chunk_weights, "calibration_chunks": watch.chunks}
    share = partial(watch.run, rollouts=processes.share(watch.rollouts))
    scouted = scouted.replace(**changes)
    return targets, config, calibrate(model, watch.run, scouted, progress, None, processes, share, targets), why


def _is_of(chunk: int, info: PassInfo) -> bool:
    """Tell whether a pass takes part in a chunk."""
    return chunk == info.chunk or chunk in info.chunks


def _references(watch: Watch, rollouts: Sequence[Rollout]) -> Iterator[Tensor]:
    """Run every rollout in float, the first one twice.

    Raises:
        ValueError: it returns nothing, or something else the second time.
    """
    for index, rollout in enumerate(rollouts):
        expected = _generated(watch, index, rollout)
        if index == 0 and _mse(_generated(watch, index, rollout), expected) > 1e-6 * expected.square().mean():
            raise ValueError(
                "rollout 0 generated something else when it was called again, so that its error cannot be measured: "
                "make its generator inside the rollout, with a seed"
            )
        yield expected


def _error(
    watch: Watch,
    index: int,
    expected: Tensor,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    quantized: Callable[[PassInfo], bool],
) -> float:
    """Measure the mean squared error of a rollout with some layers quantized in some passes."""
    with QuantizationSwitch(model, layers) as switch:
        return _mse(
            _generated(watch, index, watch.rollouts[index], lambda info: switch.set(quantized(info))), expected
        )


def _generated(
    watch: Watch, index: int, rollout: Rollout, on_pass: Callable[[PassInfo], None] = lambda info: None
) -> Tensor:
    """Run a rollout and flatten all that it returns, float64 `[N]` on the CPU."""
    values = list(_arrays(watch.run(on_pass, [rollout])))
    if not values:
        raise ValueError(f"rollout {index} returns no tensor, array or picture: it has to return what it generates")
    return torch.cat(values)


def _arrays(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor | np.ndarray) or hasattr(value, "getpixel"):
        yield torch.as_tensor(np.array(value) if not isinstance(value, Tensor) else value).flatten().double().cpu()
    elif isinstance(value, Mapping):
        yield from _arrays(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _arrays(part)


def _mse(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise ValueError(f"a rollout generated {len(a)} values, before {len(b)}: it has to do the same every time")
    return (a - b).square().mean().item()
