"""Measure the error of the whole video that quantizing each chunk causes.

An interrupted run continues where it stopped. Under `accelerate launch -m qarvd_diffusers sensitivity ...` the
processes share the prompts.
"""

from __future__ import annotations

import argparse
from typing import Any

from .common import (
    add_chunks_argument,
    add_device_arguments,
    add_model_argument,
    add_start_arguments,
    load_pipeline,
    read_prompts,
    seed,
    table,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `qarvd sensitivity`."""
    from ..config import SCHEMES

    add_model_argument(parser, kind="float ")
    parser.add_argument(
        "--scheme", choices=tuple(SCHEMES), default="w4a8", help="bits of weights and activations (default: w4a8)"
    )
    parser.add_argument("--prompts", metavar="FILE", required=True, help="prompts to measure on, one per line")
    parser.add_argument("--out", metavar="JSON", required=True, help="file to write; updated after every prompt")
    parser.add_argument("--plot", metavar="PNG", help="draw sensitivity and fitted decay (needs matplotlib)")
    parser.add_argument(
        "--calibration-prompts",
        metavar="FILE",
        help="calibration prompts, one per line (default: the model's, else bundled ones)",
    )
    add_chunks_argument(parser, "chunks per rollout")
    parser.add_argument(
        "--seed", type=seed, help="seed of the noise to measure on (default: one that calibration never uses)"
    )
    parser.add_argument("--reference-compat", action="store_true", help="reproduce the recipe of the public reference")
    add_start_arguments(parser)
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure and save; of several processes, only the main one returns a result."""
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
        calibration_chunks=args.num_chunks,
    )
    processes = Processes.launched()  # first: it gives every process its own GPU
    pipe = load_pipeline(args.model, args)
    noise = SEED if args.seed is None else args.seed
    result = measure_sensitivity(pipe, config, prompts, num_chunks=args.num_chunks, seed=noise, path=args.out)
    processes.close()
    if not processes.is_main:
        return None
    if args.plot:
        plot_sensitivity(result, args.plot)
    return {"out": args.out, "plot": args.plot, **result.to_dict()}


def render(result: dict[str, Any]) -> str:
    """Format sensitivity and weight per chunk, and the fitted decay."""
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
    return "\n".join([*lines, "to use it: qarvd quantize MODEL OUT --sensitivity " + result["out"]])
