"""Contact sheets and video files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..serialization import atomic_file

_TILE = 128  # pixels; small videos are enlarged without smoothing so that every error stays visible
_MARGIN, _GAP = 8, 4


def write_video(frames: np.ndarray, path: str | os.PathLike[str], fps: int) -> None:
    """Write uint8 `[frames, height, width, 3]` as H.264 mp4."""
    import imageio.v2 as imageio

    with (
        atomic_file(path) as temporary,
        imageio.get_writer(temporary, fps=fps, codec="libx264", quality=9, macro_block_size=2) as writer,
    ):
        for frame in frames:
            writer.append_data(frame)


def contact_sheet(
    rows: Mapping[str, Sequence[np.ndarray]], path: str | os.PathLike[str], title: str, notes: Mapping[str, str]
) -> None:
    """One PNG: a row per model, a column per chunk, each tile the chunk's middle frame.

    Args:
        rows: label -> chunks, each uint8 `[frames, height, width, 3]`.
        path: where the PNG goes.
        title: a line above all.
        notes: label -> a line below the row's label (may lack a label).
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
