"""How fast the bundled model follows a new prompt, for each way of treating the cached frames.

    python benchmarks/prompt_switch.py --pairs 8

Streams run 5 chunks of one prompt, then 6 of another; the last three chunks are judged against the second one. The jump is
the mean absolute change (of 255) between the last frame before the switch and the first behind it.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from tqdm.auto import tqdm

from qarvd_diffusers import ARVDPipeline, bundled_model_path
from qarvd_diffusers.evaluation.fidelity import to_uint8
from qarvd_diffusers.evaluation.moving_shapes import adherence, held_out_prompts
from qarvd_diffusers.rollout.config import PROMPT_SWITCHES

HOWS = [how for how in PROMPT_SWITCHES if how != "cut"]  # the bundled model knows no shots
BEFORE, BEHIND, JUDGED = 5, 6, 3  # chunks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    args = parser.parse_args()
    pipe = ARVDPipeline.from_pretrained(bundled_model_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = held_out_prompts(2 * args.pairs)
    print("| on_prompt_switch | right | color | shape | motion | jump |")
    print("|---|---|---|---|---|---|")
    with tqdm(total=len(HOWS) * args.pairs * (BEFORE + BEHIND), unit="chunk") as bar:
        for how in HOWS:
            seen, jumps = [], []
            for seed in range(args.pairs):
                first, second = prompts[seed], prompts[args.pairs + seed]
                stream = pipe.stream(first, num_chunks=BEFORE + BEHIND, generator=torch.Generator().manual_seed(seed))
                chunks = []
                for chunk in stream:
                    chunks.append(to_uint8(chunk.frames[0]))
                    bar.update()
                    if chunk.index == BEFORE - 1:
                        stream.set_prompt(second, on_prompt_switch=how)
                seen.append(adherence(np.concatenate(chunks[-JUDGED:]), second))
                jumps.append(np.abs(chunks[BEFORE][0].astype(float) - chunks[BEFORE - 1][-1]).mean())
            share = [
                sum(getattr(each, name) for each in seen) / len(seen)
                for name in ("correct", "color", "shape", "motion")
            ]
            print(
                f"| {how} | " + " | ".join(f"{value:.0%}" for value in share) + f" | {np.mean(jumps):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
