"""Measure speed on this machine: matrix products, attention, transformer passes, VAE and whole videos.

The operators of torch and other quantizers are measured for comparison.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .common import keep_old_name, table, whole

if TYPE_CHECKING:
    import torch

    from ..bench.shapes import Shape

PARTS = ("gemm", "attention", "passes", "vae")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `qarvd bench`."""
    from ..bench import PASS_VARIANTS, SHAPE_NAMES, VIDEO_VARIANTS

    names = tuple(dict.fromkeys((*PASS_VARIANTS, *VIDEO_VARIANTS)))
    parser.add_argument(
        "--shape",
        choices=SHAPE_NAMES,
        default="1.3b",
        help="model size, with picture and camera as ...-world (default: 1.3b)",
    )
    parser.add_argument(
        "--layers", type=whole(1), help="transformer blocks of the passes and videos (default: the model's)"
    )
    parser.add_argument(
        "--frames-per-chunk", type=whole(1), default=3, help="latent frames that are generated together (default: 3)"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        type=lambda name: name.replace("attention8", "fp8"),  # as 0.1 named them
        choices=names,
        help="variants of the passes or videos (default: all)",
    )
    positions = parser.add_argument(
        "--at-chunks",
        nargs="+",
        type=whole(1),
        metavar="K",
        help="time the passes of these chunks, counted from 1 (default: the last within 3, 12 and 21 latent frames)",
    )
    keep_old_name(parser, positions, "--chunks")
    parser.add_argument(
        "--end-to-end", action="store_true", help="time whole videos instead, text encoder and VAE included"
    )
    parser.add_argument(
        "--frames", nargs="+", type=whole(1), default=[81, 321], help="lengths of the whole videos (default: 81 321)"
    )
    parser.add_argument("--repeats", type=whole(1), default=10, help="runs to take the median of (default: 10)")
    parser.add_argument("--seconds", type=float, help="time limit of each variant of the passes (default: none)")
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--out", metavar="JSON", help="file to write; updated after every part and variant")


