"""Describe the place of one transformer pass in a rollout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassInfo:
    """Place of one transformer pass in a rollout, passed to `on_pass` right before the pass runs.

    Attributes:
        chunk: index of the generated chunk; -1 for passes over initial latents.
        role: `"denoise"`, `"refresh"` (rewrites the chunk's K/V from its clean latents), `"context"` (fills the K/V
            cache from initial latents), `"recache"` (encodes the frames before the chunk again under a new prompt) or
            `"rebuild"` (encodes them again because the model keeps no K/V from chunk to chunk).
        step: index of the denoising step inside the chunk, or of the pass among those that rebuild; 0 for the other
            roles.
        timestep: the timestep that the transformer gets.
        frame_offset: absolute index of the first latent frame of the pass.
        num_frames: latent frames in the pass.
        chunks: where one pass spans several chunks, the chunk of every frame of it; `chunk` is then the last of them.
        share: weight of the pass in calibration. 1 if all chunks take equally many passes; 1/2 in a chunk of twice as
            many, since sensitivities are measured per chunk.
    """

    chunk: int
    role: str = "denoise"
    step: int = 0
    timestep: float = 0.0
    frame_offset: int = 0
    num_frames: int = 1
    share: float = 1.0
    chunks: tuple[int, ...] = ()
