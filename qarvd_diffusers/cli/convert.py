"""Convert an original checkpoint of the Self-Forcing family to a diffusers folder, or a float folder back to one file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="checkpoint with original key names (.pt, .safetensors, folder of shards), or a diffusers folder",
    )
    parser.add_argument("out", help="diffusers folder to write, or for a folder as source a .safetensors file")
    parser.add_argument(
        "--family",
        default="self-forcing",
        help="whose chunk size, steps and window apply; auto: by size and file name",
    )
    parser.add_argument("--base", help="diffusers folder that supplies VAE, text encoder and tokenizer")
    parser.add_argument(
        "--weights", help="state dict in the file: generator_ema, generator or model (default: the family's)"
    )
    parser.add_argument(
        "--lora", help="LoRA file to merge (default: the one beside a base that needs it); none: no LoRA"
    )
    parser.add_argument("--heads", type=int, help="attention heads (default: from --base, else width / 128)")
    parser.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: as stored)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ..conversion import convert_checkpoint, detect_checkpoint, export_checkpoint

    if (Path(args.source) / "transformer" / "config.json").is_file():
        export_checkpoint(args.source, args.out)
        return {"out": args.out, "layout": "original names"}
    found = detect_checkpoint(args.source, args.family, args.weights)
    convert_checkpoint(
        args.source,
        args.out,
        family=found.family,
        base=args.base,
        weights=args.weights,
        lora=args.lora,
        num_attention_heads=args.heads,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
    )
    return {"out": args.out, "layout": f"diffusers folder, {found.family}", "source": found.to_dict()}


def render(result: dict[str, Any]) -> str:
    lines = [f"wrote {result['out']} ({result['layout']})"]
    if source := result.get("source"):
        lines.append(
            f"from {source['parameters']:,} parameters in {', '.join(source['dtypes'])}, weights {source['weights']}"
            + (f", LoRA {source['lora']}" if source["lora"] else "")
        )
        lines += [f"  {reason}" for reason in source["reasons"]]
    return "\n".join(lines)
