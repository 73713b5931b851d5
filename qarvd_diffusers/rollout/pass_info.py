"""`PassInfo`: where in a rollout one transformer pass stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassInfo:
    """Position of one transformer pass, handed to `on_pass` right before the pass runs.

    Attributes:
        chunk: index of the generated chunk; passes over given initial latents carry -1.
        role: `"denoise"`, `"refresh"` (rewrites the chunk's K/V from its clean latents), `"context"` (fills the K/V cache
            from given initial latents), `"recache"` (encodes the frames before the chunk anew under a new prompt) or
            `"rebuild"` (encodes them anew because the model keeps no K/V from chunk to chunk).
        step: index of the denoising step inside the chunk, or of the pass among those that rebuild; 0 for the other roles.
        timestep: timestep the transformer is given.
        frame_offset: absolute index of the first latent frame of the pass.
        num_frames: latent frames in the pass.
        share: what the pass counts beside others in calibration. 1 where all chunks take equally many passes; in a chunk of
            twice as many each counts half, since sensitivities are measured, and given, per chunk.
    """

    chunk: int
    role: str
    step: int
    timestep: float
    frame_offset: int
    num_frames: int
    share: float = 1.0
