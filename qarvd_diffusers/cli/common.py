"""Arguments and output that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pipelines.pipeline_arvd import ARVDPipeline

DTYPES = ("float32", "bfloat16", "float16")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="compute dtype (default: bfloat16 on a GPU, float32 on a CPU)")


def resolve_model(name: str) -> str:
    """A model folder or Hub id as given; `bundled` is the model that ships with the package."""
    from ..bundled import bundled_model_path

    return bundled_model_path() if name == "bundled" else name


def load_pipeline(path: str, args: argparse.Namespace, **kwargs: Any) -> ARVDPipeline:
    """Load a float or quantized model folder, or Hub id, onto the asked device."""
    import torch

    from ..pipelines.pipeline_arvd import ARVDPipeline

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("float32" if device == "cpu" else "bfloat16"))
    return ARVDPipeline.from_pretrained(resolve_model(path), dtype=dtype, **kwargs).to(device)


def read_prompts(path: str | None) -> tuple[str, ...] | None:
    """One prompt per line, `#` starts a comment; None if no file was named."""
    from ..config import parse_prompts
    from ..text_files import read_text

    return None if path is None else parse_prompts(read_text(path).splitlines(), path)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Plain text in aligned columns; numbers to the right."""
    cells = [list(map(str, header)), *(["" if c is None else str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
