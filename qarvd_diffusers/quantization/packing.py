"""Bit layout of stored weight codes.

8 bits: one code per byte with its top bit flipped, so that the byte read as int8 is `code - 128`: the operand of an integer
matrix product, needing neither copy nor conversion. 4 bits: two neighbouring input channels per byte, the even channel in the low nibble. An odd
number of channels has no 4-bit layout and is refused: padding would make the shape on disk depend on the scheme twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qarvd_kernels import unpack_weight

BITS = (4, 8)


def packed_columns(in_features: int, bits: int) -> int:
    """Bytes per output row.

    Raises:
        ValueError: bits is not 4 or 8, or an odd number of channels is to be packed to 4 bits.
    """
    if bits not in BITS:
        raise ValueError(f"weight codes of {bits} bits are not supported, expected one of {BITS}")
    if in_features * bits % 8:
        raise ValueError(
            f"{in_features} input channels cannot be packed to {bits} bits, two to a byte: expected an even number; "
            "keep the layer in float (modules_to_not_convert) or use an 8-bit scheme"
        )
    return in_features * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes `[N, K]`, each below `2**bits` -> uint8 `[N, K * bits / 8]`.

    Raises:
        ValueError: wrong dtype, a code out of range, or a K that does not fit (see `packed_columns`).
    """
    packed_columns(codes.shape[-1], bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes have dtype {codes.dtype}, expected torch.uint8")
    if bits == 8:
        return codes ^ 128
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"a code of {int(codes.max())} does not fit 4 bits, expected 0 to 15")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(weight_packed: Tensor, bits: int) -> Tensor:
    """uint8 `[N, K * bits / 8]` -> uint8 codes `[N, K]`; the inverse of `pack`."""
    return unpack_weight(weight_packed, bits)
