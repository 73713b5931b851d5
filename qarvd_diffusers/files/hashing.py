"""Hash tensors by name, dtype, shape and content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch


def hash_tensors(digest: hashlib.blake2b, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Add names, dtypes, shapes and bytes of tensors to a hash."""
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
