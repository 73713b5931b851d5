"""Calibrate a float transformer: capture inputs, compute integer weights and scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import QARVDConfig, QuantizedModule
from ..quantization.install import apply, dequantize, quantized_layers  # noqa: F401  (imported from here until 0.3)
from ..quantization.model import unwrapped
from ..quantization.packing import pack
from ..quantization.qparams import LinearQParams
from ..quantization.result import CalibrationResult, config_hash
from ..rollout.pass_info import PassInfo
from .blocks import round_blocks, stages_of
from .capture import InputCapture, pass_weight
from .groups import LayerGroup
from .inputs import InputQuantizer, TokenQuantizer
from .observers import OBSERVERS
from .outliers import OutlierSet
from .processes import SINGLE_PROCESS, Processes
from .resume import ResumeFolder
from .rounding import ROUNDINGS
from .splits import input_extents, split_inputs, stored_split
from .targets import Targets, describe, rotations_of, select, skips_rounding
from .targets import quantizable_linears as quantizable_linears
from .weights import quantize_weight

# Called with what is being done, how many steps of it are done, and how many there are.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Work:
    """Count what a calibration has to do in this process, before it begins.

    Attributes:
        shared_runs: sets of rollouts that the processes share.
        whole_runs: sets of rollouts that this process makes alone.
        layers: weights that are quantized to nearest.
        rounding: steps of the rounding from data.
    """

    shared_runs: int = 0
    whole_runs: int = 0
    layers: int = 0
    rounding: int = 0


def plan_work(
    transformer: nn.Module,
    config: QARVDConfig,
    folder: ResumeFolder | None = None,
    processes: Processes = SINGLE_PROCESS,
    targets: Targets | None = None,
) -> Work:
    """Count what `calibrate` will do with the same arguments; what the folder holds is not done again.

    Raises:
        ValueError: there is no layer to quantize.
    """
    targets = targets or select(transformer, config)
    linears, groups = targets.linears, targets.measured
    if not config.needs_calibration:
        return Work(layers=len(linears))
    held = [part for part in ("ranges", *(names[0] for names in groups)) if folder is not None and folder.holds(part)]
    finished = set(processes.from_main(held))
    work = Work()
    if "ranges" not in finished:
        runs = _reads_extents(config) + config.resolved_scheme.needs_calibration
        work = Work(shared_runs=runs, layers=len(linears))
    if config.resolved_rounding == "nearest":
        return work
    channels = {names[0]: linears[names[0]].in_features for names in groups if not skips_rounding(names[0], config)}
    shares = [stage.own for stage in stages_of(channels, config, finished, processes) if stage.own]
    steps = ROUNDINGS[config.resolved_rounding].steps(config) * sum(map(len, shares))
    return dataclasses.replace(work, whole_runs=len(shares), rounding=steps)


def calibrate(
    transformer: nn.Module,
    run: Callable[[Callable[[PassInfo], None]], object],
    config: QARVDConfig,
    progress: Progress | None = None,
    folder: ResumeFolder | None = None,
    processes: Processes = SINGLE_PROCESS,
    run_share: Callable[[Callable[[PassInfo], None]], object] | None = None,
    targets: Targets | None = None,
) -> CalibrationResult:
    """Find outlier channels, ranges and integer weights of a transformer (arXiv 2605.21072), which does not change.

    Outlier channels come first: from the weights and, for the detector `input`, a set of rollouts. Then the ranges: of
    the weights from the weights, of the activations from another set of rollouts. Then the integer weights: unless
    they are rounded to nearest, block by block, with another set of rollouts every few blocks.

    Args:
        transformer: float model.
        run: performs all calibration rollouts on it, calling its argument right before every transformer pass. Not
            called for schemes that need no data.
        config: what to calibrate for; `config.sensitivity` weighs the chunks.
        progress: called for every layer whose weights are quantized, and for every step of rounding.
        folder: keeps finished parts; a calibration continues from those it holds, to the same result.
        processes: that call this together, with the same model and config; all get the result.
        run_share: as `run`, for this process's share of the rollouts: ranges are searched in shares, whereas in
            rounding every process runs all rollouts and observes its own layers. Required with more than one process.
        targets: what is quantized; None selects it by the structure of the model.

    Returns:
        The result; `apply` puts it into the model.

    Raises:
        ValueError: no layer to quantize, NaN or infinity in a weight or an activation, a chunk that was never reached,
            or a layer that never ran; the message names it.
    """
    transformer = unwrapped(transformer)
    if not config.needs_calibration:
        return quantize_weights(transformer, config, progress, targets)
    targets = targets or select(transformer, config)
    linears, groups = targets.linears, targets.groups
    layers = processes.from_main(folder.load("ranges", linears) if folder is not None and processes.is_main else None)
    if layers is not None:
        outliers = [stored_split(layers[names[0]]) for names in groups]
    else:
        extents = None
        if _reads_extents(config):
            extents = input_extents(targets, run_share or run, config, processes)
        by_weights, rotations = targets.words | targets.dynamic, _rotations(targets, config)
        outliers = split_inputs(transformer, linears, groups, config, extents, by_weights, rotations)
        layers = _quantize_weights(targets, outliers, config, progress)
        if config.resolved_scheme.needs_calibration:
            layers = _observe_inputs(targets, outliers, layers, run_share or run, config, processes)
        if folder is not None and processes.is_main:
            folder.save("ranges", layers)
    if config.resolved_rounding != "nearest":
        rounded = [
            _layer_group(names, targets, split, layers)
            for names, split in zip(targets.measured, outliers, strict=False)
            if not skips_rounding(names[0], config)
        ]
        layers = round_blocks(transformer, rounded, layers, run, config, folder, progress, processes)
    return CalibrationResult(layers, config_hash(config))


def _reads_extents(config: QARVDConfig) -> bool:
    """Tell whether outlier channels are found by a set of rollouts."""
    by_token = config.recipe.token_scales and config.resolved_scheme.needs_calibration
    return config.resolved_outlier_detector == "input" or by_token


def _described(targets: Targets, config: QARVDConfig) -> dict[str, QuantizedModule]:
    return describe(targets.linears, targets.groups, config, targets.dynamic)


def _static_groups(targets: Targets, config: QARVDConfig) -> list[tuple[str, ...]]:
    """Return the groups whose inputs have calibrated ranges."""
    described = _described(targets, config)
    return [names for names in targets.measured if described[names[0]].activation == "static"]


def _rotations(targets: Targets, config: QARVDConfig) -> dict[str, int]:
    """Return the layers whose inputs have a scale per token, and the blocks of channels that are rotated."""
    return rotations_of(_described(targets, config))


def _observe_inputs(
    targets: Targets,
    outliers: Sequence[OutlierSet],
    layers: Mapping[str, LinearQParams],
    run: Callable[[Callable[[PassInfo], None]], object],
    config: QARVDConfig,
    processes: Processes,
) -> dict[str, LinearQParams]:
    """Observe one set of rollouts and add a static input quantizer to every layer."""
    linears, groups = targets.linears, _static_groups(targets, config)
    splits = dict(zip(targets.groups, outliers, strict=True))
    observers = [OBSERVERS[config.recipe.observer](splits[names]) for names in groups]
    weigh = pass_weight(config)
    observed_weights = _rounded_weights(linears, layers) if config.recipe.observe_rounded else nullcontext()

    def observe(group: int, x: Tensor, info: PassInfo) -> None:
        observers[group].add(x, weigh(info))

    with torch.no_grad(), observed_weights, InputCapture(linears, groups, observe, not targets.observed) as capture:
        run(capture.on_pass)
    if capture.ran or processes.count == 1:  # of many processes some may have had no prompt
        capture.check(range(config.calibration_chunks))
    observed = dict(layers)
    for group, observer in zip(groups, observers, strict=True):
        observer.join(processes)
        scale, zero_point = observer.quantizer(config.resolved_input_percentiles)
        for name in group:
            observed[name] = dataclasses.replace(observed[name], input_scale=scale, input_zero_point=zero_point)
    return observed


def _layer_group(
    names: Sequence[str], targets: Targets, outliers: OutlierSet, layers: Mapping[str, LinearQParams]
) -> LayerGroup:
    """Build the group of some layers, with the input quantizer that was observed for them."""
    first = layers[names[0]]
    quantizer: InputQuantizer | TokenQuantizer | None = None
    if first.description.activation == "token":
        quantizer = TokenQuantizer()
    elif first.input_scale is not None:
        quantizer = InputQuantizer(first.input_scale, first.input_zero_point, outliers.num_outliers)
    return LayerGroup({name: targets.linears[name] for name in names}, outliers, quantizer, not targets.observed)


def quantize_weights(
    transformer: nn.Module,
    config: QARVDConfig,
    progress: Progress | None = None,
    targets: Targets | None = None,
) -> CalibrationResult:
    """Quantize without data: round to nearest, whatever `config.rounding` says.

    Raises:
        ValueError: the scheme has static activations, there is no layer to quantize, or a weight is not finite.
    """
    if config.resolved_scheme.needs_calibration:
        raise ValueError(f"scheme {config.scheme} needs calibration data: call calibrate, or use w8a8_dynamic")
    targets = targets or select(transformer, config)
    outliers = split_inputs(
        transformer, targets.linears, targets.groups, config, rotations=_rotations(targets, config)
    )
    packed = _quantize_weights(targets, outliers, config, progress)
    return CalibrationResult(packed, config_hash(config))


def _quantize_weights(
    targets: Targets,
    outliers: Sequence[OutlierSet],
    config: QARVDConfig,
    progress: Progress | None,
) -> dict[str, LinearQParams]:
    """Compute integer weights of every layer, on the CPU and in module order, without input quantizers."""
    linears, described = targets.linears, _described(targets, config)
    splits = {name: outlier_set for group, outlier_set in zip(targets.groups, outliers, strict=True) for name in group}
    layers: dict[str, LinearQParams] = {}
    for name, linear in linears.items():
        description = dataclasses.replace(described[name], num_outliers=splits[name].num_outliers)
        codes, grid = quantize_weight(linear.weight, splits[name], config, name, description.group)
        tensors = (pack(codes, grid.bits), grid.scale, grid.stored_zero_point, splits[name].channel_order)
        scale = splits[name].channel_scale
        stored = (
            *(tensor.cpu() for tensor in tensors),
            None,
            None,
            description,
            None if scale is None else scale.cpu(),
        )
        layers[name] = LinearQParams(*stored)
        if progress is not None:
            progress("quantizing weights", len(layers), len(linears))
    return layers


@contextmanager
def _rounded_weights(linears: Mapping[str, nn.Linear], packed: Mapping[str, LinearQParams]) -> Iterator[None]:
    """Give the float layers the values of their integer weights until the `with` ends."""
    kept = {name: linear.weight.data for name, linear in linears.items()}
    try:
        for name, linear in linears.items():
            linear.weight.data = packed[name].weight(linear.weight.dtype).to(linear.weight.device)
        yield
    finally:
        for name, linear in linears.items():
            linear.weight.data = kept[name]
