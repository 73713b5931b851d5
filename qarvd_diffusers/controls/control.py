"""Define `Control`, what a user does during one chunk, and the keyboard that all user interfaces share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .camera import Intrinsics, as_intrinsics
from .poses import as_poses, motions, turned

TURN = 15.0  # degrees that a held arrow key turns the camera in a chunk
_ACTIONS = ("w", "a", "s", "d")  # order of the flags of `action_tensor`

# Key -> what it does; the names are those of `KeyboardEvent.key` in browsers, in lower case.
# move: right, down and forward; turn: right and up.
KEYS: dict[str, dict[str, tuple[float, ...]]] = {
    "w": {"move": (0, 0, 1)},
    "s": {"move": (0, 0, -1)},
    "a": {"move": (-1, 0, 0)},
    "d": {"move": (1, 0, 0)},
    "q": {"move": (0, 1, 0)},
    "e": {"move": (0, -1, 0)},
    "arrowleft": {"turn": (-1, 0)},
    "arrowright": {"turn": (1, 0)},
    "arrowup": {"turn": (0, 1)},
    "arrowdown": {"turn": (0, -1)},
}


def parse_keys(text: str) -> frozenset[str]:
    """Return the keys in a text such as `"w"`, `"wd arrowleft"`.

    Raises:
        ValueError: it names a key that does nothing.
    """
    keys: set[str] = set()
    for word in str(text).lower().split():
        found = {word} if word in KEYS else set(word)
        if unknown := sorted(found - KEYS.keys()):
            raise ValueError(f"keys are {text!r}: {unknown} do nothing, expected some of {', '.join(KEYS)}")
        keys |= found
    return frozenset(keys)


@dataclass(frozen=True, eq=False)
class Control:
    """Describe what a user does during one chunk. Without arguments, nothing: the camera stands still.

    Attributes:
        keys: keys that are held, see `parse_keys`; or a sequence of such texts, one per latent frame of the chunk.
        mouse: degrees by which the mouse turns the camera in the whole chunk, right and up.
        speed: length of the motion of one latent frame while a key is held; 1 is the largest of a recorded path.
        motions: `[F, 4, 4]`, one per latent frame, see `poses.motions`; what keys and mouse do comes on top.
        intrinsics: of the camera; None takes `Intrinsics.default()`.
        event: text of a prompt that applies from this chunk on, or None.

    Raises:
        ValueError: a value of another kind, or motions that are no rigid transforms.
    """

    keys: str | Sequence[str] = ""
    mouse: tuple[float, float] = (0.0, 0.0)
    speed: float = 1.0
    motions: Tensor | None = None
    intrinsics: Intrinsics | None = None
    event: str | None = None

    def __post_init__(self) -> None:
        per_frame = [self.keys] if isinstance(self.keys, str) else list(self.keys)
        for text in per_frame:
            parse_keys(text)
        numbers = torch.as_tensor([*self.mouse, self.speed], dtype=torch.float64)
        if len(numbers) != 3 or not numbers.isfinite().all() or self.speed < 0:
            raise ValueError(
                f"mouse is {self.mouse}, speed {self.speed}, expected degrees (right, up) and a length of at least 0"
            )
        object.__setattr__(self, "mouse", tuple(numbers[:2].tolist()))
        if self.motions is not None:
            object.__setattr__(self, "motions", as_poses(self.motions, "motions"))
        if self.intrinsics is not None:
            given = tuple(self.intrinsics)
            object.__setattr__(self, "intrinsics", as_intrinsics(given[:4], given[4:] or None))
        if self.event is not None and not (isinstance(self.event, str) and self.event.strip()):
            raise ValueError(f"event is {self.event!r}, expected a text, the prompt from this chunk on, or None")

    @classmethod
    def of(cls, value: Any, name: str = "controls") -> Control:
        """Return `value` as a `Control`: one, a text of keys, a mapping of its arguments, or None for nothing.

        Raises:
            ValueError: for anything else; names unknown arguments.
        """
        if isinstance(value, cls):
            return value
        if value is None or isinstance(value, str):
            return cls(value or "")
        known = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or (unknown := [key for key in value if key not in known]):
            got = f"has {unknown}" if isinstance(value, Mapping) else f"is a {type(value).__name__}"
            raise ValueError(
                f"{name} {got}, expected a Control, a text of keys such as 'w', or a mapping with some of {known}"
            )
        return cls(**value)

    def later(self) -> Control:
        """Return what is left of a control in the chunks after its own: keys are still held, the mouse has moved."""
        return replace(self, mouse=(0.0, 0.0), event=None)

    def check_frames(self, frames: int, name: str = "controls") -> None:
        """Check that what there is per latent frame is there for `frames` of them.

        Raises:
            ValueError: it has another length.
        """
        lengths = {"motions": None if self.motions is None else len(self.motions)}
        lengths["keys"] = None if isinstance(self.keys, str) else len(self.keys)
        for what, length in lengths.items():
            if length not in (None, frames):
                raise ValueError(f"{name}: {what} are for {length} latent frames, this chunk has {frames}")

    def held(self, frames: int) -> list[frozenset[str]]:
        """Return the keys that are held in each latent frame."""
        return [parse_keys(self.keys)] * frames if isinstance(self.keys, str) else [*map(parse_keys, self.keys)]

    def flags(self, frames: int) -> Tensor:
        """Return `[frames, 4]`, 1 where W, A, S or D is held."""
        return torch.tensor([[float(key in keys) for key in _ACTIONS] for keys in self.held(frames)])

    def frame_motions(self, frames: int, first: bool = False) -> Tensor:
        """Return the motion of each latent frame, float64 `[frames, 4, 4]`.

        Args:
            frames: latent frames of the chunk.
            first: the chunk begins the video: its first frame has nothing to move from.
        """
        result = []
        for keys in self.held(frames):
            move, (right, up) = torch.zeros(3, dtype=torch.float64), self.mouse
            for key in sorted(keys):
                move = move + torch.tensor(KEYS[key].get("move", (0, 0, 0)), dtype=torch.float64)
                right, up = (a + TURN * b for a, b in zip((right, up), KEYS[key].get("turn", (0, 0)), strict=True))
            motion = torch.eye(4, dtype=torch.float64)
            motion[:3, :3] = turned(right / frames, up / frames)
            motion[:3, 3] = self.speed * torch.nn.functional.normalize(move, dim=0)
            result.append(motion)
        if first:
            result[0] = torch.eye(4, dtype=torch.float64)
        own = torch.stack(result)
        return own if self.motions is None else self.motions @ own


def camera_path(
    poses: Tensor | Sequence,
    frames_per_chunk: Sequence[int],
    *,
    intrinsics: Intrinsics | Sequence[float] | None = None,
    translation_scale: float | None = None,
    keys: Sequence[str] | None = None,
    temporal_scale: int = 4,
    name: str = "poses",
) -> list[Control]:
    """Return the controls of a recorded camera path, one per chunk.

    Args:
        poses: `[N, 4, 4]`, one per pixel frame of the video, camera to world, x right, y down, z forward.
        frames_per_chunk: latent frames of each chunk, as `RolloutConfig.chunks` lists them.
        intrinsics: of the camera.
        translation_scale: see `poses.motions`. None, the longest step of the path, is what the released code does.
        keys: keys held in each pixel frame, or None.
        temporal_scale: pixel frames per latent frame after the first.
        name: of the path, for errors.

    Raises:
        ValueError: a pose is no rigid transform, or there are more or fewer of them (or of `keys`) than pixel frames.
    """
    poses = as_poses(poses, name)
    pixel_frames = 1 + temporal_scale * (sum(frames_per_chunk) - 1)
    for what, given in ((name, poses), ("keys", keys)):
        if given is not None and len(given) != pixel_frames:
            raise ValueError(
                f"{what} are for {len(given)} frames, the video has {pixel_frames} ({sum(frames_per_chunk)} latent "
                "frames): one per pixel frame is needed; interpolate them, or generate another number of chunks"
            )
    camera = None if intrinsics is None else as_intrinsics(tuple(intrinsics)[:4], tuple(intrinsics)[4:] or None)
    moves = motions(poses[::temporal_scale], translation_scale).split(list(frames_per_chunk))
    held = None if keys is None else list(keys[::temporal_scale])
    result, start = [], 0
    for move in moves:
        own = "" if held is None else held[start : start + len(move)]
        start += len(move)
        result.append(Control(own, speed=0.0 if held is not None else 1.0, motions=move, intrinsics=camera))
    return result
