"""Prepared layers and the dual-scale product against float64, on the reference and on every implementation at hand."""

import pytest
import torch
from kernel_inputs import activation, assert_codes, generator, grouped_layer, linear_reference, stored_layer
from torch.nn import functional as F

import qarvd_kernels as ops

SHAPES = [(0, 16, 4, 0), (1, 16, 8, 0), (7, 48, 5, 48), (33, 64, 24, 32), (5, 40, 3, 6)]  # M, K, N, outliers


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (4, False)])
def test_prepared_layer_matches_float64(shape, bits, symmetric):
    m, k, n, outliers = shape
    layer, a = stored_layer(n, k, bits, outliers, symmetric), activation(m, k)
    prepared = ops.prepare_linear(*layer)
    assert (prepared.in_features, prepared.out_features) == (k, n)
    assert (prepared.row_sum_scale is None) == (symmetric or bits == 4)
    assert prepared.num_outliers == (outliers if 0 < outliers < k else 0)
    want = linear_reference(a, layer)
    got = prepared(a, layer[0], torch.float32)
    # one rounding of the outlier sum: half a unit of the other group's scale at most
    allowed = 0.51 * prepared.scale.double() * (prepared.num_outliers > 0) + 1e-5 * (want.abs().max() if m else 1)
    assert got.shape == (m, n) and got.dtype == torch.float32
    assert bool(((got - want).abs() <= allowed).all())
    assert prepared(a, layer[0], torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", (4, 8))
def test_prepared_layer_keeps_no_weight(bits):
    layer = stored_layer(8, 32, bits, 16)
    prepared = ops.prepare_linear(*layer)
    kept = [value for value in vars(prepared).values() if isinstance(value, torch.Tensor)]
    assert all(tensor.dtype != torch.uint8 and tensor.numel() <= 16 for tensor in kept)
    a = activation(3, 32)
    moved, want = layer[0].clone(), prepared(a, layer[0], torch.float32)
    assert torch.equal(prepared(a, moved, torch.float32), want)
    scratch = torch.full((1000,), 77, dtype=torch.int8)
    operand = prepared.operand(layer[0], scratch)
    assert operand.data_ptr() == (layer[0] if bits == 8 else scratch).data_ptr()
    assert torch.equal(operand, prepared.operand(layer[0]))
    codes = ops.unpack_weight(layer[0], bits).double()
    zero_point = torch.cat([layer[2][:, :1].expand(-1, 16), layer[2][:, 1:].expand(-1, 16)], dim=1)
    assert torch.equal(operand.double(), codes - zero_point)


def test_zero_points_outside_the_code_range():
    for bits in (4, 8):
        layer = list(stored_layer(6, 32, bits, 16))
        layer[2] = torch.tensor([-126, 300], dtype=torch.int16).expand(6, 2).contiguous()
        layer[4] = torch.tensor([-80, 400], dtype=torch.int32)
        a = activation(9, 32)
        want, prepared = linear_reference(a, layer), ops.prepare_linear(*layer)
        assert (
            float((prepared(a, layer[0], torch.float32) - want).abs().max())
            < 0.51 * float(prepared.scale.max()) + 1e-3
        )


def test_rescale_is_the_written_integer_formula():
    """Bit for bit: int32 -> float32, times ratio, ties to even, plus the normal sum."""
    a, w = activation(9, 64), activation(5, 64, seed=1)
    ratio = torch.tensor([0.5, 1.0, 3.25, 1e-3, 77.7])
    arguments = (a, w, 32, ratio, torch.ones(5), torch.zeros(5), None, None, None)
    first = a[:, :32].long() @ w[:, :32].long().T
    second = a[:, 32:].long() @ w[:, 32:].long().T
    want = (first.float() * ratio).round().long() + second
    assert torch.equal(ops.dual_scale_gemm(*arguments, torch.int32).long(), want)
    assert torch.equal(ops.dual_scale_gemm(*arguments, torch.float32), want.float())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int32))
