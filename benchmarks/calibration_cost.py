"""Measure the cost of calibration at the shape of Wan 1.3B, on random weights: seconds, GPU and host memory.

    python benchmarks/calibration_cost.py --json runs/cost.json                              # extrapolated
    python benchmarks/calibration_cost.py --solve 1                                          # the same, shorter
    python benchmarks/calibration_cost.py --together --blocks 8 --capture-gib 1.5            # one process ...
    accelerate launch benchmarks/calibration_cost.py --together --blocks 8 --capture-gib 1.5  # ... and several
    python benchmarks/calibration_cost.py --toy --blocks 2                                   # seconds, on any machine

No checkpoint and no text encoder are needed, since costs depend on shapes alone. Two parts are measured and
extrapolated:

* Ranges, which are all of w8a8: every layer is watched over a few prompts, in two sets of rollouts, for the split of
  the channels and for the ranges. The time of rollouts is extrapolated to the default number of prompts.
* Rounding, for w4a8: a few blocks (`--blocks`) are watched together, and `--solve` of them are rounded. The time of
  rounding is extrapolated to all blocks, that of rollouts to all prompts and stages. A stage is as many blocks as fit
  the memory limit of rounding. If `--blocks` is a stage, as by default, peak memory is that of a whole calibration: it
  is highest while the first blocks are rounded.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import append_json_line
from recipes import plant_outliers

from qarvd_diffusers import ARVDPipeline, QARVDConfig
from qarvd_diffusers.bundled import bundled_prompts
from qarvd_diffusers.calibration import blocks
from qarvd_diffusers.calibration.calibrate import calibrate, quantize_weights
from qarvd_diffusers.calibration.pipeline import content_hash
from qarvd_diffusers.calibration.processes import Processes
from qarvd_diffusers.evaluation.fidelity import resident_peak
from qarvd_diffusers.models import CausalWanTransformer3DModel

FULL = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096}
TOY = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 96, "num_layers": 4, "text_dim": 24}
GIB = 2**30


class RandomPromptPipeline(ARVDPipeline):
    """Draw prompt embeddings from a random generator seeded by the prompt."""

    def encode_prompt(self, prompt: str | None = None, **kwargs: Any) -> torch.Tensor:
        """Draw the embeddings of a prompt."""
        if prompt is None:
            return super().encode_prompt(prompt, **kwargs)
        generator = torch.Generator().manual_seed(len(prompt))
        size = (1, self.config.max_sequence_length, self.transformer.config.text_dim)
        return torch.randn(size, generator=generator).to(self.transformer.device, self.transformer.dtype)

    def check_stream_inputs(self, prompt: str | None = None, **kwargs: Any) -> Any:
        """Check the inputs with the drawn embeddings."""
        if prompt is None:
            return super().check_stream_inputs(prompt=None, **kwargs)
        return super().check_stream_inputs(prompt=None, **{**kwargs, "prompt_embeds": self.encode_prompt(prompt)})


def build(toy: bool, device: str) -> RandomPromptPipeline:
    """Build a pipeline of random weights on the device, with outlier channels for o and cross-attention q."""
    torch.manual_seed(0)
    with torch.device(device):
        transformer = CausalWanTransformer3DModel(**(TOY if toy else FULL)).eval().requires_grad_(False)
    if device != "cpu":
        for name, parameter in transformer.named_parameters():
            if not any(kept in name for kept in transformer._keep_in_fp32_modules):
                parameter.data = parameter.data.to(torch.bfloat16)
    plant_outliers(transformer, 8.0)
    size = {"height": 64, "width": 96} if toy else {"height": 480, "width": 832}
    pipe = RandomPromptPipeline(transformer, max_sequence_length=512, **size)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Enough(Exception):
    """Stop a calibration: enough groups of layers are rounded."""


class Stopwatch:
    """Measure seconds between marks, with the GPU synchronized."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def mark(self) -> float:
        """Return the seconds since the last mark."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed


def timed_calibration(
    pipe: RandomPromptPipeline, config: QARVDConfig, prompts: list[str], processes: Processes, solve: float = math.inf
) -> dict[str, Any]:
    """Time every set of rollouts and the work in between, until `solve` groups are rounded; measure the GPU's peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    watch, rollouts, rest = Stopwatch(), [], []
    start = time.perf_counter()

    def runner(chosen: list[str]) -> Callable:
        def run(on_pass: Callable) -> None:
            rest.append(watch.mark())
            for prompt in chosen:
                generator, embeds = torch.Generator().manual_seed(0), pipe.encode_prompt(prompt)
                for _ in pipe.stream(
                    prompt_embeds=embeds,
                    num_chunks=config.calibration_chunks,
                    generator=generator,
                    output_type="latent",
                    on_pass=on_pass,
                ):
                    pass
            rollouts.append(watch.mark())

        return run

    run, run_share = runner(prompts), runner(processes.share(prompts))
    solved = itertools.count(1)

    def progress(text: str, step: int, steps: int) -> None:
        if text.startswith("rounding") and step == steps and next(solved) >= solve:
            raise Enough

    result = None
    with contextlib.suppress(Enough):
        result = calibrate(pipe.transformer, run, config, progress=progress, processes=processes, run_share=run_share)
    rest.append(watch.mark())
    print(f"{config.scheme}: rollouts {rollouts}, rest {rest}", file=sys.stderr, flush=True)
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {
        "rollouts": rollouts,
        "rest": rest,
        "seconds": time.perf_counter() - start,
        "gpu_bytes": gpu,
        "result": result,
    }


def only_blocks(pipe: RandomPromptPipeline, count: int) -> tuple[str, ...]:
    """Name the modules to leave out, so that only the first `count` blocks are calibrated."""
    return (*(f"blocks.{i}" for i in range(count, len(pipe.transformer.blocks))), "text_embedder")


