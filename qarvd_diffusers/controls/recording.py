"""Read and write controls as JSON lines: what is done chunk by chunk, or key poses of a camera between frames.

One object per line. A first line may describe the recording:

    {"intrinsics": [500, 500, 416, 240], "size": [480, 832], "fps": 16, "translation_scale": 0.1}

Lines of chunks have the arguments of `Control`. They hold until the next line, except for mouse and event; `chunk` is
the chunk that a line begins with, by default the one after the line before:

    {"keys": "w", "event": "a forest at dawn"}
    {"chunk": 4, "keys": "w arrowleft", "mouse": [0, 5]}

Lines of a path have a pixel frame and the pose of the camera in it, and may have an event, and keys that hold until
the next line. Frames between are interpolated; the first frame is 0, the last is the last of the video:

    {"frame": 0, "pose": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]}
    {"frame": 80, "pose": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1]]}
"""

from __future__ import annotations

import dataclasses
import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..files.atomic import atomic_file
from ..files.schema import check_mapping, parse_json
from ..files.text import read_text
from .camera import Intrinsics, as_intrinsics
from .control import Control, camera_path
from .poses import as_poses, interpolate

_HEADER = {
    "intrinsics": list[float],
    "size": list[int],
    "fps": float,
    "translation_scale": float | None,
}
_POSE = {"frame": int, "pose": list[list[float]], "event": str | None, "keys": str}
_CHUNK = {
    "chunk": int,
    "keys": str | list[str],
    "mouse": list[float],
    "speed": float,
    "motions": list[list[list[float]]],
    "event": str | None,
}


@dataclass(frozen=True)
class Recording:
    """Hold the controls of a file.

    Attributes:
        name: of the file, for errors.
        chunks: chunk -> control that holds from it on, in order; empty for a path.
        path: lines of a path: frame, pose, keys and event; empty for chunks.
        intrinsics: of the camera, or None.
        fps: frames per second that the path was recorded at, or None.
        translation_scale: see `poses.motions`.
    """

    name: str
    chunks: Mapping[int, Control]
    path: Sequence[Mapping[str, Any]] = ()
    intrinsics: Intrinsics | None = None
    fps: float | None = None
    translation_scale: float | None = None

    def controls(
        self, frames_per_chunk: Sequence[int], fps: float | None = None, temporal_scale: int = 4
    ) -> list[Control]:
        """Return the control of every chunk.

        Args:
            frames_per_chunk: latent frames of each chunk.
            fps: frames per second of the model, or None if it has none.
            temporal_scale: pixel frames per latent frame after the first.

        Raises:
            ValueError: the recording has another rate, ends at another frame, or has lines for chunks that there are
                not; the message names the file.
        """
        if self.fps is not None and fps is not None and self.fps != fps:
            raise ValueError(
                f"{self.name} was recorded at {self.fps:g} frames per second, the model makes {fps:g}: resample it"
            )
        if self.path:
            return self._along_path(list(frames_per_chunk), temporal_scale)
        if beyond := [chunk for chunk in self.chunks if chunk >= len(frames_per_chunk)]:
            raise ValueError(
                f"{self.name} has controls for chunk {beyond[0]}, the video has {len(frames_per_chunk)} chunks, "
                "counted from 0"
            )
        controls = [self.control(chunk) for chunk in range(len(frames_per_chunk))]
        for chunk, (control, frames) in enumerate(zip(controls, frames_per_chunk, strict=True)):
            control.check_frames(frames, f"{self.name}: chunk {chunk}")
        return controls

    def control(self, chunk: int) -> Control:
        """Return the control of a chunk, for a recording of chunks and a video without end."""
        if self.path:
            raise ValueError(f"{self.name} is a path, which ends: give a number of chunks")
        start = max((begin for begin in self.chunks if begin <= chunk), default=None)
        if start is None:
            return Control(intrinsics=self.intrinsics)
        control = self.chunks[start]
        return control if start == chunk else control.later()

    def _along_path(self, frames_per_chunk: Sequence[int], temporal_scale: int) -> list[Control]:
        last = temporal_scale * (sum(frames_per_chunk) - 1)
        first, end = self.path[0]["frame"], self.path[-1]["frame"]
        if (first, end) != (0, last):
            raise ValueError(
                f"{self.name} has poses for the frames {first} to {end}, the video has the frames 0 to {last} "
                f"({len(frames_per_chunk)} chunks): change its lines, or generate another number of chunks"
            )
        keys = [(line["frame"], torch.tensor(line["pose"], dtype=torch.float64)) for line in self.path]
        poses = interpolate(keys, range(last + 1))
        held = None
        if any("keys" in line for line in self.path):
            starts = [frame for frame, _ in keys]
            held = [self.path[bisect_right(starts, frame) - 1].get("keys", "") for frame in range(last + 1)]
        path = camera_path(
            poses,
            frames_per_chunk,
            intrinsics=self.intrinsics,
            translation_scale=self.translation_scale,
            keys=held,
            temporal_scale=temporal_scale,
            name=self.name,
        )
        ends = [temporal_scale * (sum(frames_per_chunk[: index + 1]) - 1) for index in range(len(frames_per_chunk))]
        for line in self.path:
            if line.get("event") is not None:
                chunk = next(index for index, end in enumerate(ends) if line["frame"] <= end)
                path[chunk] = dataclasses.replace(path[chunk], event=line["event"])
        return path


