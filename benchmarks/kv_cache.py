"""Compare every K/V storage with the float model, whose cache has its own dtype, on identical noise.

    python benchmarks/kv_cache.py --scheme w8a8 --prompts 16 --chunks 30 --json runs/kv_cache.json

Per storage: PSNR of the first, the worst and the last chunk against the float model (of the last one also how far it
depends on the choice of prompts), adherence of the whole stream and of its last three chunks, bytes of the cache.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import load_bundled, write_json
from tqdm.auto import tqdm

from qarvd_diffusers import ARVDPipeline, QARVDConfig
from qarvd_diffusers.config import SCHEMES
from qarvd_diffusers.evaluation.fidelity import Rollout, compare, roll_out
from qarvd_diffusers.evaluation.moving_shapes import held_out_prompts, shows_prompt
from qarvd_diffusers.kv_cache.storage import STORAGES


def cache_bytes(pipe: ARVDPipeline, prompt: str, storage: str) -> int:
    """Measure the bytes of a stream's cache, which is allocated for the whole window."""
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


def describe(pipe: ARVDPipeline, expected: Rollout, got: Rollout, prompts: list[str], storage: str) -> dict[str, Any]:
    """Compute the figures of one storage."""
    tail = sum(len(chunk) for chunk in got.frames[0][-3:])
    videos = [(got.video(index), prompt) for index, prompt in enumerate(prompts)]
    return {
        **{name: value for name, value in compare(expected, got).items() if name.startswith("psnr")},
        "adherence": sum(shows_prompt(video, prompt) for video, prompt in videos) / len(prompts),
        "adherence_last_chunks": sum(shows_prompt(video[-tail:], prompt) for video, prompt in videos) / len(prompts),
        "bytes": cache_bytes(pipe, prompts[0], storage),
    }


def main() -> None:
    """Generate with every storage and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", choices=list(SCHEMES), help="quantize the model too (default: float)")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storages", nargs="*", default=list(STORAGES), choices=list(STORAGES))
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()

    prompts, pipe, reports = held_out_prompts(args.prompts, args.seed), load_bundled(), {}
    same = args.scheme is None and "auto" in args.storages  # that is the reference itself
    with tqdm(total=(1 + len(args.storages) - same) * args.prompts * args.chunks, unit="chunk") as bar:
        expected = roll_out(pipe, prompts, args.chunks, args.seed, bar.update)
        if args.scheme:
            pipe.quantize(QARVDConfig(args.scheme))
        for storage in args.storages:
            pipe.kv_cache = storage
            is_reference = same and storage == "auto"
            got = expected if is_reference else roll_out(pipe, prompts, args.chunks, args.seed, bar.update)
            reports[storage] = describe(pipe, expected, got, prompts, storage)
    print(
        "| storage | dB first | dB worst | dB last | 95 % interval | geometric mean | worst prompt | adherence "
        "| adherence, last 3 chunks | cache bytes |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for storage, report in reports.items():
        psnr, (low, high) = report["psnr_db"], report["psnr_interval_db"][-1]
        last = f"{psnr[-1]:.1f} | {low:.1f} to {high:.1f} | {report['psnr_geometric_db'][-1]:.1f}"
        print(
            f"| {storage} | {psnr[0]:.1f} | {min(psnr):.1f} | {last} | {report['psnr_worst_db'][-1]:.1f} | "
            f"{report['adherence']:.1%} | {report['adherence_last_chunks']:.1%} | {report['bytes']:,} |"
        )
    if args.json:
        write_json(reports, args.json)


if __name__ == "__main__":
    main()
