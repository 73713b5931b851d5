"""Hold prompts that follow one another in a stream, as entries of a CONDITIONING."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from .compat import NodeError

CHUNK = "qarvd_chunk"  # of an entry: the first chunk that is generated with it, from 1
SWITCH = "qarvd_on_prompt_switch"
OVER = "qarvd_over_chunks"


@dataclass(frozen=True)
class PromptAt:
    """Hold a prompt and where it begins.

    Attributes:
        chunk: first chunk that is generated with it, from 1.
        embeds: `[1, tokens, text_dim]`.
        switch: see `Stream.set_prompt`; None takes the model's own.
        over_chunks: chunks over which embeddings change to these.
    """

    chunk: int
    embeds: torch.Tensor
    switch: str | None
    over_chunks: int

    def start(self, stream: Any) -> None:
        """Make the next chunk of a stream the first of this prompt.

        Raises:
            NodeError: if the switch and its number of chunks do not fit each other.
        """
        try:
            stream.set_prompt(prompt_embeds=self.embeds, on_prompt_switch=self.switch, over_chunks=self.over_chunks)
        except ValueError as error:
            raise NodeError(f"{error}.", "Change on_prompt_switch or over_chunks of the prompt schedule.") from error


def parse_schedule(text: str, chunks_per_prompt: int) -> list[tuple[int, str]]:
    """Read one prompt per line, `CHUNK: prompt` or `prompt`; return first chunks, from 1, and prompts.

    A line without a number begins `chunks_per_prompt` chunks after the line before it, the first one at chunk 1.

    Raises:
        NodeError: if there is no prompt, or the chunks do not begin at 1 and rise.
    """
    found: list[tuple[int, str]] = []
    for line in (line.strip() for line in text.splitlines()):
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"(\d+)\s*:\s*(.*)", line)
        following = found[-1][0] + chunks_per_prompt if found else 1
        chunk, prompt = (int(match[1]), match[2]) if match else (following, line)
        if not prompt:
            raise NodeError(f"The line {line!r} has no prompt.", "Write the prompt after the number and the colon.")
        if not found and chunk != 1:
            raise NodeError(f"The first prompt begins at chunk {chunk}.", "Let it begin at chunk 1.")
        if found and chunk <= found[-1][0]:
            raise NodeError(
                f"The prompt of chunk {chunk} comes after that of chunk {found[-1][0]}.",
                "Write the lines in the order of their chunks, one for each chunk.",
            )
        found.append((chunk, prompt))
    if not found:
        raise NodeError("The schedule has no prompt.", "Write one prompt per line, such as 4: a blue square.")
    return found


def schedule_of(positive: list, num_chunks: int) -> list[tuple[torch.Tensor, dict[str, Any], PromptAt]]:
    """Return embeddings, options and `PromptAt` of every prompt of a CONDITIONING, the first one first.

    Raises:
        NodeError: if several prompts are not a schedule, or one begins after the last chunk.
    """
    if len(positive) != 1 and not all(CHUNK in options for _, options in positive):
        raise NodeError(
            f"positive holds {len(positive)} prompts, expected one.",
            "Connect one prompt instead of Conditioning (Combine). To follow one prompt after the other, use Q-ARVD "
            "Prompt Schedule, or connect state to another Stream Generate with the next prompt.",
        )
    entries = []
    for embeds, options in positive:
        prompt = PromptAt(options.get(CHUNK, 1), embeds, options.get(SWITCH), options.get(OVER, 1))
        entries.append((embeds, options, prompt))
    chunks = [prompt.chunk for *_, prompt in entries]
    if chunks[0] != 1 or chunks != sorted(set(chunks)):
        raise NodeError(
            f"The prompts of positive begin at chunks {', '.join(map(str, chunks))}.",
            "Connect one Q-ARVD Prompt Schedule: its prompts begin at chunk 1, each at another chunk.",
        )
    if chunks[-1] > num_chunks:
        raise NodeError(
            f"A prompt begins at chunk {chunks[-1]}, but num_chunks is {num_chunks}.",
            f"Set num_chunks to {chunks[-1]} or more, or remove that prompt.",
        )
    return entries
