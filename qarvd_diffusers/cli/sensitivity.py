"""Measure how much each chunk's quantization costs the whole video; an interrupted run goes on where it stopped.

Under `accelerate launch -m qarvd_diffusers sensitivity ...` the prompts are shared between the processes.
"""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_device_arguments, load_pipeline, read_prompts, seed, table, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..config import SCHEMES

    parser.add_argument(
        "model", help="float model folder or Hub id; `bundled` names the model that ships with the package"
    )
    parser.add_argument("--scheme", choices=tuple(SCHEMES), default="w4a8", help="(default: w4a8)")
    parser.add_argument("--prompts", metavar="FILE", required=True, help="prompts to measure on, one per line")
    parser.add_argument("--out", metavar="JSON", required=True, help="file to write, after every prompt")
    parser.add_argument("--plot", metavar="PNG", help="draw sensitivity and fitted decay (needs matplotlib)")
    parser.add_argument("--calibration-prompts", metavar="FILE", help="calibration prompts (default: bundled ones)")
    parser.add_argument("--chunks", type=whole(1), default=7, help="chunks per rollout (default: 7)")
    parser.add_argument(
        "--seed", type=seed, help="seed of the measured noise (default: one that calibration never uses)"
    )
    parser.add_argument("--reference-compat", action="store_true", help="reproduce the public reference recipe")
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    from ..calibration.measure_sensitivity import SEED, measure_sensitivity
    from ..calibration.processes import Processes
    from ..config import QARVDConfig
    from ..evaluation.plots import plot_sensitivity, require_matplotlib

    if args.plot:
        require_matplotlib()
    prompts = read_prompts(args.prompts)
    config = QARVDConfig(
        args.scheme,
        reference_compat=args.reference_compat,
        calibration_prompts=read_prompts(args.calibration_prompts),
        calibration_chunks=args.chunks,
    )
    processes = Processes.launched()  # first, since it gives every process a GPU of its own
    pipe = load_pipeline(args.model, args)
    noise = SEED if args.seed is None else args.seed
    result = measure_sensitivity(pipe, config, prompts, num_chunks=args.chunks, seed=noise, path=args.out)
    processes.close()
    if not processes.is_main:
        return None
    if args.plot:
        plot_sensitivity(result, args.plot)
    return {"out": args.out, "plot": args.plot, **result.to_dict()}


def render(result: dict[str, Any]) -> str:
    sensitivity, weights = result["sensitivity"], result["chunk_weights"] or [None] * len(result["sensitivity"])
    rows = [
        (k, f"{s:.4e}", None if w is None else f"{w:.4f}")
        for k, (s, w) in enumerate(zip(sensitivity, weights, strict=True))
    ]
    lines = [f"wrote {result['out']}: {result['num_prompts']} prompts", table(("chunk", "s", "weight"), rows)]
    if decay := result["decay"]:
        lines.append(
            f"fit: {decay['amplitude']:.3g} * exp(-{decay['rate']:.3f} k), R^2 = {decay['r_squared']:.3f} (of log s)"
        )
    return "\n".join([*lines, "use it with: qarvd quantize MODEL OUT --sensitivity " + result["out"]])
