"""Choose which layers of a 4-bit scheme get 8 bits, within a budget of bytes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import QARVDConfig
from ..files.atomic import write_json
from ..files.cache import cache_folder, can_keep_results
from ..files.schema import check_value, read_json
from ..quantization.install import quantized_layers
from .measure_sensitivity import SEED, describe_measurement
from .pipeline import calibrate_pipeline, calibration_prompts, pipeline_targets, progress_on_device
from .processes import Processes
from .report import with_chunk_weights
from .switch import QuantizationSwitch
from .targets import quantizable_linears

if TYPE_CHECKING:
    from ..rollout.host import PipelineHost
    from .calibrate import Progress

logger = logging.getLogger(__name__)

PROMPTS = 4  # calibration prompts that errors are measured on, by default


def choose_bits(
    pipe: PipelineHost,
    config: QARVDConfig,
    budget: float,
    prompts: Sequence[str] | None = None,
    num_chunks: int = 1,
    seed: int = SEED,
    progress: Progress | None = None,
) -> QARVDConfig:
    """Give 8 bits to the layers whose 4-bit weights cause the largest error per byte, within a budget of bytes.

    Args:
        pipe: a float pipeline; it is float again afterwards.
        config: a scheme of 4-bit weights; calibrated for first.
        budget: bytes of codes that may be added, as a share of those there are: the share of all weights that gets 8
            bits.
        prompts: to measure on; None takes the first of the calibration prompts.
        num_chunks, seed, progress: see `layer_errors`.

    Returns:
        The config with `module_bits`.

    Raises:
        ValueError: another scheme, a config that has `module_bits` already, or a budget outside (0, 1].
    """
    require_four_bits(config, budget)
    prompts = tuple(prompts or calibration_prompts(pipe, config)[:PROMPTS])
    errors = layer_errors(pipe, config, prompts, num_chunks, seed, progress)
    linears = quantizable_linears(pipe.transformer, config)
    sizes = {group: sum(linears[name].weight.numel() for name in group) for group in errors}
    chosen = most_costly(errors, sizes, budget * sum(sizes.values()))
    return config.replace(module_bits={name: 8 for group in chosen for name in group})


def require_four_bits(config: QARVDConfig, budget: float) -> None:
    """Check that bits can be chosen.

    Raises:
        ValueError: another scheme, a config that has `module_bits` already, or a budget outside (0, 1].
    """
    if config.resolved_scheme.weight_bits != 4 or config.module_bits:
        raise ValueError(
            f"choosing bits starts from 4-bit weights in all layers, got scheme {config.scheme} with module_bits "
            f"{config.module_bits}: use w4a8 or w4a16 without module_bits"
        )
    if not 0 < budget <= 1:
        raise ValueError(f"budget is {budget}, expected a share of the weights in (0, 1]")


def layer_errors(
    pipe: PipelineHost,
    config: QARVDConfig,
    prompts: Sequence[str],
    num_chunks: int = 1,
    seed: int = SEED,
    progress: Progress | None = None,
) -> dict[tuple[str, ...], float]:
    """Measure the mean squared latent error, weighted by chunk, of rollouts with one group of layers quantized.

    One rollout per prompt and group of layers that read one tensor, and one of the float model. Every error is kept in
    `cache_folder()` as soon as it is known: an interrupted measurement continues where it stopped, and nothing is
    measured twice.

    Args:
        pipe: a float pipeline; it is float again afterwards.
        config: what the layers are calibrated for.
        prompts: one rollout of every kind each.
        num_chunks: chunks per rollout. The first chunk alone ranks layers much as all do (its errors go on into the
            others), at a fraction of the time.
        seed: prompt `i` draws all its noise from `seed + i`.
        progress: called with the current work, the steps done and the number of steps.

    Returns:
        By the names of the layers of a group.

    Raises:
        ValueError: the pipeline is quantized.
    """
    config, _ = with_chunk_weights(pipe.transformer, config)
    targets, _ = pipeline_targets(pipe, config, pipe.encode_prompt(prompts[0]))
    groups = targets.measured
    layers = quantized_layers(pipe.transformer, calibrate_pipeline(pipe, config, progress=progress))
    weights = torch.tensor(config.sensitivity(num_chunks), dtype=torch.float64)
    processes = Processes.launched()
    path = _errors_file(describe_measurement(pipe, config, prompts, num_chunks, seed, None))
    keep = processes.is_main and can_keep_results()
    measured = processes.from_main(_read_errors(path) if processes.is_main else None)
    errors = {group: measured.setdefault(" ".join(group), []) for group in groups}  # of each prompt so far
    remaining = [[group for group in groups if len(errors[group]) <= index] for index in range(len(prompts))]
    rollouts = sum(len(some) + 1 for some in remaining if some)
    with progress_on_device(pipe, "measuring layers", "rollout", rollouts, progress) as step:

        def roll_out(prompt: str, seed: int) -> list[Tensor]:
            """Generate the latents of every chunk, float64 on the CPU."""
            generator = torch.Generator("cpu").manual_seed(seed)
            chunks = pipe.stream(prompt, num_chunks=num_chunks, generator=generator, output_type="latent")
            latents = [chunk.latents.double().cpu() for chunk in chunks]
            step()
            return latents

        for index, (prompt, some) in enumerate(zip(prompts, remaining, strict=True)):
            expected = roll_out(prompt, seed + index) if some else []
            for group in some:
                with QuantizationSwitch(pipe.transformer, {name: layers[name] for name in group}) as switch:
                    switch.set(True)
                    got = roll_out(prompt, seed + index)
                per_chunk = torch.stack([(a - b).square().mean() for a, b in zip(expected, got, strict=True)])
                errors[group].append((weights * per_chunk).mean().item())
                if keep:
                    write_json(measured, path)
    return {group: sum(per_prompt) / len(prompts) for group, per_prompt in errors.items()}


def _errors_file(measured: Mapping[str, object]) -> Path:
    """Return the cache file of a measurement."""
    digest = hashlib.blake2b(json.dumps(measured, sort_keys=True).encode(), digest_size=20)
    return cache_folder() / "layer_errors" / f"{digest.hexdigest()}.json"


def _read_errors(path: Path) -> dict[str, list[float]]:
    """Read one error per prompt, by the names of the layers of a group; empty without a file that can be read."""
    try:
        return check_value(read_json(path), dict[str, list[float]], path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        logger.warning("Layer errors measured before are not used: %s", error)
        return {}


def most_costly(
    errors: Mapping[tuple[str, ...], float], sizes: Mapping[tuple[str, ...], int], budget: float
) -> list[tuple[str, ...]]:
    """Choose keys by error per size, largest first, each if it still fits the budget."""
    chosen = []
    for key in sorted(errors, key=lambda key: errors[key] / sizes[key], reverse=True):
        if sizes[key] <= budget:
            chosen.append(key)
            budget -= sizes[key]
    return chosen
