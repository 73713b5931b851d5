"""Measure how fast the bundled model follows a new prompt, for each way of treating the cached frames.

    python benchmarks/prompt_switch.py --pairs 8

Streams run 5 chunks of one prompt, then 6 of another; the last three chunks are judged by the second prompt. The jump
is the mean absolute change (of 255) from the last frame before the switch to the first frame after it.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from common import load_bundled
from tqdm.auto import tqdm

from qarvd_diffusers.evaluation.fidelity import to_uint8
from qarvd_diffusers.evaluation.moving_shapes import adherence, held_out_prompts
from qarvd_diffusers.rollout.config import PROMPT_SWITCHES

SWITCHES = [switch for switch in PROMPT_SWITCHES if switch != "cut"]  # the bundled model has no shots
BEFORE, AFTER, JUDGED = 5, 6, 3  # chunks


def main() -> None:
    """Stream every pair of prompts with every setting, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    args = parser.parse_args()
    pipe = load_bundled()
    prompts = held_out_prompts(2 * args.pairs)
    print("| on_prompt_switch | right | color | shape | motion | jump |")
    print("|---|---|---|---|---|---|")
    with tqdm(total=len(SWITCHES) * args.pairs * (BEFORE + AFTER), unit="chunk") as bar:
        for switch in SWITCHES:
            judged, jumps = [], []
            for seed in range(args.pairs):
                first, second = prompts[seed], prompts[args.pairs + seed]
                stream = pipe.stream(first, num_chunks=BEFORE + AFTER, generator=torch.Generator().manual_seed(seed))
                chunks = []
                for chunk in stream:
                    chunks.append(to_uint8(chunk.frames[0]))
                    bar.update()
                    if chunk.index == BEFORE - 1:
                        stream.set_prompt(second, on_prompt_switch=switch)
                judged.append(adherence(np.concatenate(chunks[-JUDGED:]), second))
                jumps.append(np.abs(chunks[BEFORE][0].astype(float) - chunks[BEFORE - 1][-1]).mean())
            names = ("correct", "color", "shape", "motion")
            share = [sum(getattr(video, name) for video in judged) / len(judged) for name in names]
            print(
                f"| {switch} | " + " | ".join(f"{value:.0%}" for value in share) + f" | {np.mean(jumps):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
