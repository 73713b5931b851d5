"""Convert an original checkpoint (.pt, .safetensors) of the Self-Forcing family to a diffusers folder."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="checkpoint file with original key names")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--family", default="self-forcing", help="whose chunk size, steps and window apply")
    parser.add_argument("--base", help="diffusers folder that supplies VAE, text encoder and tokenizer")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..conversion import convert_checkpoint

    convert_checkpoint(args.source, args.out, family=args.family, base=args.base)
    return {"out": args.out, "family": args.family}


def render(result: dict[str, Any]) -> str:
    return f"wrote {result['out']} ({result['family']})"
