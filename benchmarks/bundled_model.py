"""Compare every scheme on the bundled model with its float output: PSNR per chunk, adherence, bytes, seconds.

    python benchmarks/bundled_model.py --prompts 48 --chunks 7 --json runs/bundled_model.json

The prompts are held out: training never showed these combinations. All models get identical noise and re-noise.
"""

from __future__ import annotations

import argparse
import platform
from datetime import date
from typing import Any

import diffusers
import torch
from common import load_bundled, write_json
from tqdm.auto import tqdm

from qarvd_diffusers import QARVDConfig, __version__
from qarvd_diffusers.config import SCHEMES
from qarvd_diffusers.evaluation.fidelity import compare, describe, roll_out
from qarvd_diffusers.evaluation.moving_shapes import held_out_prompts, shows_prompt


def print_table(reports: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Print versions and conditions, then a row per scheme."""
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, diffusers {diffusers.__version__}, qarvd-diffusers {__version__}; "
        f"{args.prompts} prompts, {args.chunks} chunks, seed {args.seed}\n"
    )
    chunks = " | ".join(f"dB {chunk}" for chunk in range(args.chunks))
    last = "last chunk: 95 % interval | geometric mean | worst prompt"
    print(f"| scheme | of bf16 bytes | adherence | last-chunk latent MSE | s/chunk | {chunks} | {last} |")
    print("|" + "---|" * (8 + args.chunks))
    for name, report in reports.items():
        size = report["quantized_layer_bytes_as_bfloat16"]
        ratio = f"{report['quantized_layer_bytes'] / size:.3f}" if size else ""
        mse = f"{report['latent_mse'][-1]:.2e}" if "latent_mse" in report else ""
        psnr = " | ".join(f"{value:.1f}" for value in report.get("psnr_db", [])) or " | " * (args.chunks - 1)
        spread = " | | "
        if "psnr_interval_db" in report:
            low, high = report["psnr_interval_db"][-1]
            spread = (
                f"{low:.1f} to {high:.1f} | {report['psnr_geometric_db'][-1]:.1f} | {report['psnr_worst_db'][-1]:.1f}"
            )
        figures = f"{report['adherence']:.1%} | {mse} | {report['seconds_per_chunk']:.3f} | {psnr} | {spread}"
        print(f"| {name} | {ratio} | {figures} |")


def main() -> None:
    """Generate with the float model and every scheme, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()

    prompts = held_out_prompts(args.prompts, args.seed)
    reports = {}
    with tqdm(total=(1 + len(args.schemes)) * args.prompts * args.chunks, unit="chunk") as bar:
        pipe = load_bundled()
        expected = roll_out(pipe, prompts, args.chunks, args.seed, bar.update)
        reports["float32"] = describe(pipe, expected, prompts, shows_prompt)
        for scheme in args.schemes:
            pipe = load_bundled()
            pipe.quantize(QARVDConfig(scheme))
            got = roll_out(pipe, prompts, args.chunks, args.seed, bar.update)
            reports[scheme] = describe(pipe, got, prompts, shows_prompt) | compare(expected, got)

    print_table(reports, args)
    if args.json:
        write_json(reports, args.json)


if __name__ == "__main__":
    main()
