"""Text files that users hand in (prompts, JSON), as any editor on any system may have saved them."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from ..config import INVISIBLE

# The mark of UTF-32 begins with that of UTF-16.
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file, without the characters that no editor shows, such as a byte order mark.

    Raises:
        OSError: the file cannot be read; named.
        ValueError: it is in another encoding; file, encoding (where its first bytes tell) and remedy are named.
    """
    data = Path(path).read_bytes()
    found = next((name for mark, name in _OTHER_ENCODINGS.items() if data.startswith(mark)), None)
    if found is None and b"\0" in data:
        found = "UTF-16 without a byte order mark, or no text at all"
    if found is not None:
        raise ValueError(f"{path} is {found}, expected UTF-8: save it as UTF-8 in your editor")
    try:
        return data.decode("utf-8").translate(INVISIBLE)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is {data[error.start]:#04x}, as in Windows or Latin encodings): "
            "save it as UTF-8 in your editor"
        ) from error
