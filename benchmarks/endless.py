"""A long stream of the bundled model: does memory or time per chunk grow, does the picture drift?

    python benchmarks/endless.py --prompts 3 --chunks 120 --storages auto int8

Memory is what the process occupies (Linux, free pages given back first) or what is allocated on the GPU; time is CPU time,
which other work on the machine does not change, or wall time on a GPU. Both are medians over the chunks 20-40 and over the
last 20. Adherence is judged after every chunk, on the last three.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from qarvd_diffusers import ARVDPipeline, bundled_model_path
from qarvd_diffusers.evaluation.fidelity import to_uint8
from qarvd_diffusers.evaluation.moving_shapes import adherence, held_out_prompts
from qarvd_diffusers.kv_cache.storage import STORAGES

SETTLED = 20  # chunks until the window is full and allocators have what they need


def occupied_bytes(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096


def line(row: dict) -> str:
    growth = row["bytes_last"] / row["bytes_then"] - 1
    wrong = ", ".join(spans([chunk for chunk, fine in row["right"].items() if not fine]))
    return (
        f"| {row['storage']} | {row['prompt']} | {row['bytes_then'] / 1e6:.1f} | {row['bytes_last'] / 1e6:.1f} | "
        f"{growth:+.2%} | {row['seconds_then']:.3f} | {row['seconds_last']:.3f} | {wrong or 'never'} |"
    )


def spans(numbers: list[int]) -> list[str]:
    """`[1, 2, 3, 7]` -> `["1-3", "7"]`."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return [str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=120)
    parser.add_argument("--storages", nargs="*", default=["auto", "int8"], choices=list(STORAGES))
    parser.add_argument("--rope-mode", help="instead of the model's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="also write the numbers here")
    args = parser.parse_args()

    fields = {} if args.rope_mode is None else {"rope_mode": args.rope_mode}
    pipe = ARVDPipeline.from_pretrained(bundled_model_path(), dtype=torch.float32, **fields).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    print("| storage | prompt | MB, chunks 20-40 | last 20 | growth | s/chunk 20-40 | last 20 | judged wrong at |")
    print("|---|---|---|---|---|---|---|---|")
    with tqdm(total=len(args.storages) * args.prompts * args.chunks, unit="chunk") as bar:
        for storage in args.storages:
            for seed, prompt in enumerate(held_out_prompts(args.prompts)):
                seconds, memory, recent, right, clock = [], [], [], {}, time.process_time
                start = clock()
                generator = torch.Generator().manual_seed(seed)
                for chunk in pipe.stream(prompt, num_chunks=args.chunks, generator=generator, kv_cache=storage):
                    bar.update()
                    seconds.append(chunk.seconds if pipe.device.type == "cuda" else clock() - start)
                    recent = [*recent[-2:], to_uint8(chunk.frames[0])]
                    if chunk.index >= 2:
                        right[chunk.index + 1] = adherence(np.concatenate(recent), prompt).correct
                    memory.append(occupied_bytes(pipe.device))
                    start = clock()
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
                print(line(rows[-1]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
