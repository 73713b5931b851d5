"""Random, ragged and extreme inputs of the operators, and their float64 reference."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import qarvd_kernels as ops


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stored_layer(n, k, bits, outliers, symmetric=True, seed=0):
    """Arguments of `prepare_linear`; the first and last rows hold the ends of the code range."""
    g, levels = generator(seed), 2**bits
    codes = torch.randint(0, levels, (n, k), generator=g, dtype=torch.uint8)
    codes[0], codes[-1] = 0, levels - 1
    packed = codes ^ 128 if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
    zero_point = torch.randint(0, levels, (n, 2), generator=g, dtype=torch.int16)
    zero_point[0], zero_point[-1] = levels - 1, 0
    if symmetric and bits == 8:
        zero_point = torch.full((n, 2), 128, dtype=torch.int16)
    scale = (torch.rand(n, 2, generator=g) + 0.5) * torch.tensor([0.02, 0.004])
    input_scale, input_zero_point = torch.tensor([0.09, 0.02]), torch.tensor([255, 3], dtype=torch.int32)
    bias = torch.randn(n, generator=g)
    return packed, scale, zero_point, input_scale, input_zero_point, bias, bits, outliers


def grouped_layer(n, k, outliers, seed=0):
    """As `stored_layer` with 4 bits and integer factors of 16 channels: all of these, and the ends of int8."""
    g = generator(seed)
    packed, scale, _, *rest = stored_layer(n, k, 4, outliers, seed=seed)
    factor = torch.arange(n * k // 16).reshape(n, -1) % 16 + 1
    zero = torch.randint(0, 16, factor.shape, generator=g)
    lowest, highest = zero - 128 // factor, zero + 127 // factor
    codes = ops.unpack_weight(packed, 4).to(torch.int64)
    codes = codes.clamp(lowest.clamp(min=0).repeat_interleave(16, 1), highest.clamp(max=15).repeat_interleave(16, 1))
    codes = codes.to(torch.uint8)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scale, (factor - 1 | zero << 4).to(torch.uint8), *rest


def activation(m, k, seed=0):
    """int8 codes; the first row all lowest, the last all highest."""
    a = torch.randint(-128, 128, (m, k), generator=generator(seed), dtype=torch.int8)
    if m:
        a[0], a[-1] = -128, 127
    return a


def linear_reference(a, layer):
    """float64 `[M, N]`, every factor written out."""
    packed, scale, zero_point, input_scale, input_zero_point, bias, bits, outliers = layer
    codes = ops.unpack_weight(packed, bits).double()
    if zero_point.dtype == torch.uint8:
        factor, zero = ((part.double()).repeat_interleave(16, 1) for part in ((zero_point & 15) + 1, zero_point >> 4))
        codes, zero_point = factor * (codes - zero), torch.zeros(len(codes), 2)
    total = torch.zeros(a.shape[0], codes.shape[0], dtype=torch.float64) + (0 if bias is None else bias.double())
    for g, part in enumerate((slice(0, outliers), slice(outliers, None))):
        x = (a[:, part].double() + 128 - input_zero_point[g]) * input_scale[g].double()
        w = (codes[:, part] - zero_point[:, g, None]) * scale[:, g, None].double()
        total += x @ w.T
    return total


def quantizer(k, outliers, seed=0):
    """A channel order that moves some channels to the front, and a static quantizer with zero-points at both ends."""
    chosen = torch.randperm(k, generator=generator(seed))[:outliers].sort().values
    rest = torch.ones(k, dtype=torch.bool)
    rest[chosen] = False
    order = torch.cat([chosen, torch.arange(k)[rest]]).to(torch.int32)
    return order, outliers, torch.tensor([0.05, 0.02]), torch.tensor([128, 100], dtype=torch.int32)


def codes_reference(x, order, outliers, scale, zero_point):
    """float64 values before rounding, and the int8 codes they round to."""
    permuted = x.double()[:, order.long()]
    group = (torch.arange(x.shape[1]) >= outliers).long()
    exact = (permuted / scale.double()[group] + zero_point[group]).clamp(0, 255) - 128
    return exact, exact.round().to(torch.int8)


def assert_codes(got, exact, slack=2e-3):
    """Codes round the exact value; off by one only where it lies within `slack` of a rounding boundary."""
    assert got.dtype == torch.int8
    assert float((got.double() - exact).abs().max()) <= 0.5 + slack if got.numel() else True


def row_quantizer(k, rotation, seed=7):
    """Scales of channels, a few of them far from 1, and the size of a block."""
    scale = torch.rand(k, generator=generator(seed)) + 0.5
    scale[:: max(1, k // 5)] *= 16
    return scale, rotation


def rotated(x, scale, block):
    """float64 product of every block of scaled channels with the orthonormal matrix of signs (-1)^popcount(i & j)."""
    x = x.double() * scale.double()
    index = torch.arange(block)
    bits = (index[:, None] & index)[..., None] >> torch.arange(16) & 1
    signs = 1.0 - 2.0 * (bits.sum(-1) % 2).double()
    return (x.unflatten(-1, (-1, block)) @ signs).flatten(-2) / block**0.5


def assert_row_codes(codes, scale, exact, slack=2e-3):
    """Scales are the largest magnitude / 127, and codes round exact / scale; see `assert_codes`."""
    largest = exact.abs().amax(-1) / 127
    largest[largest == 0] = 1
    torch.testing.assert_close(scale.double(), largest, rtol=2e-5, atol=1e-7)
    assert_codes(codes, exact / largest[..., None], slack)
    assert int(codes.abs().max()) <= 127


def norm_reference(x, weight, norm_bias, scale, shift, eps):
    """float64 LayerNorm and modulation."""
    double = [None if t is None else t.double() for t in (weight, norm_bias, scale, shift)]
    y = F.layer_norm(x.double(), x.shape[1:], double[0], double[1], eps)
    if scale is not None:
        rows = x.shape[0] // scale.shape[0]
        y = y * (1 + double[2].repeat_interleave(rows, 0)) + double[3].repeat_interleave(rows, 0)
    return y


def norm_tables(c, groups, affine, modulated, seed=0):
    """`weight, norm_bias, scale, shift` of a norm site."""
    g = generator(seed)
    affine = [1 + 0.1 * torch.randn(c, generator=g), 0.1 * torch.randn(c, generator=g)] if affine else [None] * 2
    modulation = [0.3 * torch.randn(groups, c, generator=g) for _ in range(2)] if modulated else [None] * 2
    return (*affine, *modulation)
