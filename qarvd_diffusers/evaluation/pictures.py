"""Write contact sheets and video files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..files.atomic import atomic_file

_TILE = 128  # pixels; small videos are enlarged without smoothing, so that errors stay visible
_MARGIN, _GAP = 8, 4

_CONTAINERS = (".mp4", ".mov", ".mkv", ".avi", ".wmv")  # of H.264
_MOVING_PICTURES = (".gif", ".webp")


def check_video_name(path: str | os.PathLike[str]) -> None:
    """Check that `video_writer` can write a file of this name.

    Raises:
        ValueError: the suffix is not that of a format that can be written.
        IsADirectoryError: `path` is a folder.
    """
    suffixes = (*_CONTAINERS, *_MOVING_PICTURES)
    if Path(path).suffix.lower() not in suffixes:
        raise ValueError(f"{path}: expected a file name that ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file name")


@contextmanager
def video_writer(path: str | os.PathLike[str], fps: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function that appends one frame, uint8 `[height, width, 3]`; the file appears when it is complete.

    The file is read back, since ffmpeg may fail silently.

    Raises:
        ValueError: see `check_video_name`.
        OSError: the file could not be written, or does not hold all frames. The message names the file.
    """
    import imageio.v2 as imageio

    check_video_name(path)
    frames = 0
    if Path(path).suffix.lower() in _MOVING_PICTURES:
        options = {"duration": 1000 / fps}
    else:
        options = {"fps": fps, "codec": "libx264", "quality": 9, "macro_block_size": 2}
    with atomic_file(path) as temporary:
        writer = imageio.get_writer(temporary, **options)

        def append(frame: np.ndarray) -> None:
            """Append one frame."""
            nonlocal frames
            with _naming(path):
                writer.append_data(frame)
            frames += 1

        try:
            yield append
        except BaseException:
            with suppress(OSError):  # it would hide the first error
                writer.close()
            raise
        with _naming(path):
            writer.close()
            _check_video(temporary, frames)


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an error into an OSError that names the file and gives the reason in one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(":")
        raise OSError(f"{path} could not be written: {reason}") from error


def _check_video(written: Path, frames: int) -> None:
    """Raise OSError if a file holds fewer frames; GIF and WebP merge equal frames in a row."""
    if written.suffix.lower() in _MOVING_PICTURES:
        with Image.open(written) as image:
            count = image.n_frames
            image.seek(count - 1)
            image.load()
        complete = 0 < count <= frames
    else:
        from imageio_ffmpeg import count_frames_and_secs

        count, _ = count_frames_and_secs(written)
        complete = count == frames
    if not complete:
        raise OSError(f"it holds {count} of {frames} frames; is the disk full?")


def write_video(frames: np.ndarray, path: str | os.PathLike[str], fps: int) -> None:
    """Write uint8 `[frames, height, width, 3]` as one video file, see `video_writer`."""
    with video_writer(path, fps) as append:
        for frame in frames:
            append(frame)


def contact_sheet(
    rows: Mapping[str, Sequence[np.ndarray]], path: str | os.PathLike[str], title: str, notes: Mapping[str, str]
) -> None:
    """Write one PNG: a row per model, a column per chunk, each tile the chunk's middle frame.

    Args:
        rows: label -> chunks, each uint8 `[frames, height, width, 3]`.
        path: the PNG to write.
        title: the line at the top.
        notes: label -> a line below the row's label; labels may be missing.
    """
    columns = max(len(chunks) for chunks in rows.values())
    height, width = next(iter(rows.values()))[0].shape[1:3]
    scale = max(1, round(_TILE / height))
    tile_width, tile_height = width * scale, height * scale
    font, small = ImageFont.load_default(16), ImageFont.load_default(12)
    label_width = max(max(font.getlength(label), small.getlength(notes.get(label, ""))) for label in rows)
    left, top = int(label_width) + 2 * _MARGIN, 56
    sheet = Image.new(
        "RGB",
        (left + columns * (tile_width + _GAP) + _MARGIN, top + len(rows) * (tile_height + _GAP) + _MARGIN),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, fill="black", font=font)
    for column in range(columns):
        x = left + column * (tile_width + _GAP)
        draw.text((x, top - 20), f"chunk {column}", fill="black", font=small)
    for row, (label, chunks) in enumerate(rows.items()):
        y = top + row * (tile_height + _GAP)
        draw.text((_MARGIN, y + tile_height // 2 - 18), label, fill="black", font=font)
        draw.text((_MARGIN, y + tile_height // 2 + 4), notes.get(label, ""), fill="dimgray", font=small)
        for column, frames in enumerate(chunks):
            tile = Image.fromarray(frames[len(frames) // 2])
            tile = tile.resize((tile_width, tile_height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * (tile_width + _GAP), y))
    with atomic_file(path) as temporary:
        sheet.save(temporary)
