"""Every scheme on the bundled model against its float output: PSNR per chunk, adherence, bytes, seconds.

    python benchmarks/bundled_model.py --prompts 48 --chunks 7 --json runs/bundled_model.json

Prompts are held-out ones (combinations the model never saw in training); all models get identical noise and re-noise.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date

import diffusers
import torch
from tqdm.auto import tqdm

from qarvd_diffusers import ARVDPipeline, QARVDConfig, __version__, bundled_model_path
from qarvd_diffusers.config import SCHEMES
from qarvd_diffusers.evaluation.fidelity import compare, describe, roll_out
from qarvd_diffusers.evaluation.moving_shapes import adherence, held_out_prompts


def load() -> ARVDPipeline:
    pipe = ARVDPipeline.from_pretrained(bundled_model_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def judge(frames, prompt: str) -> bool:
    return adherence(frames, prompt).correct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--chunks", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--json", help="also write the numbers here")
    args = parser.parse_args()

    prompts = held_out_prompts(args.prompts, args.seed)
    reports = {}
    with tqdm(total=(1 + len(args.schemes)) * args.prompts * args.chunks, unit="chunk") as bar:
        pipe = load()
        expected = roll_out(pipe, prompts, args.chunks, args.seed, bar.update)
        reports["float32"] = describe(pipe, expected, prompts, judge)
        for scheme in args.schemes:
            pipe = load()
            pipe.quantize(QARVDConfig(scheme))
            got = roll_out(pipe, prompts, args.chunks, args.seed, bar.update)
            reports[scheme] = describe(pipe, got, prompts, judge) | compare(expected, got)

    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, diffusers {diffusers.__version__}, qarvd-diffusers {__version__}; "
        f"{args.prompts} prompts, {args.chunks} chunks, seed {args.seed}\n"
    )
    chunks = " | ".join(f"dB {chunk}" for chunk in range(args.chunks))
    print(f"| scheme | of bf16 bytes | adherence | last-chunk latent MSE | s/chunk | {chunks} |")
    print("|" + "---|" * (5 + args.chunks))
    for name, report in reports.items():
        size = report["quantized_layer_bytes_as_bfloat16"]
        ratio = f"{report['quantized_layer_bytes'] / size:.3f}" if size else ""
        mse = f"{report['latent_mse'][-1]:.2e}" if "latent_mse" in report else ""
        psnr = " | ".join(f"{value:.1f}" for value in report.get("psnr_db", [])) or " | " * (args.chunks - 1)
        print(f"| {name} | {ratio} | {report['adherence']:.1%} | {mse} | {report['seconds_per_chunk']:.3f} | {psnr} |")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(reports, file, indent=2)


if __name__ == "__main__":
    main()
