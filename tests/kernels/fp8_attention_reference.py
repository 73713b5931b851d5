"""Emulate 8-bit attention in float64: the rounding points of tensor cores, with exact accumulation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEP, _BITS = 32, 13  # products that an instruction sums; bits that it keeps below the largest exponent
_ROWS = 16  # query rows per block: all products of a block are in memory


def _exponent(x: Tensor, smallest: int) -> Tensor:
    return torch.where(x == 0, -200, (torch.frexp(x)[1] - 1).clamp_min(smallest))


def _cut(x: Tensor, exponent: Tensor) -> Tensor:
    """Truncate x to a multiple of 2^(exponent - 13)."""
    bits = _BITS - exponent
    return torch.ldexp(torch.ldexp(x, bits).trunc(), -bits)


def _four_digits(x: Tensor) -> Tensor:
    """Round to the four binary digits of an e4m3 number, without its limits of the exponent."""
    digits = 4 - torch.frexp(x)[1]
    return torch.ldexp(torch.ldexp(x, digits).round(), -digits)


def tensor_core_scores(query: Tensor, key: Tensor) -> Tensor:
    """Multiply float8 `[M, K]` and `[N, K]` to float64 `[M, N]` as Hopper's wgmma does.

    Of 32 exact products and the sum before, each is cut off 13 bits below the largest exponent among them; so is their
    sum (Xie et al. 2025, "MMA-Sim", arXiv 2511.10909). Exponents of products are sums of exponents: 1.5 * 1.5 has 0.
    """
    query, key = query.double()[:, None], key.double()[None]
    total = query.new_zeros(query.shape[0], key.shape[1])
    for part in (slice(start, start + _STEP) for start in range(0, query.shape[2], _STEP)):
        a, b = query[..., part], key[..., part]
        terms = torch.cat([a * b, total[..., None]], -1)
        exponents = torch.cat([_exponent(a, -6) + _exponent(b, -6), _exponent(total, -126)[..., None]], -1)
        total = _cut(terms, exponents.amax(-1, keepdim=True)).sum(-1)
        total = _cut(total, _exponent(total, -126))
    return total


def attention_reference(arguments: list) -> Tensor:
    """Return float64 `[B, T, H, D]` for the arguments of `attention_fp8`.

    Scores are as above, weights have the four binary digits of e4m3, the rest is exact.
    """
    query, key, value, *scales, length = arguments
    out = query.new_empty(query.shape, dtype=torch.float64)
    for sequence in range(query.shape[0]):
        for head in range(query.shape[2]):
            q, k, v = (x[sequence, :, head] for x in (query, key[:, :length], value[:, :length]))
            q_scale, k_scale, v_scale = (scale.expand(len(query), -1)[sequence, head].double() for scale in scales)
            scores = torch.cat([tensor_core_scores(rows, k) for rows in q.split(_ROWS)])
            scores *= q_scale * k_scale * math.log2(math.e) / math.sqrt(q.shape[1])
            weights = _four_digits(torch.exp2(scores - scores.amax(1, keepdim=True).ceil()))
            out[sequence, :, head] = weights @ v.double() / weights.sum(1, keepdim=True) * v_scale
    return out
