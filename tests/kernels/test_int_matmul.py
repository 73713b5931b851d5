"""`int_matmul`, on which every integer layer of the reference rests, against int64 at all kinds of sizes."""

from __future__ import annotations

import itertools

import pytest
import torch

from qarvd_kernels.reference.linear import int_matmul

ROWS = (1, 2, 3, 7, 8, 16, 17, 18, 33, 64)
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129)
COLUMNS = (1, 2, 3, 7, 8, 9, 16, 17, 24, 33, 64)

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", DEVICES)
def test_every_size_is_exact(device):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (64, 129), generator=g, dtype=torch.int8) for _ in range(2))
    wrong = []
    for m, k, n in itertools.product(ROWS, CHANNELS, COLUMNS):
        got = int_matmul(a[:m, :k].to(device), b[:n, :k].to(device))
        if got.dtype != torch.int32 or not torch.equal(got.cpu().long(), a[:m, :k].long() @ b[:n, :k].long().T):
            wrong.append((m, k, n))
    assert not wrong, f"{len(wrong)} sizes, first {wrong[:5]}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", (1536, 8960, 2**17 - 1))
def test_largest_sums(device, k):
    """Sums up to 2**31 - 2**14 and the most negative ones: nothing saturates on the way."""
    low, high = (torch.full((2, k), value, dtype=torch.int8, device=device) for value in (-128, 127))
    rows = torch.cat([low, high])
    expected = rows.cpu().long() @ rows.cpu().long().T
    assert torch.equal(int_matmul(rows, rows).cpu().long(), expected)
