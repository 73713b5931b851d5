"""Convert between original checkpoints, diffusers folders and single files.

An original checkpoint becomes a diffusers folder. A folder, float or quantized, becomes a single file for diffusers
and ComfyUI, and that file becomes a folder again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import (
    DTYPES,
    add_overwrite_argument,
    check_new_folder,
    named_model,
    replaced_folder,
    whole,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `qarvd convert`."""
    parser.add_argument(
        "source",
        help="checkpoint with original key names (.pt, .safetensors, folder of shards), or a diffusers folder",
    )
    parser.add_argument("out", help="diffusers folder to write; if SOURCE is one, a .safetensors file")
    parser.add_argument(
        "--family",
        default="self-forcing",
        help="model family, which sets chunk size, steps and window; auto: by the names of file and folder "
        "(default: self-forcing)",
    )
    parser.add_argument(
        "--base", help="diffusers folder that provides VAE, text encoder and tokenizer; `bundled` is one"
    )
    parser.add_argument(
        "--weights", help="state dict in the file: generator_ema, generator or model (default: the family's)"
    )
    parser.add_argument(
        "--lora", help="LoRA file to merge (default: the one in the folder of a base that needs it); none: no LoRA"
    )
    parser.add_argument(
        "--int8-tensorwise",
        action="store_true",
        help="write a quantized folder in ComfyUI's own int8 format, and list what that format cannot hold",
    )
    parser.add_argument(
        "--prefix",
        default="",
        help="of a float folder: prefix of every name in the file; `model.` gives the names of the releases",
    )
    parser.add_argument("--heads", type=whole(1), help="attention heads (default: from --base, else width / 128)")
    parser.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: as stored)")
    add_overwrite_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Convert in the direction that the kind of the source implies."""
    from ..models.single_file_header import read_single_file

    source, base = Path(named_model(args.source)), args.base and named_model(args.base)
    if (source / "transformer" / "config.json").is_file():
        return _folder_to_file(source, args)
    has_header = source.is_file() and source.suffix == ".safetensors" and read_single_file(source) is not None
    check_new_folder(args.out, args.overwrite, source)
    with replaced_folder(args.out) as out:
        written = (
            _single_file_to_folder(source, out, base) if has_header else _checkpoint_to_folder(source, out, base, args)
        )
    return {"out": args.out, **written}


def _single_file_to_folder(source: Path, out: str, base: str | None) -> dict[str, Any]:
    """Write the folder that a file with our header describes."""
    from ..conversion import single_file_to_folder

    single_file_to_folder(source, out, base)
    return {"layout": "diffusers folder, as the file's header says"}


def _checkpoint_to_folder(source: Path, out: str, base: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """Write the folder of an original checkpoint."""
    import torch

    from ..conversion import convert_checkpoint, detect_checkpoint

    detected = detect_checkpoint(source, args.family, args.weights)
    convert_checkpoint(
        source,
        out,
        family=detected.family,
        base=base,
        weights=args.weights,
        lora=args.lora,
        num_attention_heads=args.heads,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
    )
    return {"layout": f"diffusers folder, {detected.family}", "source": detected.to_dict()}


def _folder_to_file(source: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write a folder as one file: a quantized one with its packed tensors, a float one under original names."""
    from ..conversion import export_int8_tensorwise, folder_to_single_file
    from ..models import CausalWanTransformer3DModel

    if args.int8_tensorwise:
        transformer = CausalWanTransformer3DModel.from_pretrained(source, subfolder="transformer", torch_dtype="auto")
        return {"out": args.out, "layout": "int8_tensorwise", "losses": export_int8_tensorwise(transformer, args.out)}
    folder_to_single_file(source, args.out, args.prefix)
    return {"out": args.out, "layout": "single file, original names"}


def render(result: dict[str, Any]) -> str:
    """Say what was written, and from what."""
    lines = [f"wrote {result['out']} ({result['layout']})"]
    if source := result.get("source"):
        lines.append(
            f"from {source['parameters']:,} parameters in {', '.join(source['dtypes'])}, weights {source['weights']}"
            + (f", LoRA {source['lora']}" if source["lora"] else "")
        )
        lines += [f"  {reason}" for reason in source["reasons"]]
    lines += [f"  {loss}" for loss in result.get("losses", ())]
    return "\n".join(lines)
