"""Measure speed on this machine: matrix products, attention, transformer passes, VAE, whole videos; ours beside what else there is."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from dataclasses import replace
from typing import Any

from .common import table, whole

PARTS = ("gemm", "attention", "passes", "vae")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..bench import PASS_VARIANTS, SHAPE_NAMES, VIDEO_VARIANTS

    names = tuple(dict.fromkeys((*PASS_VARIANTS, *VIDEO_VARIANTS)))
    parser.add_argument("--shape", choices=SHAPE_NAMES, default="1.3b", help="model size (default: 1.3b)")
    parser.add_argument(
        "--layers", type=whole(1), help="transformer blocks of the passes and videos (default: the model's)"
    )
    parser.add_argument(
        "--frames-per-chunk", type=whole(1), default=3, help="latent frames that are generated together (default: 3)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--variants", nargs="+", choices=names, help="of passes or videos (default: all)")
    parser.add_argument(
        "--chunks",
        nargs="+",
        type=whole(1),
        help="of the passes (default: the last within 3, 12 and 21 latent frames)",
    )
    parser.add_argument(
        "--end-to-end",
        action="store_true",
        help="time whole videos, text encoder and VAE included",
    )
    parser.add_argument(
        "--frames", nargs="+", type=whole(1), default=[81, 321], help="of the whole videos (default: 81 321)"
    )
    parser.add_argument("--repeats", type=whole(1), default=10, help="runs the median is taken of (default: 10)")
    parser.add_argument(
        "--seconds", type=float, help="give up a variant of the passes after this time (default: never)"
    )
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--out", metavar="JSON", help="file to write, after every part and variant")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ..bench import PASS_VARIANTS, VIDEO_VARIANTS
    from ..bench.attention import bench_attention
    from ..bench.bars import judge
    from ..bench.end_to_end import bench_end_to_end
    from ..bench.gemm import bench_gemm
    from ..bench.shapes import CACHED_FRAMES, SHAPES, WINDOW_FRAMES
    from ..bench.transformer import bench_passes
    from ..bench.vae import bench_vae
    from ..files.atomic import atomic_file
    from .info import environment

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not 1 <= args.frames_per_chunk <= WINDOW_FRAMES:
        raise ValueError(f"--frames-per-chunk is {args.frames_per_chunk}, expected 1 to {WINDOW_FRAMES}")
    shape = replace(SHAPES[args.shape].with_layers(args.layers), chunk_frames=args.frames_per_chunk)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "command": " ".join(["qarvd", *sys.argv[1:]]),
        "shape": args.shape,
        "layers": shape.layers,
        "frames_per_chunk": shape.chunk_frames,
        **environment(),
    }

    def keep(name: str, value: Any) -> None:
        result[name] = value
        if shape == SHAPES["1.3b"]:
            result["bars"] = judge(result)
        if args.out:
            with atomic_file(args.out) as temporary:
                temporary.write_text(json.dumps(result, indent=2), encoding="utf-8")

    done: list[dict[str, Any]] = []

    def on_result(one: dict[str, Any]) -> None:
        done.append(one)
        print(f"{one['name']}: {one}", file=sys.stderr)
        keep("end_to_end" if args.end_to_end else "passes", done)

    if args.end_to_end:
        lengths = [_chunks_of(frames, shape.chunk_frames) for frames in args.frames]
        bench_end_to_end(shape, args.variants or VIDEO_VARIANTS, device, lengths, on_result)
        return result
    if "gemm" in args.parts:
        products = dict.fromkeys(shape.products + (SHAPES["14b"].products if args.shape == "1.3b" else ()))
        keep("gemm", bench_gemm(products, shape.chunk_tokens, device, 3 * args.repeats))
    if "attention" in args.parts:
        keep("attention", bench_attention(shape, device, 2 * args.repeats))
    if "passes" in args.parts:
        chunks = args.chunks or dict.fromkeys(max(frames // shape.chunk_frames, 1) for frames in CACHED_FRAMES)
        bench_passes(
            shape,
            args.variants or PASS_VARIANTS,
            device,
            [chunk - 1 for chunk in chunks],
            args.repeats,
            on_result,
            args.seconds,
        )
    if "vae" in args.parts:
        keep("vae", bench_vae(shape, device, args.repeats))
    return result


def render(result: dict[str, Any]) -> str:
    parts = []
    for name, label in (("gemm", "N x K"), ("attention", "keys")):
        rows = result.get(name)
        if rows:
            columns = list(dict.fromkeys(column for row in rows for column in row["us"]))
            body = [
                (
                    f"{row['N']} x {row['K']}" if name == "gemm" else row["keys"],
                    *(_rounded(row["us"].get(c)) for c in columns),
                )
                for row in rows
            ]
            size = f"{rows[0]['M']} rows" if name == "gemm" else f"{rows[0]['queries']} queries"
            parts.append(f"{name} of {size}, microseconds\n" + table((label, *columns), body))
    passes = result.get("passes")
    if passes:
        chunks = list(next((one["ms"] for one in passes if "ms" in one), {}))
        body = [
            (one["name"], *(_rounded(one["ms"][c]) for c in chunks), _rounded(one["mean_ms"]))
            if "ms" in one
            else (one["name"], one["error"][:60])
            for one in passes
        ]
        width = len(chunks) + 2
        parts.append(
            "one transformer pass, milliseconds\n"
            + table(
                ("variant", *(f"chunk {c}" for c in chunks), "mean"),
                [(*row, *[""] * (width - len(row))) for row in body],
            )
        )
        parts += [_operations(one) for one in passes if one.get("operations")]
    if "vae" in result:
        rows = [
            (one["name"], *map(_rounded, (one["ms"], one["peak_bytes"] / 1e9, one["relative_error"])))
            for one in result["vae"]
        ]
        parts.append(
            f"VAE, a chunk of {result['frames_per_chunk']} latent frames\n"
            + table(("decoder", "ms", "peak GB", "relative error"), rows)
        )
    videos = result.get("end_to_end")
    if videos:
        parts.append("whole videos\n" + _videos(videos))
    if result.get("bars"):
        header = ("speed", "ratio", "floor", "aim", "")
        body = [
            (b["name"], *(f"{b[key]:.3f}" for key in ("ratio", "floor", "aim")), b["verdict"]) for b in result["bars"]
        ]
        parts.append("what was promised\n" + table(header, body))
    return "\n\n".join(parts)


def _operations(one: dict[str, Any]) -> str:
    """What a variant's passes are made of; in parentheses the share of the GPU's peak rates."""
    by_chunk = {chunk: {row["operation"]: row for row in rows} for chunk, rows in one["operations"].items()}
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
    header = (f"{one['name']}, ms of kernels (share of the peak)", "calls", *(f"chunk {c}" for c in by_chunk))
    return table(header, body)


def _videos(results: list[dict[str, Any]]) -> str:
    header = ("variant", "frames", "frames/s", "first frame s", "chunk p50 s", "chunk p95 s", "peak GB")
    rows = []
    for one in results:
        if "error" in one:
            rows.append((one["name"], one["error"][:60], "", "", "", "", ""))
        for timed in (value for value in one.values() if isinstance(value, dict)):
            numbers = (timed[key] for key in ("frames_per_second", "first_frame_s", "chunk_p50_s", "chunk_p95_s"))
            rows.append((one["name"], timed["frames"], *map(_rounded, numbers), _rounded(timed["peak_bytes"] / 1e9)))
    return table(header, rows)


def _chunks_of(frames: int, chunk_frames: int) -> int:
    """Chunks of a video of so many frames: the first latent frame is one of them, every other four."""
    latent, rest = divmod(frames + 3, 4)
    if rest or latent < 1 or latent % chunk_frames:
        raise ValueError(
            f"--frames {frames} does not fill chunks of {chunk_frames} latent frames, "
            f"expected a multiple of {4 * chunk_frames} less 3, such as {28 * chunk_frames - 3}"
        )
    return latent // chunk_frames


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
