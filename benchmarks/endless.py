"""A long stream of the bundled model: does memory or time per chunk grow, does the picture drift?

    python benchmarks/endless.py --prompts 3 --chunks 120 --storages auto int8

Memory is what the process occupies (Linux, free pages given back first) or what is allocated on the GPU. Memory and time
are medians over the chunks 20-40 and over the last 20. Adherence is judged on the three chunks that end at each tenth chunk.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from qarvd_diffusers import ARVDPipeline, bundled_model_path
from qarvd_diffusers.evaluation.fidelity import to_uint8
from qarvd_diffusers.evaluation.moving_shapes import adherence, held_out_prompts
from qarvd_diffusers.models.kv_storage import STORAGES

SETTLED = 20  # chunks until the window is full and allocators have what they need


def occupied_bytes(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=120)
    parser.add_argument("--storages", nargs="*", default=["auto", "int8"], choices=list(STORAGES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="also write the numbers here")
    args = parser.parse_args()

    pipe = ARVDPipeline.from_pretrained(bundled_model_path(), dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    marks = range(10, args.chunks + 1, 10)
    rows = []
    with tqdm(total=len(args.storages) * args.prompts * args.chunks, unit="chunk") as bar:
        for storage in args.storages:
            for seed, prompt in enumerate(held_out_prompts(args.prompts)):
                seconds, memory, recent, right = [], [], [], {}
                generator = torch.Generator().manual_seed(seed)
                for chunk in pipe.stream(prompt, num_chunks=args.chunks, generator=generator, kv_cache=storage):
                    bar.update()
                    seconds.append(chunk.seconds)
                    recent = [*recent[-2:], to_uint8(chunk.frames[0])]
                    if chunk.index + 1 in marks:
                        right[chunk.index + 1] = adherence(np.concatenate(recent), prompt).correct
                    memory.append(occupied_bytes(pipe.device))
                rows.append(
                    {
                        "storage": storage,
                        "prompt": prompt,
                        "seconds_then": statistics.median(seconds[SETTLED : 2 * SETTLED]),
                        "seconds_last": statistics.median(seconds[-SETTLED:]),
                        "bytes_then": statistics.median(memory[SETTLED : 2 * SETTLED]),
                        "bytes_last": statistics.median(memory[-SETTLED:]),
                        "right": right,
                    }
                )
    print("| storage | prompt | MB, chunks 20-40 | last 20 | growth | s/chunk 20-40 | last 20 | judged right |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        growth = row["bytes_last"] / row["bytes_then"] - 1
        good = f"{sum(row['right'].values())} of {len(row['right'])}"
        print(
            f"| {row['storage']} | {row['prompt']} | {row['bytes_then'] / 1e6:.1f} | {row['bytes_last'] / 1e6:.1f} | "
            f"{growth:+.2%} | {row['seconds_then']:.3f} | {row['seconds_last']:.3f} | {good} |"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
