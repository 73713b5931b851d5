"""Compute with camera poses: check them, interpolate between key poses, and turn a path into motions.

A pose is a rigid transform `[4, 4]` from camera to world coordinates, in OpenCV's axes: x right, y down, z forward.
A motion is the pose of a frame as the camera of the frame before it sees it. Arithmetic is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_RIGID = 1e-3  # largest deviation of a rotation from an orthogonal matrix: poses are often stored in half precision
_STILL = 1e-9  # length of a motion, as a share of the distances in a path, that is rounding error
_PARALLEL = 1 - 1e-9  # cosine between quaternions from which on they are interpolated linearly


def as_poses(values: Tensor | Sequence, name: str) -> Tensor:
    """Return poses as float64 `[N, 4, 4]`.

    Args:
        values: `[N, 4, 4]`, a tensor, an array or nested lists.
        name: of the argument, for errors.

    Raises:
        ValueError: another shape, or a matrix that is no rigid transform; the message names the first one and why.
    """
    try:
        poses = torch.as_tensor(values).double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is not an array of numbers ({error}), expected [N, 4, 4]") from None
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or not len(poses):
        raise ValueError(f"{name} has shape {list(poses.shape)}, expected [N, 4, 4] with at least one pose")
    rotation = poses[:, :3, :3]
    error = (rotation.mT @ rotation - torch.eye(3, dtype=torch.float64)).abs().amax((1, 2))
    bottom = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64, device=poses.device)
    faults = {
        "has values that are not finite": ~poses.isfinite().all(2).all(1),
        "has another last row than 0 0 0 1": ((poses[:, 3] - bottom).abs() > _RIGID).any(1),
        "scales or shears: its columns are not orthonormal": ~(error <= _RIGID),
        "mirrors": torch.linalg.det(rotation.nan_to_num()) < 0,
    }
    for what, where in faults.items():
        if where.any():
            index = int(where.nonzero()[0])
            raise ValueError(f"{name}: pose {index} is no rigid transform, it {what}: {poses[index].tolist()}")
    return poses


def interpolate(keys: Sequence[tuple[float, Tensor]], times: Sequence[float]) -> Tensor:
    """Return poses `[len(times), 4, 4]` between key poses: translations are linear, rotations spherical.

    Args:
        keys: time and pose `[4, 4]` of each key, in any order; before the first and after the last key, the pose is
            theirs.
        times: of the result.

    Raises:
        ValueError: two keys have the same time, or there is none.
    """
    keys = sorted(keys, key=lambda key: key[0])
    known = [float(time) for time, _ in keys]
    if not keys or len(set(known)) < len(known):
        raise ValueError(f"key poses are at {known}, expected at least one, and each at a time of its own")
    poses = as_poses(torch.stack([torch.as_tensor(pose).double() for _, pose in keys]), "key poses")
    result = []
    for time in times:
        after = next((index for index, at in enumerate(known) if at >= time), len(known) - 1)
        before = max(0, after - 1) if known[after] > time else after
        share = 0.0 if before == after else (time - known[before]) / (known[after] - known[before])
        result.append(_between(poses[before], poses[after], share))
    return torch.stack(result)


def motions(poses: Tensor, scale: float | None = None) -> Tensor:
    """Return the motion of every frame of a path `[N, 4, 4]`; that of frame 0 is the identity.

    Args:
        poses: one pose per frame.
        scale: length of a translation that becomes 1; None takes the longest of the path, so that a later frame
            changes earlier ones: give a number where frames are generated before the path is known. A path that
            stands still is not divided.
    """
    moves = torch.cat([torch.eye(4, dtype=poses.dtype)[None], torch.linalg.inv(poses[:-1]) @ poses[1:]])
    length = moves[:, :3, 3].norm(dim=1).max().item() if scale is None else scale
    if length > _STILL * (1 + poses[:, :3, 3].abs().max().item()):
        moves[:, :3, 3] /= length
    return moves


def turned(yaw: float, pitch: float) -> Tensor:
    """Return the rotation `[3, 3]` that turns a camera right by `yaw` and up by `pitch` degrees."""
    (sin_y, cos_y), (sin_p, cos_p) = ((math.sin(a), math.cos(a)) for a in map(math.radians, (yaw, pitch)))
    right = torch.tensor([[cos_y, 0, sin_y], [0, 1, 0], [-sin_y, 0, cos_y]], dtype=torch.float64)
    up = torch.tensor([[1, 0, 0], [0, cos_p, -sin_p], [0, sin_p, cos_p]], dtype=torch.float64)
    return right @ up


def _between(first: Tensor, second: Tensor, share: float) -> Tensor:
    if share == 0:
        return first
    a, b = _quaternion(first[:3, :3]), _quaternion(second[:3, :3])
    cosine = float(a @ b)
    b, cosine = (b, cosine) if cosine >= 0 else (-b, -cosine)  # the shorter way round
    if cosine > _PARALLEL:
        mixed = (1 - share) * a + share * b
    else:
        angle = math.acos(cosine)
        mixed = (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = _rotation(mixed / mixed.norm())
    pose[:3, 3] = (1 - share) * first[:3, 3] + share * second[:3, 3]
    return pose


def _quaternion(rotation: Tensor) -> Tensor:
    """Return the unit quaternion (w, x, y, z) of `[3, 3]`: the largest eigenvector of Bar-Itzhack's matrix (2000)."""
    r = rotation
    k = torch.stack([
        torch.stack([r[0, 0] + r[1, 1] + r[2, 2], r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]]),
        torch.stack([r[2, 1] - r[1, 2], r[0, 0] - r[1, 1] - r[2, 2], r[1, 0] + r[0, 1], r[0, 2] + r[2, 0]]),
        torch.stack([r[0, 2] - r[2, 0], r[1, 0] + r[0, 1], r[1, 1] - r[0, 0] - r[2, 2], r[2, 1] + r[1, 2]]),
        torch.stack([r[1, 0] - r[0, 1], r[0, 2] + r[2, 0], r[2, 1] + r[1, 2], r[2, 2] - r[0, 0] - r[1, 1]]),
    ])  # fmt: skip
    return torch.linalg.eigh(k).eigenvectors[:, -1]


def _rotation(quaternion: Tensor) -> Tensor:
    """Return the rotation `[3, 3]` of a unit quaternion (w, x, y, z)."""
    w, x, y, z = quaternion.tolist()
    return torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )
