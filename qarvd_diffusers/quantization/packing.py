"""Pack weight codes into the bit layout that is stored; `qarvd_kernels.unpack_weight` is the inverse.

8 bits: one code per byte with its top bit flipped, so that the byte read as int8 is `code - 128`: the operand of an
integer matrix product, without copy or conversion. 4 bits: two neighbouring input channels per byte, the even channel
in the low nibble. An odd number of channels raises an error for 4 bits: with padding the stored shape would not tell
the layer's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (4, 8)


def packed_columns(in_features: int, bits: int) -> int:
    """Count the bytes per output row.

    Raises:
        ValueError: bits is not 4 or 8, or it is 4 and the number of channels is odd.
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
    """Pack uint8 codes `[N, K]`, each below `2**bits`, to uint8 `[N, K * bits / 8]`.

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
