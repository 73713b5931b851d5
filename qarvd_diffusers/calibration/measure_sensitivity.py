"""Measure chunk sensitivity: one float rollout per prompt, and a branch of it for every chunk."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import QARVDConfig
from ..files.hashing import hash_tensors
from ..quantization.install import quantized_layers
from ..quantization.result import CalibrationResult
from ..rollout.chunk_loop import ChunkLoop
from .pipeline import (
    NO_INPUTS,
    calibrate_pipeline,
    calibration_prompts,
    content_hash,
    default_tensors,
    pipeline_targets,
    progress_on_device,
    require_float,
)
from .processes import Processes
from .sensitivity import SensitivityResult
from .switch import QuantizationSwitch

if TYPE_CHECKING:
    from ..rollout.host import PipelineHost

SEED = 20_000  # away from the seeds of calibration: the noise is not the one the ranges were chosen on


def measure_sensitivity(
    pipe: PipelineHost,
    config: QARVDConfig,
    prompts: Sequence[str],
    *,
    num_chunks: int | None = None,
    seed: int = SEED,
    result: CalibrationResult | None = None,
    path: str | os.PathLike[str] | None = None,
) -> SensitivityResult:
    """Measure how much the error of the whole video grows when one chunk is generated quantized (arXiv 2605.21072).

    `s_k = mean((latents_k - latents_float)^2)` over all final latents and prompts, where in `latents_k` the passes of
    chunk `k` (denoising and refresh) are quantized and all others are float. Chunks before `k` equal the float run, so
    each of these rollouts branches off it at chunk `k` with a copy of the K/V cache: `C + C (C + 1) / 2` generated
    chunks per prompt instead of `C + C^2`, with the same bits on the CPU. Two caches are alive at a time.

    Layers that read the prompt alone stay float: their output is cached once for all chunks. With
    `reference_compat` they are quantized in the passes of chunk 0 and so act in every chunk of that rollout, as in the
    reference implementation, which inflates `s_0`.

    Args:
        pipe: a float pipeline; it is float again afterwards.
        config: scheme and calibration of the quantized passes. Calibration weighs all chunks alike and rounds to
            nearest here, whatever `chunk_weights` and `rounding` say: their sensitivity is what rounding will need.
        prompts: at least one; not all the same.
        num_chunks: chunks per rollout; None takes `config.calibration_chunks`.
        seed: prompt `i` draws all its noise from `seed + i`.
        result: what `calibrate(config)` returned; None calibrates now.
        path: JSON file that is rewritten after every prompt (under `accelerate launch`: after every prompt of each
            process, which share them and all get the result). If it exists the measurement continues where it
            stopped, with the same outcome as without the interruption.

    Returns:
        The result; `chunk_weights` of it fits `QARVDConfig`.

    Raises:
        ValueError: prompts that are empty or all the same, a quantized pipeline, a chunk that was never reached, or a
            `path` with the measurement of something else.
        FloatingPointError: NaN or infinity; prompt, quantized chunk, chunk and step are named.
        RuntimeError: another process of a launch ended.
    """
    require_float(pipe)
    prompts = _check_prompts(prompts)
    config = config.replace(chunk_weights="uniform", rounding="nearest")
    num_chunks = num_chunks or config.calibration_chunks
    processes = Processes.launched()
    measured = describe_measurement(pipe, config, prompts, num_chunks, seed, result)
    processes.require_same(measured, "model, config, prompts or settings")
    frames = tuple(count for _, _, count in pipe.rollout_config.chunks(num_chunks))
    state = SensitivityResult(measured, len(prompts), frames)
    if processes.is_main and path is not None and Path(path).exists():
        state = SensitivityResult.load(path, partial=True)
        state.require_same_measurement(measured, path)
    state = processes.from_main(state)
    if state.complete:
        return state
    result = result or calibrate_pipeline(pipe, config)
    remaining = range(len(state.errors), len(prompts))
    per_prompt = num_chunks + num_chunks * (num_chunks + 1) // 2
    rounds = [remaining[start : start + processes.count] for start in range(0, len(remaining), processes.count)]
    with progress_on_device(pipe, "measuring sensitivity", "chunk", len(rounds) * per_prompt) as step:
        layers = quantized_layers(pipe.transformer, result)
        if not config.recipe.cached_in_chunk_0:
            targets, _ = pipeline_targets(pipe, config, pipe.encode_prompt(prompts[0]))
            layers = {name: layer for name, layer in layers.items() if name not in targets.prompt}
        try:
            with QuantizationSwitch(pipe.transformer, layers) as switch:
                for indices in rounds:
                    measured_here = []
                    for index in indices[processes.index : processes.index + 1]:  # one, or none
                        loop = _loop(pipe, prompts[index], num_chunks, seed + index)
                        with _naming(f"prompt {index}"):
                            measured_here.append(chunk_errors(loop, num_chunks, switch, step))
                    for errors in itertools.chain.from_iterable(processes.gather(measured_here)):
                        state = state.with_prompt(errors)
                    if processes.is_main and path is not None:
                        state.save(path)
        finally:
            pipe.maybe_free_model_hooks()
    return state


def chunk_errors(
    loop: ChunkLoop, num_chunks: int, switch: QuantizationSwitch, step: Callable[[], Any] = lambda: None
) -> list[list[float]]:
    """Measure the mean squared latent errors of one rollout, `[k][c]`: of chunk `c` with only chunk `k` quantized.

    Args:
        loop: at its start, with all noise drawn.
        num_chunks: chunks to generate.
        switch: turns quantization on and off.
        step: called after every generated chunk.

    Raises:
        ValueError: a rollout ended before the last chunk.
        FloatingPointError: NaN or infinity; the quantized chunk, chunk and step are named.
    """
    reference: list[Tensor] = []
    branches: list[list[Tensor]] = []
    rollout = loop.run()
    for k in range(num_chunks):
        branch = loop.branch()
        branch.on_pass = lambda info, k=k: switch.set(info.chunk == k)
        with _naming(f"with chunk {k} quantized"):
            branches.append(_collect(branch.run(), num_chunks - k, k, step))
        switch.set(False)
        reference += _collect(rollout, 1, k, step)
    return [
        [0.0] * k + [_mse(a, b) for a, b in zip(branch, reference[k:], strict=True)]
        for k, branch in enumerate(branches)
    ]


def _collect(rollout: Iterator[tuple[int, Tensor]], count: int, first: int, step: Callable[[], Any]) -> list[Tensor]:
    """Collect the next `count` chunks of a rollout, on the CPU."""
    chunks = []
    for chunk in range(first, first + count):
        try:
            _, latents = next(rollout)
        except StopIteration:
            raise ValueError(f"chunk {chunk} was never reached: the rollout ended before it") from None
        chunks.append(latents.cpu())
        step()
    return chunks


def _mse(a: Tensor, b: Tensor) -> float:
    """Compute the mean squared error, in float64."""
    return (a.double() - b.double()).square().mean().item()


def _loop(pipe: PipelineHost, prompt: str, num_chunks: int, seed: int) -> ChunkLoop:
    """Make the chunk loop of one rollout, with all noise drawn."""
    inputs = pipe.stream_inputs(
        **{
            **dict.fromkeys(("prompt_embeds", *NO_INPUTS)),
            **pipe.stream_defaults,
            "prompt": prompt,
            "generator": torch.Generator("cpu").manual_seed(seed),
        },
        num_chunks=num_chunks,
        output_type="latent",
    )
    inputs = inputs.with_drawn_noise(torch.device("cpu"), torch.float32)
    return pipe.make_loop(inputs, prompt=prompt)


def _check_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """Check that there are prompts, and that they differ."""
    if isinstance(prompts, str) or not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"prompts is {prompts!r}, expected at least one non-empty prompt, one string each")
    if len(prompts) > 1 and len(set(prompts)) == 1:
        raise ValueError(
            f"all {len(prompts)} prompts are the same ({prompts[0]!r}): their mean would pretend to be more than one "
            "measurement. Give different prompts, or this one once."
        )
    return tuple(prompts)


def describe_measurement(
    pipe: PipelineHost,
    config: QARVDConfig,
    prompts: Sequence[str],
    num_chunks: int,
    seed: int,
    result: CalibrationResult | None,
) -> dict[str, Any]:
    """Describe all that the errors depend on, as JSON values; prompts (they may be private) and tensors as hashes."""
    public = config.replace(calibration_prompts=None, modules=None, text_encoder=None, base_model=None)
    if result is not None:
        tensors = ((f"{name}.{key}", t) for name, layer in result.layers.items() for key, t in layer.tensors().items())
        calibration = _digest(sorted(result.layers), tensors)
    elif config.resolved_scheme.needs_calibration:
        calibration = _digest(calibration_prompts(pipe, config))
    else:
        calibration = None
    with torch.no_grad():
        embedding = pipe.encode_prompt(prompts[0])  # stands for tokenizer and text encoder
    start = default_tensors(pipe, embedding, num_chunks) if pipe.stream_defaults else ()
    return {
        "model": content_hash(pipe, QARVDConfig(), []),
        "config": public.to_diff_dict(),
        "calibration": calibration,
        "prompts": _digest(prompts, [("first", embedding), *start]),
        "num_chunks": num_chunks,
        "seed": seed,
    }


def _digest(texts: Sequence[str], tensors: Any = ()) -> str:
    """Hash texts and tensors."""
    digest = hashlib.blake2b(json.dumps(list(texts)).encode(), digest_size=20)
    hash_tensors(digest, tensors)
    return digest.hexdigest()


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Prefix errors with where in the measurement a rollout failed."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{where}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
