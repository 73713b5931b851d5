"""Check that memory and time per chunk do not grow in a long stream of the bundled model, and that it does not drift.

    python benchmarks/endless.py --prompts 3 --chunks 120 --storages auto int8

Memory is the resident memory of the process (Linux, free pages returned first) or the memory allocated on the GPU.
Time is CPU time, which other work on the machine does not change, or wall time on a GPU. Both are medians over the
chunks 20-40 and over the last 20. Adherence is judged after every chunk, on the last three.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import load_bundled, write_json
from tqdm.auto import tqdm

from qarvd_diffusers import ARVDPipeline
from qarvd_diffusers.evaluation.fidelity import to_uint8
from qarvd_diffusers.evaluation.moving_shapes import held_out_prompts, shows_prompt
from qarvd_diffusers.kv_cache.storage import STORAGES

SETTLED = 20  # chunks until the window is full and the allocators have reached their size


def occupied_bytes(device: torch.device) -> int:
    """Measure the memory of the process, or that allocated on the GPU."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096


def line(row: dict[str, Any]) -> str:
    """Format a row of the table."""
    growth = row["bytes_last"] / row["bytes_then"] - 1
    wrong = ", ".join(spans([chunk for chunk, fine in row["right"].items() if not fine]))
    return (
        f"| {row['storage']} | {row['prompt']} | {row['bytes_then'] / 1e6:.1f} | {row['bytes_last'] / 1e6:.1f} | "
        f"{growth:+.2%} | {row['seconds_then']:.3f} | {row['seconds_last']:.3f} | {wrong or 'never'} |"
    )


def spans(numbers: list[int]) -> list[str]:
    """Format `[1, 2, 3, 7]` as `["1-3", "7"]`."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return [str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True)]


def watch(pipe: ARVDPipeline, prompt: str, seed: int, storage: str, chunks: int, bar: Any) -> dict[str, Any]:
    """Generate one stream, and take time, memory and adherence after every chunk."""
    seconds, memory, recent, right, clock = [], [], [], {}, time.process_time
    start = clock()
    generator = torch.Generator().manual_seed(seed)
    for chunk in pipe.stream(prompt, num_chunks=chunks, generator=generator, kv_cache=storage):
        bar.update()
        seconds.append(chunk.seconds if pipe.device.type == "cuda" else clock() - start)
        recent = [*recent[-2:], to_uint8(chunk.frames[0])]
        if chunk.index >= 2:
            right[chunk.index + 1] = shows_prompt(np.concatenate(recent), prompt)
        memory.append(occupied_bytes(pipe.device))
        start = clock()
    return {
        "storage": storage,
        "prompt": prompt,
        "seconds_then": statistics.median(seconds[SETTLED : 2 * SETTLED]),
        "seconds_last": statistics.median(seconds[-SETTLED:]),
        "bytes_then": statistics.median(memory[SETTLED : 2 * SETTLED]),
        "bytes_last": statistics.median(memory[-SETTLED:]),
        "right": right,
    }


def main() -> None:
    """Watch a stream per prompt and storage, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=120)
    parser.add_argument("--storages", nargs="*", default=["auto", "int8"], choices=list(STORAGES))
    parser.add_argument("--rope-mode", help="(default: the model's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()

    fields = {} if args.rope_mode is None else {"rope_mode": args.rope_mode}
    pipe = load_bundled(**fields).to(args.device)
    rows = []
    print("| storage | prompt | MB, chunks 20-40 | last 20 | growth | s/chunk 20-40 | last 20 | judged wrong at |")
    print("|---|---|---|---|---|---|---|---|")
    with tqdm(total=len(args.storages) * args.prompts * args.chunks, unit="chunk") as bar:
        for storage in args.storages:
            for seed, prompt in enumerate(held_out_prompts(args.prompts)):
                rows.append(watch(pipe, prompt, seed, storage, args.chunks, bar))
                print(line(rows[-1]), flush=True)
    if args.json:
        write_json(rows, args.json)


if __name__ == "__main__":
    main()
