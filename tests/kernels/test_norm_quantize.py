"""Norms, modulation and gated residuals that end in int8, against float64."""

import pytest
import torch
from kernel_inputs import (
    assert_codes,
    assert_row_codes,
    codes_reference,
    generator,
    norm_reference,
    norm_tables,
    quantizer,
    rotated,
    row_quantizer,
)

import qarvd_kernels as ops

SITES = [(False, True), (True, False), (False, False), (True, True)]  # affine, modulated


@pytest.mark.parametrize(("affine", "modulated"), SITES)
@pytest.mark.parametrize("shape", [(6, 32, 8), (1, 48, 0), (9, 40, 40)])
def test_norm_quantize(affine, modulated, shape):
    m, c, outliers = shape
    x = torch.randn(m, c, generator=generator()) * 3 + 1
    tables = norm_tables(c, 3 if m % 3 == 0 else 1, affine, modulated)
    order = quantizer(c, outliers)
    got = ops.norm_quantize(x, *tables, 1e-6, *order)
    assert_codes(got, codes_reference(norm_reference(x, *tables, 1e-6), *order)[0])


@pytest.mark.parametrize(("affine", "modulated"), SITES)
@pytest.mark.parametrize("gated", (True, False))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_add_norm_quantize(affine, modulated, gated, dtype):
    m, c, g = 6, 32, generator(1)
    x, y = torch.randn(m, c, generator=g).to(dtype), torch.randn(m, c, generator=g).to(dtype)
    gate = torch.randn(3, c, generator=g) if gated else None
    tables, order = norm_tables(c, 3, affine, modulated), quantizer(c, 8)
    total, codes = ops.add_norm_quantize(x, y, gate, *tables, 1e-6, *order)
    want = x.double() + y.double() * (gate.double().repeat_interleave(2, 0) if gated else 1)
    assert total.dtype == dtype
    torch.testing.assert_close(total.double(), want, rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    assert_codes(codes, codes_reference(norm_reference(want, *tables, 1e-6), *order)[0])
    assert torch.equal(ops.add_gated(x, y, gate), total)
    for in_place, result in ((x.clone(), total), (x.clone().T.contiguous().T, total)):  # whatever the strides
        assert torch.equal(ops.add_norm_quantize_(in_place, y, gate, *tables, 1e-6, *order), codes)
        assert torch.equal(in_place, result)
    in_place = x.clone()
    assert ops.add_gated_(in_place, y, gate) is None and torch.equal(in_place, total)


@pytest.mark.parametrize(("affine", "modulated"), SITES)
@pytest.mark.parametrize("rotation", (1, 8, 32))
def test_scales_per_row(affine, modulated, rotation):
    x, y, gate = (torch.randn(*shape, generator=generator(s)) for s, shape in enumerate([(6, 64), (6, 64), (3, 64)]))
    tables, rows = norm_tables(64, 3, affine, modulated), row_quantizer(64, rotation)
    codes, scale = ops.norm_quantize_rows(x, *tables, 1e-6, *rows)
    assert_row_codes(codes, scale, rotated(norm_reference(x, *tables, 1e-6), *rows))
    total = x.double() + y.double() * gate.double().repeat_interleave(2, 0)
    codes, scale = ops.add_norm_quantize_rows_(x, y, gate, *tables, 1e-6, *rows)
    torch.testing.assert_close(x.double(), total, rtol=1e-6, atol=1e-6)
    assert_row_codes(codes, scale, rotated(norm_reference(total, *tables, 1e-6), *rows))


def test_constant_rows_have_no_variance():
    order = quantizer(32, 8)
    codes = ops.norm_quantize(torch.full((2, 32), 7.0), None, None, None, None, 1e-6, *order)
    group = (torch.arange(32) >= 8).long()
    assert torch.equal(codes, (order[3][group] - 128).to(torch.int8).expand(2, 32))


def calls():
    x, tables, order = torch.randn(6, 32), norm_tables(32, 3, True, True), quantizer(32, 8)
    return [
        (ops.norm_quantize, (x, *tables, 1e-6, *order)),
        (ops.norm_quantize, (x, None, None, None, None, 1e-6, *order)),
        (ops.add_norm_quantize, (x, x.clone(), torch.randn(2, 32), *tables, 1e-6, *order)),
        (ops.add_norm_quantize_, (x.clone(), x, torch.randn(2, 32), *tables, 1e-6, *order)),
        (ops.add_gated, (x, x.clone(), None)),
        (ops.add_gated_, (x.clone(), x, None)),
        (ops.quantize_static, (x, *order)),
        (ops.quantize_rows, (x, *row_quantizer(32, 8))),
        (ops.norm_quantize_rows, (x, *tables, 1e-6, *row_quantizer(32, 8))),
        (ops.add_norm_quantize_rows_, (x.clone(), x, None, *tables, 1e-6, *row_quantizer(32, 8))),
    ]


def test_opcheck():
    for op, arguments in calls():
        torch.library.opcheck(op.overload, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.ones(32)}, "weight and norm_bias is .* only, expected given together"),
        (
            {3: torch.zeros(4, 32), 4: torch.zeros(4, 32)},
            r"shape of scale is \(4, 32\), expected \(G, 32\) with G div",
        ),
        ({3: torch.zeros(2, 32).bfloat16(), 4: torch.zeros(2, 32)}, "dtype of scale is torch.bfloat16"),
        ({0: torch.zeros(2, 3, 32)}, "shape of x is .*, expected two dimensions"),
        ({6: torch.arange(31, dtype=torch.int32)}, r"shape of channel_order is \(31,\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = [torch.zeros(6, 32), None, None, None, None, 1e-6, *quantizer(32, 8)]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=message):
        ops.norm_quantize(*arguments)