@pytest.mark.parametrize("bits", (4, 8))
def test_a_product_can_be_written_to_a_tensor(dtype, bits):
    """Also to a part of one, whatever its strides; what lies around it stays as it was."""
    layer, a = stored_layer(24, 64, bits, 32, symmetric=False), activation(6, 64)
    prepared = ops.prepare_linear(*layer)
    want, held = prepared(a, layer[0], dtype), torch.full((6, 40), 7, dtype=dtype)
    for out in (torch.empty(6, 24, dtype=dtype), held[:, 8:32]):
        assert prepared(a, layer[0], dtype, out=out) is out
        assert torch.equal(out, want)
    assert bool((held[:, :8] == 7).all() and (held[:, 32:] == 7).all())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(6, 23), r"shape of out is \(6, 23\), expected \(6, 24\)"),
        (torch.empty(6, 24, dtype=torch.int8), "dtype of out is torch.int8, expected bfloat16"),
    ],
)
def test_a_tensor_that_cannot_hold_the_product_is_named(out, message):
    layer, a = stored_layer(24, 64, 8, 32), activation(6, 64)
    with pytest.raises(ValueError, match=message):
        ops.prepare_linear(*layer)(a, layer[0], torch.float32, out=out)


@pytest.mark.parametrize("symmetric", (True, False))
def test_gelu_epilogue(symmetric):
    layer, a = stored_layer(24, 64, 8, 32, symmetric), activation(33, 64)
    prepared = ops.prepare_linear(*layer)
    scale, zero_point = torch.tensor([0.2, 0.05]), torch.tensor([30, 4], dtype=torch.int32)
    got = ops.dual_scale_gemm_gelu(*prepared.gemm_arguments(a, layer[0]), scale, zero_point, 8)
    y = F.gelu(prepared(a, layer[0], torch.float32).double(), approximate="tanh")
    group = (torch.arange(24) >= 8).long()
    exact = (y / scale.double()[group] + zero_point[group]).clamp(0, 255) - 128
    assert got.dtype == torch.int8 and float((got.double() - exact).abs().max()) < 0.501


@pytest.mark.parametrize("gated", (True, False))
def test_residual_epilogue(gated):
    layer, a = stored_layer(24, 64, 8, 32), activation(6, 64)
    prepared = ops.prepare_linear(*layer)
    residual = torch.randn(6, 24, generator=generator(3)).bfloat16()
    gate = torch.randn(3, 24, generator=generator(4)) if gated else None
    got = ops.dual_scale_gemm_residual(*prepared.gemm_arguments(a, layer[0]), residual, gate)
    y = prepared(a, layer[0], torch.float32) * (gate.repeat_interleave(2, 0) if gated else 1)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), residual.double() + y.double(), rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize("outliers", (0, 16, 24, 64))
