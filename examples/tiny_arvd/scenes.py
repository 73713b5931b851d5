"""Rendering of moving-shapes scenes on the training device.

What the caption leaves open (start position, phase) is a function of eight standard normal numbers per clip, four for
each sprite: a phase from the angle of the first two, an offset in [-1, 1]^2 from the normal quantiles of the others.
The transformer reads those numbers from its initial noise (see `coupling.py`), so that prompt and noise determine the
clip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch

from qarvd_diffusers.evaluation.moving_shapes import (
    BACKGROUNDS,
    COLORS,
    FRAME_SIZE,
    MOTIONS,
    ORBIT_RADIUS,
    PULSE_DEPTH,
    PULSE_PERIOD,
    SHAPES,
    SIZES,
    TRAVEL_PERIOD,
    Scene,
    sample_scene,
    shape_distance,
)

MOTION_NAMES = tuple(MOTIONS)
NUM_STATES = 8  # standard normal numbers that fix what a caption leaves open


@dataclass
class SceneBatch:
    """Scenes as tensors; N clips, two sprite slots each (an unused slot has radius 0)."""

    shape: torch.Tensor  # int64 [N, 2]
    motion: torch.Tensor  # int64 [N, 2], index into MOTION_NAMES
    radius: torch.Tensor  # [N, 2] pixels
    color: torch.Tensor  # [N, 2, 3] in [-1, 1]
    center: torch.Tensor  # [N, 2, 2] pixels, (x, y)
    spread: torch.Tensor  # [N, 2, 2] pixels, range of the random offset
    background: torch.Tensor  # [N, 3] in [-1, 1]

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index) -> SceneBatch:
        return SceneBatch(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device) -> SceneBatch:
        return SceneBatch(*(getattr(self, field.name).to(device) for field in fields(self)))

    @classmethod
    def from_scenes(cls, scenes: list[Scene]) -> SceneBatch:
        rows = [_scene_row(scene) for scene in scenes]
        columns = [torch.from_numpy(np.array(column)) for column in zip(*rows, strict=True)]
        return cls(*(column if column.dtype == torch.int64 else column.float() for column in columns))


def _scene_row(scene: Scene):
    shape, motion, radius, color, center, spread = [], [], [], [], [], []
    for slot in range(2):
        sprite = scene.sprites[slot] if slot < len(scene.sprites) else None
        shape.append(SHAPES.index(sprite.shape) if sprite else 0)
        motion.append(MOTION_NAMES.index(sprite.motion) if sprite else 0)
        radius.append(SIZES[sprite.size] if sprite else 0.0)
        color.append([c / 127.5 - 1 for c in COLORS[sprite.color]] if sprite else [0.0] * 3)
        if len(scene.sprites) == 2:
            center.append([32.0, 16.0 + 32.0 * slot])
            spread.append([16.0, 2.0])
        else:
            center.append([32.0, 32.0])
            orbiting = sprite is not None and "clockwise" in sprite.motion
            spread.append([3.0, 3.0] if orbiting else [12.0, 12.0])
    background = [c / 127.5 - 1 for c in BACKGROUNDS[scene.background]]
    return shape, motion, radius, color, center, spread, background


def sample_scenes(count: int, seed: int, held_out: bool = False) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, held_out) for _ in range(count)]


def trajectory(scenes: SceneBatch, state: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Positions x, y and radius, each [N, 2, F], at the frames `time` [F] for states [N, 8]."""
    state = state.view(-1, 2, 4, 1)
    phase = torch.atan2(state[:, :, 1], state[:, :, 0])  # [N, 2, 1]
    offset = torch.special.ndtr(state[:, :, 2:, 0]) * 2 - 1  # [N, 2, 2]
    rest = scenes.center + scenes.spread * offset
    travel = FRAME_SIZE * (phase / (2 * math.pi) + 0.5)
    step = FRAME_SIZE * time / TRAVEL_PERIOD
    angle = 2 * math.pi * time / TRAVEL_PERIOD
    x = rest[:, :, :1].expand(-1, -1, len(time)).clone()
    y = rest[:, :, 1:].expand(-1, -1, len(time)).clone()
    radius = scenes.radius[:, :, None].expand(-1, -1, len(time)).clone()

    def where(name: str, value: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
        return torch.where((scenes.motion == MOTION_NAMES.index(name))[:, :, None], value, otherwise)

    x = where("left", travel - step, where("right", travel + step, x))
    y = where("up", travel - step, where("down", travel + step, y))
    for name, sign in (("clockwise", 1.0), ("counterclockwise", -1.0)):
        turn = phase + sign * angle
        x, y = where(name, x + ORBIT_RADIUS * turn.cos(), x), where(name, y + ORBIT_RADIUS * turn.sin(), y)
    swell = 1 + PULSE_DEPTH * torch.sin(phase + 2 * math.pi * time / PULSE_PERIOD)
    return x, y, where("pulse", radius * swell, radius)


def render(scenes: SceneBatch, state: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Video [N, 3, F, 64, 64] in [-1, 1], anti-aliased, on a picture that wraps around at its edges."""
    device = scenes.radius.device
    x, y, radius = trajectory(scenes, state, torch.arange(num_frames, device=device))
    grid = torch.arange(FRAME_SIZE, device=device) + 0.5
    half = FRAME_SIZE / 2
    video = scenes.background[:, :, None, None, None].expand(-1, -1, num_frames, FRAME_SIZE, FRAME_SIZE)
    for slot in range(2):
        dx = ((grid - x[:, slot, :, None] + half) % FRAME_SIZE - half)[:, :, None, :]  # [N, F, 1, 64]
        dy = ((grid - y[:, slot, :, None] + half) % FRAME_SIZE - half)[:, :, :, None]  # [N, F, 64, 1]
        size = radius[:, slot, :, None, None]
        distance = torch.full((1, 1, 1, 1), 1e3, device=device)
        for index, shape in enumerate(SHAPES):
            chosen = (scenes.shape[:, slot] == index) & (scenes.radius[:, slot] > 0)
            if chosen.any():
                own = shape_distance(shape, dx, dy, size, xp=torch)
                distance = torch.where(chosen[:, None, None, None], own, distance)
        coverage = (0.5 - distance).clamp(0, 1)[:, None]
        video = video + coverage * (scenes.color[:, slot, :, None, None, None] - video)
    return video


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """[N, 3, F, H, W] in [-1, 1] -> uint8 [N, F, H, W, 3]."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()
