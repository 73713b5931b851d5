"""What a stream of a model needs of a GPU's memory, component by component, and the best choices that fit; loads nothing."""

from __future__ import annotations

import argparse
from typing import Any

from .common import DTYPES, resolve_model, table, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder or Hub id; `bundled` names the model that ships with the package")
    parser.add_argument(
        "--vram", metavar="SIZE", help="memory of the GPU, such as 8GB or 8 or 8GiB (default: no limit)"
    )
    parser.add_argument(
        "--scheme", help="plan for a float model quantized like this (default: quantize if it must be)"
    )
    parser.add_argument("--height", type=whole(1))
    parser.add_argument("--width", type=whole(1))
    parser.add_argument("--batch", type=whole(1), default=1, help="samples of the stream")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import dataclasses

    import torch

    from ..memory.plan import choose
    from ..memory.shapes import ModelShapes

    shapes = ModelShapes.read(resolve_model(args.model))
    options = {"height": args.height, "width": args.width, "batch": args.batch, "dtype": getattr(torch, args.dtype)}
    plan = choose(shapes, "max" if args.vram is None else args.vram, scheme=args.scheme, **options)
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
    def rows(sizes: dict[str, int]) -> list[tuple[str, str]]:
        return [(name, f"{size / 1e9:.2f}") for name, size in sizes.items()]

    choice = ", ".join(f"{name}: {value}" for name, value in result["choice"].items() if value is not None)
    limit = "" if result["vram_bytes"] is None else f" of {result['vram_bytes'] / 1e9:.1f} GB"
    total = f"{result['total_bytes'] / 1e9:.2f} GB{limit}, what CUDA itself needs included"
    parts = (
        table(("component", "GB"), rows(result["components"])),
        table(("peak while", "GB"), rows(result["phases"])),
    )
    return "\n\n".join([*parts, f"{choice}\nneeds {total}"])
