"""Estimate the GPU memory that a stream needs, by component, and choose the best settings that fit; loads no model."""

from __future__ import annotations

import argparse
from typing import Any

from .common import DTYPES, add_model_argument, keep_old_name, resolve_model, table, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `qarvd plan`."""
    add_model_argument(parser)
    memory = parser.add_argument(
        "--memory", metavar="SIZE", help="GPU memory to fit into, such as 8GB, 8 or 8GiB (default: no limit)"
    )
    keep_old_name(parser, memory, "--vram")
    parser.add_argument(
        "--scheme", help="plan for a float model quantized to this scheme (default: quantize only if it does not fit)"
    )
    parser.add_argument("--height", type=whole(1), help="pixels (default: the model's)")
    parser.add_argument("--width", type=whole(1), help="pixels (default: the model's)")
    parser.add_argument("--batch", type=whole(1), default=1, help="samples of the stream (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="compute dtype (default: bfloat16)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan from the model's configs and file headers."""
    import dataclasses

    import torch

    from ..memory.plan import choose
    from ..memory.shapes import ModelShapes

    shapes = ModelShapes.read(resolve_model(args.model))
    options = {"height": args.height, "width": args.width, "batch": args.batch, "dtype": getattr(torch, args.dtype)}
    plan = choose(shapes, "max" if args.memory is None else args.memory, scheme=args.scheme, **options)
    return {
        "model": args.model,
        "vram_bytes": plan.budget,
        "choice": dataclasses.asdict(plan.choice),
        "components": dict(plan.components),
        "phases": dict(plan.phases),
        "allocated_bytes": plan.allocated,
        "total_bytes": plan.total,
    }


def render(result: dict[str, Any]) -> str:
    """Format bytes per component and per phase, the chosen settings, and the total."""

    def rows(sizes: dict[str, int]) -> list[tuple[str, str]]:
        return [(name, f"{size / 1e9:.2f}") for name, size in sizes.items()]

    choice = ", ".join(f"{name}: {value}" for name, value in result["choice"].items() if value is not None)
    limit = "" if result["vram_bytes"] is None else f" of {result['vram_bytes'] / 1e9:.1f} GB"
    total = f"{result['total_bytes'] / 1e9:.2f} GB{limit}, including the memory of CUDA itself"
    parts = (
        table(("component", "GB"), rows(result["components"])),
        table(("peak while", "GB"), rows(result["phases"])),
    )
    return "\n\n".join([*parts, f"{choice}\nneeds {total}"])