def read_controls(path: str | os.PathLike[str]) -> Recording:
    """Read a file of JSON lines.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is damaged, has an unknown or unsuitable entry, or does not go with the lines before; the
            message names file and line.
    """
    return parse_recording(read_text(path), os.fspath(path))


def parse_recording(text: str, name: str) -> Recording:
    """Read the text of such a file; errors are those of `read_controls`, and name it as `name`."""
    numbered = enumerate(text.splitlines(), 1)
    lines = [(f"{name}, line {number}", text) for number, text in numbered if text.strip()]
    first = parse_json(lines[0][1], lines[0][0]) if lines else {}
    header: Mapping[str, Any] = {}
    if first.keys() & _HEADER.keys():
        header = check_mapping(first, _HEADER, lines.pop(0)[0], optional=tuple(_HEADER))
        first = parse_json(lines[0][1], lines[0][0]) if lines else {}
    if not lines:
        raise ValueError(f"{name} has no controls, expected one JSON object per line")
    camera = None
    if "intrinsics" in header:
        camera = as_intrinsics(header["intrinsics"], header.get("size"), f"{name}: intrinsics")
    rest = (camera, header.get("fps"), header.get("translation_scale"))
    if "pose" in first:
        return Recording(name, {}, _read_path(lines), *rest)
    return Recording(name, _read_chunks(lines, camera), (), *rest)


def parse_control(text: str, where: str, camera: Intrinsics | None = None) -> tuple[int | None, Control]:
    """Read one line of chunks.

    Args:
        text: JSON.
        where: file and line, for errors.
        camera: intrinsics of the recording.

    Returns:
        The chunk that it begins with, if it says so, and the control.

    Raises:
        ValueError: it is damaged, or has an unknown or unsuitable entry.
    """
    line = dict(check_mapping(parse_json(text, where), _CHUNK, where, optional=tuple(_CHUNK)))
    chunk = line.pop("chunk", None)
    try:
        return chunk, Control(**{"intrinsics": camera, **line})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read_path(lines: Sequence[tuple[str, str]]) -> list[Mapping[str, Any]]:
    path: list[Mapping[str, Any]] = []
    for where, text in lines:
        line = check_mapping(parse_json(text, where), _POSE, where, optional=("event", "keys"))
        if path and line["frame"] <= path[-1]["frame"]:
            raise ValueError(f"{where}: frame {line['frame']} does not come after frame {path[-1]['frame']}")
        as_poses([line["pose"]], f"{where}: pose")
        Control(line.get("keys", ""), event=line.get("event"))
        path.append(line)
    return path


def _read_chunks(lines: Sequence[tuple[str, str]], camera: Intrinsics | None) -> dict[int, Control]:
    chunks: dict[int, Control] = {}
    chunk = 0
    for where, text in lines:
        begin, control = parse_control(text, where, camera)
        begin = chunk if begin is None else begin
        if begin < chunk:
            raise ValueError(f"{where}: chunk {begin} does not come after chunk {chunk - 1}")
        chunks[begin] = control
        chunk = begin + 1
    return chunks


def write_controls(path: str | os.PathLike[str], controls: Sequence[Control]) -> None:
    """Write the controls of the chunks of a video, one line each, for `read_controls`.

    Raises:
        ValueError: they have different intrinsics.
    """
    cameras = {control.intrinsics for control in controls}
    if len(cameras) > 1:
        raise ValueError(f"controls have {len(cameras)} different intrinsics, a file has one line for all chunks")
    camera = next(iter(cameras), None)
    lines = [] if camera is None else [{"intrinsics": list(camera[:4]), "size": list(camera[4:])}]
    for control in controls:
        plain = {name: getattr(control, name) for name in ("keys", "mouse", "speed", "event")}
        plain = {name: value for name, value in plain.items() if value != getattr(_NOTHING, name)}
        if control.motions is not None:
            plain["motions"] = control.motions.tolist()
        lines.append(plain)
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


_NOTHING = Control()