class _Report:
    """Collect results by part, and write them to a file after each."""

    def __init__(self, result: dict[str, Any], out: str | None) -> None:
        self.result, self._out = result, out

    def add(self, part: str, value: Any) -> None:
        """Store the value of a part."""
        from ..files.atomic import atomic_file

        self.result[part] = value
        if self._out:
            with atomic_file(self._out) as temporary:
                temporary.write_text(json.dumps(self.result, indent=2), encoding="utf-8")

    def append(self, part: str, row: dict[str, Any]) -> None:
        """Store one more row of a part, and print it to stderr."""
        print(f"{row['name']}: {row}", file=sys.stderr)
        self.add(part, [*self.result.get(part, []), row])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the chosen parts, or whole videos."""
    import torch

    from .info import environment

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shape = _shape(args)
    head = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "command": " ".join(["qarvd", *sys.argv[1:]]),
        "shape": args.shape,
        "layers": shape.layers,
        "frames_per_chunk": shape.chunk_frames,
        **environment(),
    }
    report = _Report(head, args.out)
    if args.end_to_end and shape.world:
        raise ValueError(f"--end-to-end starts from a prompt, {args.shape} from a picture: time its --parts passes")
    if args.end_to_end:
        _measure_videos(args, shape, device, report)
    else:
        _measure_parts(args, shape, device, report)
    return report.result


def _shape(args: argparse.Namespace) -> Shape:
    """Return the sizes to measure."""
    from ..bench.shapes import SHAPES, WINDOW_FRAMES

    if not 1 <= args.frames_per_chunk <= WINDOW_FRAMES:
        raise ValueError(f"--frames-per-chunk is {args.frames_per_chunk}, expected 1 to {WINDOW_FRAMES}")
    return replace(SHAPES[args.shape].with_layers(args.layers), chunk_frames=args.frames_per_chunk)


def _measure_videos(args: argparse.Namespace, shape: Shape, device: torch.device, report: _Report) -> None:
    """Time whole videos."""
    from ..bench import VIDEO_VARIANTS
    from ..bench.end_to_end import bench_end_to_end

    lengths = [_chunks_of(frames, shape.chunk_frames) for frames in args.frames]
    on_result = partial(report.append, "end_to_end")
    bench_end_to_end(shape, args.variants or VIDEO_VARIANTS, device, lengths, on_result)


def _measure_parts(args: argparse.Namespace, shape: Shape, device: torch.device, report: _Report) -> None:
    """Measure the parts that `--parts` names."""
    from ..bench import PASS_VARIANTS
    from ..bench.attention import bench_attention
    from ..bench.gemm import bench_gemm
    from ..bench.shapes import CACHED_FRAMES, SHAPES
    from ..bench.transformer import bench_passes
    from ..bench.vae import bench_vae

    if "gemm" in args.parts:
        products = dict.fromkeys(shape.products + (SHAPES["14b"].products if args.shape == "1.3b" else ()))
        report.add("gemm", bench_gemm(products, shape.chunk_tokens, device, 3 * args.repeats))
    if "attention" in args.parts:
        report.add("attention", bench_attention(shape, device, 2 * args.repeats))
    if "passes" in args.parts:
        last = dict.fromkeys(max(frames // shape.chunk_frames, 1) for frames in CACHED_FRAMES)
        chunks = [chunk - 1 for chunk in args.at_chunks or last]
        variants, on_result = args.variants or PASS_VARIANTS, partial(report.append, "passes")
        bench_passes(shape, variants, device, chunks, args.repeats, on_result, args.seconds)
    if "vae" in args.parts:
        report.add("vae", bench_vae(shape, device, args.repeats))


def _chunks_of(frames: int, chunk_frames: int) -> int:
    """Return the chunks of a video: its first latent frame is one pixel frame, every other one is four."""
    latent, rest = divmod(frames + 3, 4)
    if rest or latent < 1 or latent % chunk_frames:
        raise ValueError(
            f"--frames {frames} does not fill chunks of {chunk_frames} latent frames, "
            f"expected a multiple of {4 * chunk_frames} less 3, such as {28 * chunk_frames - 3}"
        )
    return latent // chunk_frames


def render(result: dict[str, Any]) -> str:
    """Format a table per measured part."""
    return "\n\n".join(text for part, tables in _TABLES.items() if result.get(part) for text in tables(result))


def _kernel_tables(part: str, label: str, size: str, row_name: Callable[[dict[str, Any]], str]) -> _Tables:
    """Make the function that formats microseconds per kernel, with a row per size."""

    def tables(result: dict[str, Any]) -> list[str]:
        rows = result[part]
        columns = list(dict.fromkeys(column for row in rows for column in row["us"]))
        body = [(row_name(row), *(_rounded(row["us"].get(column)) for column in columns)) for row in rows]
        return [f"{part} of {size.format(**rows[0])}, microseconds\n" + table((label, *columns), body)]

    return tables


def _pass_tables(result: dict[str, Any]) -> list[str]:
    """Format milliseconds per variant and chunk, then the operations of every variant that has them."""
    passes = result["passes"]
    chunks = list(next((row["ms"] for row in passes if "ms" in row), {}))
    body = [
        (row["name"], *(_rounded(row["ms"][chunk]) for chunk in chunks), _rounded(row["mean_ms"]))
        if "ms" in row
        else (row["name"], row["error"][:60], *[""] * len(chunks))
        for row in passes
    ]
    header = ("variant", *(f"chunk {chunk}" for chunk in chunks), "mean")
    tables = ["one transformer pass, milliseconds\n" + table(header, body)]
    return tables + [_operations(row) for row in passes if row.get("operations")]


def _operations(variant: dict[str, Any]) -> str:
    """Format the operations of a variant's passes; in parentheses, the share of the GPU's peak rates."""
    by_chunk = {chunk: {row["operation"]: row for row in rows} for chunk, rows in variant["operations"].items()}
    names = list(dict.fromkeys(name for rows in by_chunk.values() for name in rows))

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        share = f" ({row['floor_ms'] / row['ms']:.0%})" if row.get("floor_ms") else ""
        return f"{row['ms']:.2f}{share}"

    body = []
    for name in names:
        rows = [by_chunk[chunk].get(name) for chunk in by_chunk]
        calls = next(row["calls"] for row in rows if row is not None)
        body.append((name, calls, *map(cell, rows)))
    header = (f"{variant['name']}, ms of kernels (share of the peak)", "calls", *(f"chunk {c}" for c in by_chunk))
    return table(header, body)


def _vae_tables(result: dict[str, Any]) -> list[str]:
    """Format speed, memory and error per decoder."""
    rows = [
        (row["name"], *map(_rounded, (row["ms"], row["peak_bytes"] / 1e9, row["relative_error"])))
        for row in result["vae"]
    ]
    title = f"VAE, a chunk of {result['frames_per_chunk']} latent frames\n"
    return [title + table(("decoder", "ms", "peak GB", "relative error"), rows)]


def _video_tables(result: dict[str, Any]) -> list[str]:
    """Format speed and latencies per variant and length."""
    header = ("variant", "frames", "frames/s", "first frame s", "chunk p50 s", "chunk p95 s", "peak GB")
    rows = []
    for variant in result["end_to_end"]:
        if "error" in variant:
            rows.append((variant["name"], variant["error"][:60], "", "", "", "", ""))
        for timed in (value for value in variant.values() if isinstance(value, dict)):
            numbers = (timed[key] for key in ("frames_per_second", "first_frame_s", "chunk_p50_s", "chunk_p95_s"))
            peak = _rounded(timed["peak_bytes"] / 1e9)
            rows.append((variant["name"], timed["frames"], *map(_rounded, numbers), peak))
    return ["whole videos\n" + table(header, rows)]


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


_Tables = Callable[[dict[str, Any]], list[str]]
_TABLES: dict[str, _Tables] = {
    "gemm": _kernel_tables("gemm", "N x K", "{M} rows", lambda row: f"{row['N']} x {row['K']}"),
    "attention": _kernel_tables("attention", "keys", "{queries} queries", lambda row: row["keys"]),
    "passes": _pass_tables,
    "vae": _vae_tables,
    "end_to_end": _video_tables,
}
