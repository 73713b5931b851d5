"""Every Triton kernel against the reference, on poisoned outputs, ragged shapes and the ends of the code range."""

import os
from importlib import import_module

import pytest
import torch
from kernel_inputs import (
    activation,
    assert_codes,
    assert_row_codes,
    codes_reference,
    generator,
    grouped_layer,
    norm_reference,
    norm_tables,
    quantizer,
    rotated,
    row_quantizer,
    stored_layer,
)
from test_cache_attention import (
    append_arguments,
    append_reference,
    assert_stored,
    attention_arguments,
    attention_reference,
    error,
    per_sample,
    with_tokens_innermost,
)

import qarvd_kernels as ops
from qarvd_kernels.reference import gemm as gemm_reference
from qarvd_kernels.reference import linear as linear_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on numpy, which has neither bfloat16 nor float8
GEMM_SHAPES = [
    (1, 64, 16, 32),
    (7, 96, 24, 0),
    (35, 80, 33, 48),
    (17, 64, 16, 64),
    (150, 32, 40, 16),
]  # M, K, N, outliers


@pytest.fixture
def triton_module(on_device):
    return lambda theme: import_module(f"qarvd_kernels.triton.{theme}")


@pytest.mark.parametrize("shape", GEMM_SHAPES)
@pytest.mark.parametrize("bits", (4, 8))
def test_integer_sums_are_bit_equal(shape, bits, on_device, triton_module):
    m, k, n, outliers = shape
    layer, a = stored_layer(n, k, bits, outliers), activation(m, k)
    prepared = ops.prepare_linear(*layer)
    arguments = (*prepared.gemm_arguments(a, layer[0])[:6], None, None, None, torch.int32)
    got = on_device(triton_module("gemm").dual_scale_gemm, arguments)
    assert torch.equal(got, gemm_reference.dual_scale_gemm(*arguments))


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("shape", GEMM_SHAPES)
def test_epilogues(shape, symmetric, on_device, triton_module):
    m, k, n, outliers = shape
    gemm = triton_module("gemm")
    layer, a = stored_layer(n, k, 8, outliers, symmetric), activation(m, k)
    first = ops.prepare_linear(*layer).gemm_arguments(a, layer[0])
    want = gemm_reference.dual_scale_gemm(*first, torch.float32)
    got = on_device(gemm.dual_scale_gemm, (*first, torch.float32))
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6 * float(want.abs().max()))
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    half = on_device(gemm.dual_scale_gemm, (*first, dtype))
    torch.testing.assert_close(half, got.to(dtype), rtol=0, atol=0)
    out = torch.full((m, n), 7, dtype=dtype)
    on_device(gemm.dual_scale_gemm_out, (*first, out))
    assert torch.equal(out, half)

    scale, zero_point = torch.tensor([0.2, 0.05]), torch.tensor([30, 4], dtype=torch.int32)
    got = on_device(gemm.dual_scale_gemm_gelu, (*first, scale, zero_point, 8))
    group = (torch.arange(n) >= 8).long()
    y = torch.nn.functional.gelu(want.double(), approximate="tanh")
    assert_codes(got, (y / scale.double()[group] + zero_point[group]).clamp(0, 255) - 128, slack=5e-3)

    if symmetric:
        rows = torch.rand(m, generator=generator(6)) + 0.1
        got = on_device(gemm.dual_scale_gemm, (*first[:8], rows, torch.float32))
        exact = (want.double() - layer[5].double()) * rows.double()[:, None]
        bias = first.bias.double() - layer[5].double()  # of the zero-points, which no row scale belongs to
        exact += bias * (1 - rows.double()[:, None]) + layer[5].double()
        torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=2e-5 * float(exact.abs().max()))

    for gate in (None, torch.randn(1, n, generator=generator(4))):
        residual = torch.randn(m, n, generator=generator(3))
        got = on_device(gemm.dual_scale_gemm_residual, (*first, residual, gate))
        exact = residual.double() + want.double() * (1 if gate is None else gate.double())
        torch.testing.assert_close(got.double(), exact, rtol=4e-6, atol=4e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("outliers", (0, 6, 40))
def test_weights_and_sums(outliers, on_device, triton_module):
    packed, scale, zero_point, *_ = stored_layer(9, 40, 4, outliers)
    zero_point[1] = torch.tensor([-3, 77], dtype=torch.int16)
    out = torch.zeros(9, 40, dtype=torch.int8)
    on_device(triton_module("gemm").expand_int4, (packed, zero_point, outliers, out))
    assert torch.equal(out, linear_reference.integer_weight(packed, zero_point, 4, outliers)[0])
    grouped, out = grouped_layer(9, 48, 8 * (outliers // 8)), torch.zeros(9, 48, dtype=torch.int8)
    on_device(triton_module("gemm").expand_int4, (grouped[0], grouped[2], grouped[7], out))
    assert torch.equal(out, linear_reference.integer_weight(grouped[0], grouped[2], 4, grouped[7])[0])
    arguments = (*grouped[:3], torch.arange(48, dtype=torch.int32), 4, grouped[7], torch.float32)
    got = on_device(triton_module("linear").dequantize_weight, arguments)
    torch.testing.assert_close(got, linear_reference.dequantize_weight(*arguments), rtol=0, atol=0)
    order = quantizer(40, outliers)[0]
    for bits, stored in ((4, packed), (8, activation(9, 40).view(torch.uint8))):
        arguments = (stored, scale, zero_point, order, bits, outliers, torch.float32)
        got = on_device(triton_module("linear").dequantize_weight, arguments)
        torch.testing.assert_close(got, linear_reference.dequantize_weight(*arguments), rtol=0, atol=0)
    a = activation(5, 40)
    assert torch.equal(on_device(triton_module("quantize").row_sums, (a, outliers)), ops.row_sums(a, outliers))


@pytest.mark.parametrize("outliers", (0, 5, 40))
@pytest.mark.parametrize("rows", (1, 11))
def test_quantize_static(outliers, rows, on_device, triton_module):
    order = quantizer(40, outliers)
    x = torch.randn(rows, 40, generator=generator()) * 3
    x[0, :4] = torch.tensor([1e30, -1e30, float("inf"), -float("inf")])
    got = on_device(triton_module("quantize").quantize_static, (x.view(1, rows, 40), *order))
    assert_codes(got[0], codes_reference(x, *order)[0])


@pytest.mark.parametrize(("affine", "modulated"), [(False, True), (True, False), (True, True), (False, False)])
@pytest.mark.parametrize("added", ("no", "plain", "gated"))
@pytest.mark.parametrize("shape", [(6, 48, 16), (1, 40, 0), (9, 33, 33)])
def test_norms(affine, modulated, added, shape, on_device, triton_module):
    m, c, outliers = shape
    norm, g, groups = triton_module("norm"), generator(1), 3 if m % 3 == 0 else 1
    x, y = (torch.randn(m, c, generator=g) * 2 + 1 for _ in range(2))
    gate = torch.randn(groups, c, generator=g) if added == "gated" else None
    tables, order = norm_tables(c, groups, affine, modulated), quantizer(c, outliers)
    if added == "no":
        codes, total = on_device(norm.norm_quantize, (x, *tables, 1e-6, *order)), x.double()
    else:
        total = x.double() + y.double() * (1 if gate is None else gate.double().repeat_interleave(m // groups, 0))
        got, codes = on_device(norm.add_norm_quantize, (x, y, gate, *tables, 1e-6, *order))
        torch.testing.assert_close(got.double(), total, rtol=1e-6, atol=1e-6)
        assert torch.equal(on_device(norm.add_gated, (x, y, gate)), got)
        in_place = x.clone()
        assert torch.equal(on_device(norm.add_norm_quantize_, (in_place, y, gate, *tables, 1e-6, *order)), codes)
        assert torch.equal(in_place, got)
        on_device(norm.add_gated_, (x, y, gate))
        assert torch.equal(x, got)
    assert_codes(codes, codes_reference(norm_reference(total, *tables, 1e-6), *order)[0])


@pytest.mark.parametrize(("affine", "modulated"), [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("added", ("no", "plain", "gated"))
@pytest.mark.parametrize(("m", "c", "rotation"), [(6, 48, 16), (1, 40, 1), (9, 24, 8), (3, 256, 128)])
def test_norms_with_a_scale_per_row(affine, modulated, added, m, c, rotation, on_device, triton_module):
    norm, g, groups = triton_module("norm"), generator(1), 3 if m % 3 == 0 else 1
    x, y = (torch.randn(m, c, generator=g) * 2 + 1 for _ in range(2))
    gate = torch.randn(groups, c, generator=g) if added == "gated" else None
    tables, rows = norm_tables(c, groups, affine, modulated), row_quantizer(c, rotation)
    if added == "no":
        codes, scale = on_device(norm.norm_quantize_rows, (x, *tables, 1e-6, *rows))
        total = x.double()
    else:
        total = x.double() + y.double() * (1 if gate is None else gate.double().repeat_interleave(m // groups, 0))
        codes, scale = on_device(norm.add_norm_quantize_rows_, (x, y, gate, *tables, 1e-6, *rows))
        torch.testing.assert_close(x.double(), total, rtol=1e-6, atol=1e-6)
    assert_row_codes(codes, scale, rotated(norm_reference(total, *tables, 1e-6), *rows))


@pytest.mark.parametrize(("k", "rotation"), [(40, 1), (40, 8), (256, 128), (24, 4)])
def test_quantize_rows(k, rotation, on_device, triton_module):
    x = torch.randn(2, 5, k, generator=generator()) * 3
    x[0, 1] = 0
    codes, scale = on_device(triton_module("quantize").quantize_rows, (x, *row_quantizer(k, rotation)))
    assert codes.shape == x.shape and scale.shape == (2, 5) and float(scale[0, 1]) == 1
    assert_row_codes(codes, scale, rotated(x, *row_quantizer(k, rotation)))


def test_results_that_are_not_contiguous_are_not_supported(on_device, triton_module):
    """Copies would lose what is written to them."""
    layer, a, x = stored_layer(16, 64, 8, 32), activation(7, 64), torch.randn(7, 64)
    device = torch.device("cpu" if INTERPRETED else "cuda")
    first = ops.prepare_linear(*layer).gemm_arguments(a, layer[0])
    reason = triton_module("gemm").unsupported_reason
    for out, want in ((torch.empty(7, 16), None), (torch.empty(16, 7).T, "out is not contiguous")):
        assert reason("dual_scale_gemm_out", device, {**first._asdict(), "out": out}) == want
    reason = triton_module("norm").unsupported_reason
    for operator in ("add_norm_quantize_", "add_gated_"):
        assert reason(operator, device, {"x": x}) is None
        assert reason(operator, device, {"x": x.T}) == "x is not contiguous"


@pytest.mark.parametrize("dtype", (torch.float32, torch.int8, torch.float8_e4m3fn))
@pytest.mark.parametrize("quantize_query", (True, False))
def test_qk_norm_rope_append(dtype, quantize_query, on_device, triton_module):
    if INTERPRETED and dtype == torch.float8_e4m3fn:
        pytest.skip("the interpreter has no float8: run it on a GPU, without TRITON_INTERPRET")
    arguments = append_arguments(dtype, dtype, quantize_query and dtype.itemsize == 1)
    query = on_device(triton_module("attention").qk_norm_rope_append, arguments)
    want = append_reference(arguments)
    assert_stored(query, want[0], arguments[8])
    assert_stored(arguments[6][:, 4:9], want[1], arguments[9])
    assert_stored(arguments[7][:, 4:9], want[2], arguments[10])
    for cache in arguments[6:8]:
        assert bool((cache[:, :4].float() == 3).all() and (cache[:, 9:].float() == 3).all())


@pytest.mark.parametrize("dtype", (torch.float32, torch.int8, torch.float8_e4m3fn))
@pytest.mark.parametrize("tokens", (5, 70))
def test_values_with_tokens_innermost(dtype, tokens, on_device, triton_module):
    if INTERPRETED and dtype == torch.float8_e4m3fn:
        pytest.skip("the interpreter has no float8: run it on a GPU, without TRITON_INTERPRET")
    arguments = append_arguments(dtype, dtype, tokens=tokens, room=96)
    arguments[7] = with_tokens_innermost(arguments[7])
    query = on_device(triton_module("attention").qk_norm_rope_append, arguments)
    want = append_reference(arguments)
    assert_stored(query, want[0], None)
    stop = 4 + tokens
    for cache, exact, scale in zip(arguments[6:8], want[1:], arguments[9:11], strict=True):
        assert_stored(cache[:, 4:stop], exact, scale)
        assert bool((cache[:, :4].float() == 3).all() and (cache[:, stop:].float() == 3).all())


@pytest.mark.parametrize("mean", (0, 2))
@pytest.mark.parametrize(("tokens", "length", "head_dim"), [(1, 1, 64), (7, 200, 64), (3, 130, 128)])
def test_attention_int8(tokens, length, head_dim, mean, on_device, triton_module):
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    arguments = attention_arguments(length, 1, tokens, 2, head_dim, 200, mean, dtype)
    got = on_device(triton_module("attention").attention_int8, arguments)
    assert got.dtype == dtype and error(got, attention_reference(arguments)) < 2e-3


@pytest.mark.parametrize("innermost", (False, True))
def test_scales_of_each_sample(innermost, on_device, triton_module):
    arguments = per_sample(append_arguments(torch.int8, torch.int8, batch=3), 9, 10)
    if innermost:
        arguments[7] = with_tokens_innermost(arguments[7])
    on_device(triton_module("attention").qk_norm_rope_append, arguments)
    _, key, value = append_reference(arguments)
    assert_stored(arguments[6][:, 4:9], key, arguments[9])
    assert_stored(arguments[7][:, 4:9], value, arguments[10])
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    arguments = per_sample(attention_arguments(70, 3, 33, 2, 64, 80, dtype=dtype), 3, 4)
    got = on_device(triton_module("attention").attention_int8, arguments)
    assert error(got, attention_reference(arguments)) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "length"), [(1560, 6240), (4680, 4680), (4683, 9361)])
def test_attention_int8_of_whole_chunks(tokens, length, on_device, triton_module):
    arguments = attention_arguments(length, 1, tokens, 12, 128, length + 3)
    got = on_device(triton_module("attention").attention_int8, arguments)
    rows = torch.arange(0, tokens, tokens // 50)
    arguments[0] = arguments[0][:, rows]
    assert error(got[:, rows], attention_reference(arguments)) < 2e-3


@pytest.mark.parametrize(("remembered", "lead"), [(0, 0), (0, 2), (1, 2), (2, 2)])
@pytest.mark.parametrize("shape", [(2, 3, 5, 24), (1, 1, 7, 16), (1, 2, 40, 33)])
def test_rms_norm_silu(remembered, lead, shape, on_device, triton_module):
    g = generator()
    x, weight = torch.randn(shape, generator=g) * 3, torch.randn(shape[3], generator=g)
    x[0, 0, 0] = 0
    bias = torch.randn(shape[3], generator=g) if remembered else None
    past = torch.randn(shape[0], remembered, *shape[2:], generator=g) if remembered else None
    got = on_device(triton_module("channel_norm").rms_norm_silu, (x, bias, weight, past, lead))
    torch.testing.assert_close(got, ops.rms_norm_silu(x, bias, weight, past, lead), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 24), (300, 16), (33, 33)])
def test_add_bias(shape, on_device, triton_module):
    total, x, bias = (torch.randn(*size, generator=generator(i)) for i, size in enumerate((shape, shape, shape[1:])))
    want = total + x + bias
    on_device(triton_module("channel_norm").add_bias, (total, x, bias))
    torch.testing.assert_close(total, want)


@pytest.mark.parametrize("wrong", (-1, 80, 2**31 - 1, -(2**31)))
def test_an_order_out_of_range_stays_in_the_row(wrong, on_device, triton_module):
    """The nearest channel is read in its place: no address depends on what a file says."""
    order = torch.arange(80, dtype=torch.int32)
    order[[0, 40, 79]] = wrong
    x, (scale, zero_point) = (
        torch.randn(3, 80, generator=generator(1)),
        (torch.tensor([0.1, 0.2]), torch.tensor([7, 9])),
    )
    calls = [(x, each, 16, scale, zero_point.int()) for each in (order, order.clamp(0, 79))]
    got, want = (on_device(triton_module("quantize").quantize_static, call) for call in calls)
    assert torch.equal(got, want)
