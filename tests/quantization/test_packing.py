"""Every pair of codes survives packing, and the layout is the documented one."""

import pytest
import torch

from qarvd_diffusers.quantization.packing import pack, packed_columns
from qarvd_kernels import unpack_weight


def test_four_bits_low_nibble_first():
    codes = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)  # every pair of codes
    packed = pack(codes, 4)
    assert packed.shape == (256, 1)
    assert torch.equal(packed[:, 0].int(), codes[:, 0].int() + 16 * codes[:, 1].int())
    assert torch.equal(unpack_weight(packed, 4), codes)


def test_eight_bits_are_the_signed_operand():
    codes = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    packed = pack(codes, 8)
    assert torch.equal(packed.view(torch.int8).int(), codes.int() - 128)
    assert torch.equal(unpack_weight(packed, 8), codes)


def test_odd_channels_have_no_four_bit_layout():
    assert packed_columns(7, 8) == 7
    with pytest.raises(ValueError, match=r"7 input channels cannot be packed to 4 bits.*8-bit scheme"):
        pack(torch.zeros(2, 7, dtype=torch.uint8), 4)


def test_bad_codes():
    with pytest.raises(ValueError, match="a code of 16 does not fit 4 bits"):
        pack(torch.full((1, 2), 16, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match=r"expected torch\.uint8"):
        pack(torch.zeros(1, 2), 8)
    with pytest.raises(ValueError, match="3 bits are not supported"):
        packed_columns(8, 3)