def test_weights_in_groups(outliers):
    layer, a = grouped_layer(24, 64, outliers), activation(6, 64)
    want = linear_reference(a, layer)
    prepared = ops.prepare_linear(*layer)
    got = prepared(a, layer[0], torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    packed, scale, zero_point, *quantizer, bias, bits, _ = layer
    got = ops.dual_scale_linear_static(a, packed, scale, zero_point, *quantizer, bias, bits, outliers, torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    order = torch.arange(64, dtype=torch.int32)
    weight = ops.dequantize_weight(packed, scale, zero_point, order, bits, outliers, torch.float32)
    ones = (torch.ones(2), torch.full((2,), 128, dtype=torch.int32), None)
    exact = linear_reference(torch.eye(64, dtype=torch.int8), (packed, scale, zero_point, *ones, bits, outliers))
    torch.testing.assert_close(weight.T.double(), exact, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"K of a weight in groups is 40, expected a multiple of 16"):
        ops.dequantize_weight(packed[:, :20], scale, zero_point, order[:40], bits, 0, torch.float32)


@pytest.mark.parametrize("bits", (4, 8))
def test_a_scale_per_row(bits):
    """Layers without input scale: `x / row_scale` is what was quantized, so that scale belongs to the product."""
    packed, scale, zero_point, _, _, bias, *layout = stored_layer(24, 64, bits, 32)
    prepared = ops.prepare_linear(packed, scale, zero_point, None, None, bias, *layout)
    a, row_scale = activation(6, 64), torch.rand(6, generator=generator(5)) + 0.1
    got = prepared(a, packed, torch.float32, row_scale=row_scale)
    ones, middle = torch.ones(2), torch.full((2,), 128, dtype=torch.int32)
    sums = linear_reference(a, (packed, scale, zero_point, ones, middle, None, *layout))
    want = sums * row_scale.double()[:, None] + bias.double()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4 * float(want.abs().max()))
    codes = ops.dual_scale_gemm_gelu(*prepared.gemm_arguments(a, packed, row_scale=row_scale), ones * 0.05, middle, 8)
    assert_codes(codes, (F.gelu(want, approximate="tanh") / 0.05).clamp(-128, 127), slack=2e-2)
    layer = stored_layer(24, 64, 8, 32, symmetric=False)
    with pytest.raises(ops.LayerRefused, match="asymmetric 8-bit weights"):
        ops.prepare_linear(*layer[:3], None, None, *layer[5:])


def test_overflow_is_refused_by_name():
    layer = list(stored_layer(4, 64, 8, 32))
    layer[1] = layer[1] * torch.tensor([1e6, 1.0])
    with pytest.raises(
        ops.LayerRefused, match=r"largest integer sum of this layer is 32 \* 16384 \* .*less than 2\*\*31"
    ):
        ops.prepare_linear(*layer)
    layer[1] = torch.tensor([0.0, 0.0]).expand(4, 2).contiguous()
    with pytest.raises(ops.LayerRefused, match="largest integer sum"):
        ops.prepare_linear(*layer)


def calls():
    layer, a = stored_layer(24, 64, 8, 32, symmetric=False), activation(6, 64)
    prepared = ops.prepare_linear(*layer)
    first = prepared.gemm_arguments(a, layer[0])
    plain = (*first[:6], None, None, None)
    four = stored_layer(24, 64, 4, 32)
    return [
        (ops.dual_scale_gemm, (*first, torch.bfloat16)),
        (ops.dual_scale_gemm, (*plain, torch.int32)),
        (ops.dual_scale_gemm_out, (*first, torch.empty(6, 24, dtype=torch.bfloat16))),
        (ops.dual_scale_gemm, (*plain[:8], torch.rand(6), torch.bfloat16)),
        (ops.dual_scale_gemm_gelu, (*plain, torch.ones(2), torch.zeros(2, dtype=torch.int32), 8)),
        (ops.dual_scale_gemm_residual, (*plain, torch.randn(6, 24), torch.randn(3, 24))),
        (ops.row_sums, (a, 32)),
        (ops.expand_int4, (four[0], four[2], 32, torch.empty(24, 64, dtype=torch.int8))),
    ]


def test_opcheck():
    for op, arguments in calls():
        torch.library.opcheck(op.overload, arguments)


def test_row_sums():
    a = activation(7, 40)
    want = torch.stack([a[:, :6].long().sum(1), a[:, 6:].long().sum(1)], dim=1)
    assert torch.equal(ops.row_sums(a, 6).long(), want)
    assert torch.equal(ops.row_sums(a, 0)[:, 0], torch.zeros(7, dtype=torch.int32))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(6, 63, dtype=torch.int8), r"shape of weight is \(24, 64\), expected \(N, 63\)"),
        (1, torch.zeros(24, 64), "dtype of weight is torch.float32, expected torch.int8"),
        (2, 65, "num_outliers is 65, expected 0 to 64"),
        (3, torch.ones(23), r"shape of ratio is \(23,\), expected \(24,\)"),
        (6, torch.zeros(6, 2, dtype=torch.int32), "row_sums and row_sum_scale is .* only, expected given together"),
        (8, torch.ones(5), r"shape of row_scale is \(5,\), expected \(6,\)"),
        (9, torch.float64, "out_dtype is torch.float64, expected bfloat16"),
    ],
)
def test_bad_arguments_are_named(position, value, message):
    layer, a = stored_layer(24, 64, 8, 32), activation(6, 64)
    arguments = [*ops.prepare_linear(*layer).gemm_arguments(a, layer[0]), torch.float32]
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        ops.dual_scale_gemm(*arguments)
