"""Share arguments, checks and output between the commands."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..evaluation.fidelity import Rollout
    from ..pipelines.pipeline_arvd import ARVDPipeline

LIVE = "-"  # in place of a file of controls: standard input, while the video runs
DTYPES = ("float32", "bfloat16", "float16")


def add_model_argument(parser: argparse.ArgumentParser, name: str = "model", kind: str = "") -> None:
    """Add the positional argument that names a model; `kind` ("float ") restricts it."""
    text = f"{kind}model folder or Hub id; `bundled` names the model that ships with the package"
    parser.add_argument(name, help=text)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--device` and `--dtype`."""
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="compute dtype (default: bfloat16 on a GPU, float32 on a CPU)")


def add_start_arguments(parser: argparse.ArgumentParser, live: str = "") -> None:
    """Add `--image` and `--controls`; `live` is said of controls that are read while a video runs."""
    parser.add_argument("--image", metavar="FILE", help="picture that videos start with")
    text = "camera, keys and events of every chunk, as JSON lines, for a model that takes controls"
    parser.add_argument("--controls", metavar="FILE", help=text + live)


def start_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `stream` that `--image` and `--controls` stand for, and check their files."""
    from ..controls.recording import read_controls
    from ..rollout.video_start import read_picture

    start: dict[str, Any] = {}
    if getattr(args, "image", None):
        start["image"] = read_picture(args.image)
    if getattr(args, "controls", None) not in (None, LIVE):
        start["controls"] = read_controls(args.controls)
    return start


class _Renamed(argparse.Action):
    """Store the value of an option that was given under its old name, and print the new name."""

    def __init__(self, option_strings: Sequence[str], dest: str, new: str, **options: Any) -> None:
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)
        self.new = new

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        say(f"{option_string} is deprecated and will be removed in the next release: use {self.new}")
        setattr(namespace, self.dest, values)


def keep_old_name(parser: argparse.ArgumentParser, option: argparse.Action, old: str) -> None:
    """Accept a renamed option under its `old` name too: hidden from `--help`, with a notice on stderr."""
    new = option.option_strings[0]
    parser.add_argument(old, action=_Renamed, dest=option.dest, new=new, nargs=option.nargs, type=option.type)


def add_chunks_argument(parser: argparse.ArgumentParser, text: str, least: int = 1) -> None:
    """Add `--num-chunks`, at least `least`, 7 by default."""
    option = parser.add_argument(
        "--num-chunks", type=whole(least), default=7, metavar="N", help=f"{text} (default: 7)"
    )
    keep_old_name(parser, option, "--chunks")


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


seed = whole(-(2**63), 2**63 - 1)  # the range that torch accepts


def named_model(name: str) -> str:
    """Return the name of a folder or file; `bundled` becomes the folder of the model that ships with the package."""
    from ..bundled import bundled_model_path

    return bundled_model_path() if name == "bundled" else name


def resolve_model(name: str) -> str:
    """Return the model folder or Hub id that `name` stands for, see `named_model`.

    Raises:
        OSError: `name` is a file, or neither a folder nor a Hub id.
        ValueError: the folder holds no model.
    """
    name = named_model(name)
    path = Path(name)
    if path.is_dir():
        if not is_model_folder(path):
            raise ValueError(f"{name} has no model_index.json, expected the folder of a diffusers model")
    elif path.exists():
        raise NotADirectoryError(
            f"{name} is a file, expected a model folder or Hub id: make one with `qarvd convert {name} FOLDER`"
        )
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is None:
        raise FileNotFoundError(f"{name}: there is no such folder (and an id on the Hub looks like OWNER/NAME)")
    else:
        say(f"{name}: there is no such folder, so this is read as an id on the Hub")
    return name


def add_overwrite_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--overwrite`, for commands that write a model folder."""
    text = "replace the model folder OUT; it stays as it is until the new one is complete"
    parser.add_argument("--overwrite", action="store_true", help=text)


def check_new_folder(path: str, overwrite: bool = False, source: str | Path | None = None) -> None:
    """Check, before any work, that a model folder may be written to `path`.

    Args:
        path: the folder to write.
        overwrite: an existing model folder may be replaced.
        source: the model that is read; never replaced.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is not set or would remove something else than a model folder.
    """
    folder = Path(path)
    if not folder.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists; give a new folder, or replace this one with --overwrite")
    if not is_model_folder(folder) and (folder.is_file() or any(folder.iterdir())):
        raise FileExistsError(
            f"{path} exists and is not a model folder, which --overwrite never removes: give a new folder"
        )
    if source is not None and Path(source).resolve().is_relative_to(folder.resolve()):
        raise FileExistsError(
            f"{path} is, or holds, the model that is read; --overwrite would remove it: give a new folder"
        )


def is_model_folder(folder: Path) -> bool:
    """Return whether `folder` holds a diffusers pipeline or transformer."""
    return any((folder / file).is_file() for file in ("model_index.json", "transformer/config.json"))


@contextmanager
def replaced_folder(path: str) -> Iterator[str]:
    """Give the name of a new folder to write to; it replaces the folder `path`, if there is one, when the block ends.

    When the block raises, `path` stays as it is. Unlike files that are replaced one by one, no shard of the old model
    is left among those of the new one.
    """
    folder = Path(path).resolve()
    if not folder.exists():
        yield path
        return
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        yield str(new)
        folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            old.rename(folder)
            raise
    finally:
        if folder.exists():  # otherwise the old model in `temporary` is the only copy
            shutil.rmtree(temporary, ignore_errors=True)


def say(text: str) -> None:
    """Print a line of progress, to stderr."""
    print(text, file=sys.stderr, flush=True)


def load_pipeline(path: str, args: argparse.Namespace, **kwargs: Any) -> ARVDPipeline:
    """Load a float or quantized model folder, or Hub id, onto the requested device."""
    import torch

    from ..pipelines.pipeline_arvd import ARVDPipeline

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("float32" if device == "cpu" else "bfloat16"))
    folder, start = resolve_model(path), start_of(args)
    say(f"loading {path}")
    pipe = ARVDPipeline.from_pretrained(folder, dtype=dtype, **kwargs).to(device)
    pipe.stream_defaults = start
    return pipe


def watched_roll_out(pipe: ARVDPipeline, prompts: Sequence[str], num_chunks: int, seed: int, what: str) -> Rollout:
    """Generate as `fidelity.roll_out`; on a terminal, one bar counts the chunks of all prompts."""
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
    """Show a bar of layers, driven by the callback that the block gets: text, layers done, layers in all."""
    from tqdm.auto import tqdm

    with tqdm(desc=what, unit="layer") as bar:

        def report(text: str, step: int, steps: int) -> None:
            bar.total = steps
            bar.update(step - bar.n)

        yield report


def read_prompts(path: str | None) -> tuple[str, ...] | None:
    """Read a file of one prompt per line, `#` starts a comment; None without a file."""
    from ..files.text import parse_prompts, read_text

    return None if path is None else parse_prompts(read_text(path).splitlines(), path)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format plain text in aligned columns: the first to the left, the others to the right; None is an empty cell."""
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
