"""Arguments and output that several commands share."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..evaluation.fidelity import Rollout
    from ..pipelines.pipeline_arvd import ARVDPipeline

DTYPES = ("float32", "bfloat16", "float16")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="compute dtype (default: bfloat16 on a GPU, float32 on a CPU)")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The `type` of an option that takes a whole number from `least` on, up to `most` if there is a limit."""
    expected = f"a whole number from {least} to {most}" if most is not None else f"a whole number, at least {least}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"is {text}, expected {expected}")
        return value

    return parse


seed = whole(-(2**63), 2**63 - 1)  # what torch takes


def named_model(name: str) -> str:
    """The name of a folder or file as given; `bundled` is the model that ships with the package."""
    from ..bundled import bundled_model_path

    return bundled_model_path() if name == "bundled" else name


def resolve_model(name: str) -> str:
    """A model folder or Hub id, see `named_model`.

    Raises:
        OSError: the name is that of a file, or neither that of a folder nor a Hub id.
        ValueError: the folder holds no model.
    """
    name = named_model(name)
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("model_index.json", "transformer/config.json")):
            raise ValueError(f"{name} has no model_index.json, expected the folder of a diffusers model")
    elif path.exists():
        raise NotADirectoryError(
            f"{name} is a file, expected a model folder or Hub id: `qarvd convert {name} FOLDER` makes a folder of it"
        )
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is None:
        raise FileNotFoundError(f"{name}: there is no such folder (and an id on the Hub looks like OWNER/NAME)")
    else:
        say(f"{name}: there is no such folder, so it is taken for an id on the Hub")
    return name


def require_new_folder(path: str) -> None:
    """Refuse a folder that is there already: commands that write a model write a new folder, and overwrite none.

    Raises:
        FileExistsError: named.
    """
    if Path(path).exists():
        raise FileExistsError(f"{path} exists; give a new folder or remove it first")


def say(text: str) -> None:
    """Print a line of progress, to stderr."""
    print(text, file=sys.stderr, flush=True)


def load_pipeline(path: str, args: argparse.Namespace, **kwargs: Any) -> ARVDPipeline:
    """Load a float or quantized model folder, or Hub id, onto the asked device."""
    import torch

    from ..pipelines.pipeline_arvd import ARVDPipeline

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("float32" if device == "cpu" else "bfloat16"))
    folder = resolve_model(path)
    say(f"loading {path}")
    return ARVDPipeline.from_pretrained(folder, dtype=dtype, **kwargs).to(device)


def watched_roll_out(pipe: ARVDPipeline, prompts: Sequence[str], num_chunks: int, seed: int, what: str) -> Rollout:
    """See `roll_out`; one bar counts the chunks of all prompts, where there is a terminal."""
    from tqdm.auto import tqdm

    from ..evaluation.fidelity import roll_out

    bar_config = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        with tqdm(desc=what, unit="chunk", total=len(prompts) * num_chunks, disable=None) as bar:
            return roll_out(pipe, prompts, num_chunks, seed, bar.update)
    finally:
        pipe.set_progress_bar_config(**bar_config)


@contextmanager
def layer_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar that counts layers, for functions that report what they do, how many are done and how many there are."""
    from tqdm.auto import tqdm

    with tqdm(desc=what, unit="layer") as bar:

        def report(text: str, step: int, steps: int) -> None:
            bar.total = steps
            bar.update(step - bar.n)

        yield report


def read_prompts(path: str | None) -> tuple[str, ...] | None:
    """One prompt per line, `#` starts a comment; None if no file was named."""
    from ..files.text import parse_prompts, read_text

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