def extrapolated(pipe: RandomPromptPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a part of the calibrations of w8a8 and w4a8, and extrapolate to the whole."""
    prompts = [f"{'x' * i}" for i in range(1, args.prompts + 1)]
    all_prompts, all_blocks = len(bundled_prompts()), len(pipe.transformer.blocks)
    common = {"calibration_chunks": args.chunks}
    ranges = timed_calibration(pipe, QARVDConfig("w8a8", **common), prompts, Processes())
    part = QARVDConfig("w4a8", modules_to_not_convert=only_blocks(pipe, args.blocks), **common)
    solve = min(args.solve or args.blocks, args.blocks)
    rounding = timed_calibration(pipe, part, prompts, Processes(), solve * len(inputs_of_block(pipe)))
    watch = Stopwatch()
    content_hash(pipe, part, [])
    hashing = watch.mark()

    per_prompt = {
        "split": ranges["rollouts"][0] / len(prompts),
        "ranges": ranges["rollouts"][1] / len(prompts),
        "rounding": rounding["rollouts"][1] / len(prompts),
    }
    solving = rounding["rest"][2] / solve
    per_block = sum(4 * k * k for k in inputs_of_block(pipe))
    per_stage = max(1, blocks.CAPTURE_BYTES // per_block)
    stages = -(-all_blocks // per_stage) + 1  # the text embedding comes first
    without_split = hashing + sum(ranges["rest"]) + all_prompts * per_prompt["ranges"]
    w8a8 = without_split + all_prompts * per_prompt["split"]
    w4a8 = without_split + stages * all_prompts * per_prompt["rounding"] + all_blocks * solving
    return {
        "measured": {"prompts": len(prompts), "blocks": args.blocks, "solved": solve, "blocks_per_stage": per_stage},
        "seconds_hashing": hashing,
        "seconds_ranges_rollouts": ranges["rollouts"],
        "seconds_ranges_rest": ranges["rest"],
        "seconds_rounding_rollouts": rounding["rollouts"],
        "seconds_rounding_rest": rounding["rest"],
        "gpu_gib_ranges": gib(ranges["gpu_bytes"]),
        "gpu_gib_rounding": gib(rounding["gpu_bytes"]),
        "host_gib": gib(resident_peak()),
        "w8a8_seconds": w8a8,
        "w8a8_is": f"{hashing:.1f} + {sum(ranges['rest']):.1f} + {all_prompts} prompts * ({per_prompt['split']:.1f} + "
        f"{per_prompt['ranges']:.1f})",
        "w4a8_seconds": w4a8,
        "w4a8_is": f"{without_split:.1f} + {stages} stages * {all_prompts} prompts * {per_prompt['rounding']:.1f} + "
        f"{all_blocks} blocks * {solving:.2f}",
    }


def inputs_of_block(pipe: RandomPromptPipeline) -> list[int]:
    """List the channels of the seven inputs of a block's layers."""
    config = pipe.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    return [width] * 6 + [config.ffn_dim]


def together(pipe: RandomPromptPipeline, args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Time the same work for any number of processes: rounding of some blocks, then sensitivity."""
    prompts = [f"{'x' * i}" for i in range(1, args.prompts + 1)]
    config = QARVDConfig("w4a8", calibration_chunks=args.chunks, modules_to_not_convert=only_blocks(pipe, args.blocks))
    timed = timed_calibration(pipe, config, prompts, processes)
    codes = [layer.weight_packed.to(torch.int64).sum() for layer in timed["result"].layers.values()]
    public = config.replace(scheme="w4a16", rounding="nearest", calibration_chunks=args.sensitivity_chunks)
    nearest = quantize_weights(pipe.transformer, public)
    watch = Stopwatch()
    measured = pipe.measure_sensitivity(public, prompts, result=nearest)
    return {
        "processes": processes.count,
        "calibration_seconds": timed["seconds"],
        "rollouts": timed["rollouts"],
        "rest": timed["rest"],
        "sum_of_codes": int(sum(codes)),
        "gpu_gib": gib(timed["gpu_bytes"]),
        "sensitivity_seconds": watch.mark(),
        "sensitivity": measured.sensitivity,
    }


def gib(count: int | None) -> float | None:
    """Convert bytes to GiB."""
    return None if count is None else count / GIB


def main() -> None:
    """Measure, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a tiny shape, to try the script")
    parser.add_argument("--prompts", type=int, default=1, help="prompts to measure with (default: 1)")
    parser.add_argument("--blocks", type=int, default=11, help="blocks that are watched together (default: 11)")
    parser.add_argument("--solve", type=int, help="stop after this many of them are rounded (default: all)")
    parser.add_argument("--chunks", type=int, default=7)
    parser.add_argument("--sensitivity-chunks", type=int, default=3)
    parser.add_argument("--capture-gib", type=float, help="memory limit of rounding's statistics, per process")
    parser.add_argument("--together", action="store_true", help="time the same work for any number of processes")
    parser.add_argument("--json", type=Path, help="file to append the figures to")
    args = parser.parse_args()
    if args.capture_gib:
        blocks.CAPTURE_BYTES = int(args.capture_gib * GIB)
    processes = Processes.launched()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = build(args.toy, device)
    for _ in pipe.stream(prompt_embeds=pipe.encode_prompt(""), num_chunks=1, output_type="latent"):
        pass  # first calls load libraries
    report = together(pipe, args, processes) if args.together else extrapolated(pipe, args)
    report["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    processes.close()
    if processes.is_main:
        print(json.dumps(report, indent=1))
        if args.json:
            append_json_line(report, args.json)


if __name__ == "__main__":
    main()
