"""Affine quantization: degenerate rows, the code range, and the error a grid must not exceed."""

import numpy as np
import pytest
import torch

from qarvd_diffusers.quantization import affine as P

BITS = (4, 8)


def rows():
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    x[1] = 0.0
    x[2] = 0.5
    x[3] = -0.25
    x[4] = x[4].abs() + 3
    x[5] *= 1e-30
    return x


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("clamp", (False, True))
def test_finite_positive_and_within_half_a_step(bits, symmetric, clamp):
    x = rows()
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale, zero_point = P.affine_qparams(low, high, bits, symmetric=symmetric, clamp=clamp)
    assert bool((scale > 0).all()) and bool(scale.isfinite().all())
    assert torch.equal(zero_point, zero_point.round())
    back = P.fake_quantize(x, scale, zero_point, bits)
    # a free zero-point is rounded, which can push the end of the range half a step out
    assert bool(((x - back).abs() <= scale * (0.5001 if clamp or symmetric else 1.0001)).all())
    for constant in (1, 2, 3):
        torch.testing.assert_close(back[constant], x[constant], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_clamped_zero_point_is_a_code_and_zero_is_exact(bits):
    x = rows()
    scale, zero_point = P.affine_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), bits)
    assert bool(((zero_point >= 0) & (zero_point <= 2**bits - 1)).all())
    assert not P.fake_quantize(torch.zeros_like(x), scale, zero_point, bits).any()


@pytest.mark.parametrize("bits", BITS)
def test_free_zero_point_uses_the_whole_range(bits):
    low, high = torch.tensor([3.0, -5.0]), torch.tensor([5.0, -3.0])
    scale, zero_point = P.affine_qparams(low, high, bits, clamp=False)
    levels = 2**bits - 1
    torch.testing.assert_close(scale, torch.full((2,), 2 / levels))
    torch.testing.assert_close(zero_point, torch.round(torch.tensor([-3.0, 5.0]) / scale))
    assert zero_point[0] < 0 and zero_point[1] > levels


def test_a_range_too_far_from_zero_falls_back_to_include_zero():
    scale, zero_point = P.affine_qparams(torch.tensor([1000.0]), torch.tensor([1000.001]), 8, clamp=False)
    assert zero_point == 0 and scale == pytest.approx(1000.001 / 255)


def test_symmetric_range_has_the_middle_as_zero_point():
    scale, zero_point = P.affine_qparams(torch.tensor([-2.0]), torch.tensor([1.0]), 8, symmetric=True)
    assert zero_point == 128 and scale == pytest.approx(2 / 127)
    assert P.quantize(torch.tensor([-2.0]), scale, zero_point, 8) == 1


def test_percentile_ranges_match_numpy_in_blocks(monkeypatch):
    x = torch.randn(9, 50, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(P, "SORT_BLOCK", 100)
    for p, (low, high) in zip((0.9, 1.0), P.percentile_ranges(x, (0.9, 1.0)), strict=True):
        for got, q in ((low, 1 - p), (high, p)):
            np.testing.assert_allclose(got[:, 0], np.quantile(x.double().numpy(), q, axis=1), rtol=1e-5, atol=1e-6)
