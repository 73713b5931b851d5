"""Bit-identical results of equal weights on the CPU."""

from __future__ import annotations

import itertools

import torch

_CACHE_LINE = 64  # bytes; what torch's own allocator aligns to


def align_storage(module: torch.nn.Module) -> None:
    """Copy CPU weights that do not start at a cache line; parameters stay the same objects with the same values.

    Weights mapped from a safetensors file lie wherever its header puts them, and matrix kernels choose their code path by
    address: a reloaded model then differs from the saved one in the last bit.
    """
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        plain = type(tensor.data) is torch.Tensor
        if plain and tensor.device.type == "cpu" and tensor.data_ptr() % _CACHE_LINE:
            tensor.data = tensor.data.clone()
