"""What K/V storage costs: every storage against the float model with its own dtype's cache, on identical noise.

    python benchmarks/kv_cache.py --scheme w8a8 --prompts 16 --chunks 30 --json runs/kv_cache.json

Per storage: PSNR of the first, the worst and the last chunk against the float model, adherence of the whole stream and of
its last three chunks, bytes of the cache.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from qarvd_diffusers import ARVDPipeline, QARVDConfig, bundled_model_path
from qarvd_diffusers.config import SCHEMES
from qarvd_diffusers.evaluation.fidelity import compare, roll_out
from qarvd_diffusers.evaluation.moving_shapes import adherence, held_out_prompts
from qarvd_diffusers.kv_cache.storage import STORAGES


def load() -> ARVDPipeline:
    pipe = ARVDPipeline.from_pretrained(bundled_model_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cache_bytes(pipe: ARVDPipeline, prompt: str, storage: str) -> int:
    """Bytes of a stream's cache once its window is full."""
    caches, make_cache = [], pipe.make_cache
    pipe.make_cache = lambda *args, **kwargs: caches.append(make_cache(*args, **kwargs)) or caches[0]
    try:
        stream = pipe.stream(prompt, kv_cache=storage, output_type="latent")
        next(stream)
        size = sum(layer.key.nbytes + layer.value.nbytes for layer in caches[0].layers)
        stream.close()
    finally:
        del pipe.make_cache
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", choices=list(SCHEMES), help="quantize the model too (default: float)")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storages", nargs="*", default=list(STORAGES), choices=list(STORAGES))
    parser.add_argument("--json", help="also write the numbers here")
    args = parser.parse_args()

    prompts, pipe, reports = held_out_prompts(args.prompts, args.seed), load(), {}
    same = args.scheme is None and "auto" in args.storages  # the reference itself
    with tqdm(total=(1 + len(args.storages) - same) * args.prompts * args.chunks, unit="chunk") as bar:
        expected = roll_out(pipe, prompts, args.chunks, args.seed, bar.update)
        if args.scheme:
            pipe.quantize(QARVDConfig(args.scheme))
        for storage in args.storages:
            pipe.kv_cache = storage
            is_reference = same and storage == "auto"
            got = expected if is_reference else roll_out(pipe, prompts, args.chunks, args.seed, bar.update)
            videos = [got.video(index) for index in range(args.prompts)]
            tail = sum(len(chunk) for chunk in got.frames[0][-3:])
            reports[storage] = {
                "psnr_db": compare(expected, got)["psnr_db"],
                "adherence": sum(adherence(v, p).correct for v, p in zip(videos, prompts, strict=True)) / len(prompts),
                "adherence_last_chunks": sum(
                    adherence(v[-tail:], p).correct for v, p in zip(videos, prompts, strict=True)
                )
                / len(prompts),
                "bytes": cache_bytes(pipe, prompts[0], storage),
            }
    print("| storage | dB first | dB worst | dB last | adherence | adherence, last 3 chunks | cache bytes |")
    print("|---|---|---|---|---|---|---|")
    for storage, report in reports.items():
        psnr = report["psnr_db"]
        print(
            f"| {storage} | {psnr[0]:.1f} | {min(psnr):.1f} | {psnr[-1]:.1f} | {report['adherence']:.1%} | "
            f"{report['adherence_last_chunks']:.1%} | {report['bytes']:,} |"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(reports, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
