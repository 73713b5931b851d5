"""Convert an original checkpoint of the Self-Forcing family to a diffusers folder, or a float folder back to one file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="checkpoint with original key names (.pt, .safetensors), or a diffusers folder")
    parser.add_argument("out", help="diffusers folder to write, or for a folder as source a .safetensors file")
    parser.add_argument("--family", default="self-forcing", help="whose chunk size, steps and window apply")
    parser.add_argument("--base", help="diffusers folder that supplies VAE, text encoder and tokenizer")
    parser.add_argument("--weights", help="state dict in the file: generator_ema, generator or model")
    parser.add_argument("--heads", type=int, help="attention heads (default: from --base, else width / 128)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..conversion import convert_checkpoint, export_checkpoint

    if Path(args.source).is_dir():
        export_checkpoint(args.source, args.out)
        return {"out": args.out, "layout": "original names"}
    convert_checkpoint(
        args.source,
        args.out,
        family=args.family,
        base=args.base,
        weights=args.weights,
        num_attention_heads=args.heads,
    )
    return {"out": args.out, "layout": f"diffusers folder, {args.family}"}


def render(result: dict[str, Any]) -> str:
    return f"wrote {result['out']} ({result['layout']})"
