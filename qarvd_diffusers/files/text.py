"""Read text files of users (prompts, JSON), as any editor on any system may have saved them."""

from __future__ import annotations

import codecs
import os
import stat
from collections.abc import Iterable
from pathlib import Path

# Byte order mark and zero-width space, for `str.translate`: invisible in an editor, and yet tokens of a prompt.
INVISIBLE = dict.fromkeys((0xFEFF, 0x200B))

# UTF-32 first: its mark begins with that of UTF-16.
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file, without the characters that no editor shows, such as a byte order mark.

    Raises:
        OSError: the file cannot be read; the message names it.
        ValueError: it is in another encoding; the message gives file, encoding (where the first bytes tell) and
            remedy.
    """
    data = Path(path).read_bytes()
    encoding = next((name for mark, name in _OTHER_ENCODINGS.items() if data.startswith(mark)), None)
    if encoding is None and b"\0" in data:
        encoding = "UTF-16 without a byte order mark, or no text at all"
    if encoding is not None:
        raise ValueError(f"{path} is {encoding}, expected UTF-8: save it as UTF-8 in your editor")
    try:
        return data.decode("utf-8").translate(INVISIBLE)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is {data[error.start]:#04x}, as in Windows or Latin encodings): "
            "save it as UTF-8 in your editor"
        ) from error


def require_regular(path: str | os.PathLike[str]) -> None:
    """Check that a path is that of a regular file, before a read of a pipe or device waits for ever.

    Raises:
        OSError: it is not there, a folder, or something else; the message names it.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder, expected a file")
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is a pipe or a device, expected a file")


def parse_prompts(lines: Iterable[str], source: str) -> tuple[str, ...]:
    """Return the non-empty, stripped lines that do not start with `#`.

    Raises:
        ValueError: there is none; the message names `source`.
    """
    stripped = (line.translate(INVISIBLE).strip() for line in lines)
    prompts = tuple(line for line in stripped if line and not line.startswith("#"))
    if not prompts:
        raise ValueError(f"{source} contains no prompt: one prompt per line is expected")
    return prompts
