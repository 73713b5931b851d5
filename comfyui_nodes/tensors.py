"""Concatenate tensors without holding them twice, and hash values by content."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch


def joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate along the first axis; `torch.cat` would need twice the memory.

    Args:
        pieces: CPU tensors `[n, ...]` of one dtype; only n may differ. Emptied: a piece is freed once copied.

    Returns:
        Tensor `[sum of n, ...]`.
    """
    whole = torch.empty(sum(len(piece) for piece in pieces), *pieces[0].shape[1:], dtype=pieces[0].dtype)
    begin = 0
    while pieces:  # the system commits memory of `whole` as it is written
        piece = pieces.pop(0)
        whole[begin : begin + len(piece)] = piece
        begin += len(piece)
    return whole


def digest(value: Any) -> str:
    """Hash the content of numbers, text, tensors, dataclasses, and lists and dicts of these.

    Fields of a dataclass that do not count in comparisons do not count here.
    """
    sha = hashlib.sha256()
    _add(sha, value)
    return sha.hexdigest()


def _add(sha: Any, value: Any) -> None:
    """Add a value to a hash."""
    if isinstance(value, torch.Tensor):
        sha.update(f"tensor {value.dtype} {list(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif dataclasses.is_dataclass(value):
        _add(sha, [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value) if field.compare])
    elif isinstance(value, list | tuple):
        sha.update(f"list {len(value)}".encode())
        for item in value:
            _add(sha, item)
    elif isinstance(value, dict):
        _add(sha, sorted(value.items(), key=lambda item: str(item[0])))
    else:
        sha.update(f"{type(value).__name__} {value!r};".encode())
