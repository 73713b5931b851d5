"""Compare a quantized model with its float model on identical noise; write report.json, plots and report.html."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    add_chunks_argument,
    add_device_arguments,
    add_model_argument,
    add_start_arguments,
    load_pipeline,
    read_prompts,
    say,
    seed,
    table,
    watched_roll_out,
    whole,
)

if TYPE_CHECKING:
    from ..evaluation.fidelity import Judge, Rollout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `qarvd evaluate`."""
    add_model_argument(parser, "float", kind="float ")
    parser.add_argument("quantized", help="quantized model folder or Hub id")
    parser.add_argument("--prompts", metavar="FILE", required=True, help="prompts, one per line; one video for each")
    parser.add_argument("--out", required=True, help="folder to write")
    add_chunks_argument(parser, "chunks per video")
    parser.add_argument("--seed", type=seed, default=0, help="prompt i draws its noise from seed + i (default: 0)")
    parser.add_argument(
        "--videos", type=whole(0), default=4, metavar="N", help="show the videos of N prompts in the page (default: 4)"
    )
    parser.add_argument("--card", action="store_true", help="write the result into the quantized folder's model card")
    add_start_arguments(parser)
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Generate with both models, one after the other, and write the comparison."""
    from ..evaluation.fidelity import join
    from ..evaluation.plots import has_matplotlib
    from ..evaluation.report import NO_PLOTS, strict_json, write_report

    if not has_matplotlib():
        say(NO_PLOTS)
    prompts = read_prompts(args.prompts)
    if args.card and not Path(args.quantized).is_dir():
        raise ValueError(
            f"--card needs a local folder, and {args.quantized} is none: download it, or leave out --card"
        )
    # The quantized model first: the peak memory of a process never falls, and the float model needs more.
    got, of_quantized, scheme, _ = _roll_out(args.quantized, prompts, args, quantized=True)
    expected, of_float, _, fps = _roll_out(args.float, prompts, args, quantized=False)
    report = strict_json(join(expected, got, of_float, of_quantized, args.seed))
    names = (f"float ({args.float})", f"{scheme} ({args.quantized})")
    files = write_report(Path(args.out), report, expected, got, prompts, fps, args.videos, names)
    if args.card:
        load_pipeline(args.quantized, args).write_card(args.quantized, report)
    return {**report, "files": files}


def _roll_out(
    model: str, prompts: tuple[str, ...], args: argparse.Namespace, quantized: bool
) -> tuple[Rollout, dict[str, Any], str, int]:
    """Load one model, generate, and free it.

    Returns:
        The rollout, its description, the scheme or "float", and frames per second.
    """
    from ..evaluation.fidelity import describe

    pipe = load_pipeline(model, args)
    if (pipe.quantization is not None) != quantized:
        kind, expected = ("float", "quantized") if quantized else ("quantized", "float")
        raise ValueError(f"{model} is {kind}, expected a {expected} model: the order is FLOAT QUANTIZED")
    what = "quantized model" if quantized else "float model"
    rollout = watched_roll_out(pipe, prompts, args.num_chunks, args.seed, what)
    described = describe(pipe, rollout, prompts, _judge(rollout, prompts))
    scheme, fps = getattr(pipe.quantization, "scheme", "float"), pipe.config.get("fps") or 16
    del pipe
    gc.collect()
    return rollout, described, scheme, fps


def _judge(rollout: Rollout, prompts: tuple[str, ...]) -> Judge | None:
    """Return the moving-shapes judge if all prompts are sentences of its grammar and the frames have its size."""
    from ..evaluation.moving_shapes import FRAME_SIZE, Scene, shows_prompt

    try:
        for prompt in prompts:
            Scene.from_prompt(prompt)
    except ValueError:
        return None
    video = rollout.video(0)
    if video.shape[1:3] != (FRAME_SIZE, FRAME_SIZE) or len(video) < 8:
        return None
    return shows_prompt


def render(report: dict[str, Any]) -> str:
    """Format the metrics per chunk, bytes, speed, memory and adherence per model, and the path of the page."""
    from ..evaluation.report import METRICS, format_number, interval_note

    columns = {name: metric.form for name, metric in METRICS.items() if report[name] is not None}
    rows = [
        (chunk, *(format_number(report[name][chunk], form) for name, form in columns.items()))
        for chunk in range(report["num_chunks"])
    ]
    models = [
        (
            label,
            f"{report[f'{prefix}bytes']:,}",
            f"{report[f'{prefix}seconds_per_chunk']:.3f}",
            f"{(report[f'{prefix}peak_memory_bytes'] or 0) / 1e6:,.0f}",
            None if report[f"{prefix}adherence"] is None else f"{report[f'{prefix}adherence']:.1%}",
        )
        for label, prefix in (("float", "reference_"), ("quantized", ""))
    ]
    return "\n\n".join(
        [
            table(("chunk", *columns), rows),
            table(("model", "bytes", "s/chunk", "peak MB", "adherence"), models),
            interval_note(report),
            report["lpips_note"],
            f"wrote {report['files']['page']}",
        ]
    )
