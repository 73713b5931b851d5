"""Quantize the bundled model to w8a8 and w4a8, save, reload, generate on identical noise, and compare."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import add_chunks_argument, say, seed, table, watched_roll_out, whole

if TYPE_CHECKING:
    from ..evaluation.fidelity import Rollout
    from ..pipelines.pipeline_arvd import ARVDPipeline

SCHEMES = ("w8a8", "w4a8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `qarvd demo`."""
    parser.add_argument(
        "--out", default="qarvd_demo", help="folder for videos, pictures and checkpoints (default: qarvd_demo)"
    )
    parser.add_argument(
        "--prompts", type=whole(1), default=4, metavar="N", help="number of held-out prompts to generate (default: 4)"
    )
    add_chunks_argument(parser, "chunks per video; 7 are 81 frames")
    parser.add_argument("--seed", type=seed, default=0, help="seed of prompts and noise (default: 0)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run every step for every scheme; the report is also written to `report.json`."""
    from ..bundled import bundled_model_path
    from ..config import QARVDConfig
    from ..evaluation.fidelity import compare, describe
    from ..evaluation.moving_shapes import held_out_prompts, shows_prompt
    from ..files.atomic import atomic_file

    out = Path(args.out)
    # The picture shows the first prompt: two objects show more than one.
    prompts = sorted(held_out_prompts(args.prompts, args.seed, pair_probability=0.5), key=lambda p: " above " not in p)
    say("float model: generating")
    reference = _load(bundled_model_path())
    expected = watched_roll_out(reference, prompts, args.num_chunks, args.seed, "float model")
    report = {"float": describe(reference, expected, prompts, shows_prompt)}
    rollouts = {"float": expected}
    for scheme in SCHEMES:
        say(f"{scheme}: calibrating, saving, reloading, generating")
        pipe = _load(bundled_model_path())
        pipe.quantize(QARVDConfig(scheme))
        pipe.save_pretrained(out / scheme)
        pipe = _load(out / scheme)
        got = watched_roll_out(pipe, prompts, args.num_chunks, args.seed, f"{scheme} model")
        rollouts[scheme] = got
        report[scheme] = describe(pipe, got, prompts, shows_prompt) | compare(expected, got)
    for entry in report.values():
        # Bytes of the quantized layers; for the float model, of the same layers in bfloat16.
        entry["bytes"] = entry["quantized_layer_bytes"]
    report["float"]["bytes"] = report[SCHEMES[0]]["quantized_layer_bytes_as_bfloat16"]
    report["files"] = _write_pictures(out, rollouts, prompts, report, reference.config.get("fps") or 16)
    report["files"]["report"] = str(out / "report.json")
    with atomic_file(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2), encoding="utf-8")
    return report


def _load(path: str | Path) -> ARVDPipeline:
    import torch

    from ..pipelines.pipeline_arvd import ARVDPipeline

    return ARVDPipeline.from_pretrained(str(path), dtype=torch.float32)


def _write_pictures(
    out: Path, rollouts: dict[str, Rollout], prompts: list[str], report: dict[str, Any], fps: int
) -> dict[str, str]:
    """Write a video of the first prompt per model and a contact sheet; return the paths by name."""
    from ..evaluation.pictures import contact_sheet, write_video

    files = {}
    for label, rollout in rollouts.items():
        files[f"{label}_video"] = str(out / f"{label}.mp4")
        write_video(rollout.video(0), files[f"{label}_video"], fps)
    files["contact_sheet"] = str(out / "contact_sheet.png")
    notes = {
        label: f"{report[label]['bytes'] / 1e6:.2f} MB"
        + (f", {min(report[label]['psnr_db']):.1f} dB" if "psnr_db" in report[label] else " (bf16)")
        for label in rollouts
    }
    rows = {label: rollout.frames[0] for label, rollout in rollouts.items()}
    contact_sheet(rows, files["contact_sheet"], f'"{prompts[0]}"', notes)
    files |= {scheme: str(out / scheme) for scheme in SCHEMES}
    return files


def render(report: dict[str, Any]) -> str:
    """Format bytes, adherence, speed and PSNR per model, and the list of files."""
    chunks = range(len(report[SCHEMES[0]]["psnr_db"]))
    rows = []
    for label in ("float", *SCHEMES):
        entry = report[label]
        rows.append(
            (
                label,
                f"{entry['bytes']:,}",
                f"{entry['bytes'] / report['float']['bytes']:.3f}",
                f"{entry['adherence']:.0%}",
                f"{entry['seconds_per_chunk']:.2f}",
                *(f"{psnr:.1f}" for psnr in entry.get("psnr_db", [])),
                *([""] * len(chunks) if "psnr_db" not in entry else []),
            )
        )
    header = ("model", "bytes", "of bf16", "adherence", "s/chunk", *(f"dB chunk {c}" for c in chunks))
    files = "\n".join(f"  {name}: {path}" for name, path in report["files"].items())
    return (
        f"{table(header, rows)}\n\nbytes: the quantized layers with scales (float: the same layers in bfloat16). "
        f"dB: PSNR of the frames against the float model on identical noise.\n\n{files}"
    )
