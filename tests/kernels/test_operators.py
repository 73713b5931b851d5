"""The operators against float64, on ragged shapes, views and the ends of the code range."""

import itertools

import pytest
import torch
from kernel_inputs import assert_row_codes, rotated, row_quantizer

import qarvd_kernels as ops

SHAPES = [(0, 8, 4, 3), (1, 16, 8, 0), (7, 18, 5, 18), (33, 64, 24, 32), (5, 40, 3, 6)]  # M, K, N, outliers
CASES = list(itertools.product(SHAPES, (4, 8)))


def make_layer(m, k, n, bits, seed=0):
    """Random codes, with rows of all-lowest and all-highest values and zero-points at both ends of the range."""
    g = torch.Generator().manual_seed(seed)
    levels = 2**bits
    a = torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8)
    if m:
        a[0] = -128
    codes = torch.randint(0, levels, (n, k), generator=g, dtype=torch.uint8)
    codes[0], codes[-1] = 0, levels - 1
    packed = codes ^ 128 if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
    zero_point = torch.randint(0, levels, (n, 2), generator=g, dtype=torch.int16)
    zero_point[0], zero_point[-1] = levels - 1, 0
    scale = torch.rand(n, 2, generator=g) + 0.1
    return {"a": a, "codes": codes, "packed": packed, "zero_point": zero_point, "scale": scale}


def expected(a, a_zero_point, a_scale, layer, outliers, bias):
    """float64: every factor is written out, group by group."""
    a = a.double()
    total = bias.double().clone() if bias is not None else torch.zeros(layer["codes"].shape[0], dtype=torch.float64)
    for g, part in enumerate((slice(0, outliers), slice(outliers, a.shape[-1]))):
        x = (a[..., part] - a_zero_point[g]) * a_scale[..., g, None]
        w = (layer["codes"][:, part].double() - layer["zero_point"][:, g, None]) * layer["scale"][:, g, None].double()
        total = total + x @ w.T
    return total


@pytest.mark.parametrize(("shape", "bits"), CASES)
def test_static_matches_float64(shape, bits):
    m, k, n, outliers = shape
    layer = make_layer(m, k, n, bits)
    input_scale, input_zero_point = torch.tensor([0.5, 0.03]), torch.tensor([0, 255], dtype=torch.int32)
    bias = torch.linspace(-1, 1, n)
    args = (layer["packed"], layer["scale"], layer["zero_point"], input_scale, input_zero_point)
    got = ops.dual_scale_linear_static(layer["a"], *args, bias, bits, outliers, torch.float32)
    want = expected(layer["a"], input_zero_point.double() - 128, input_scale.double(), layer, outliers, bias)
    assert got.shape == (m, n)
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=3e-6 * (want.abs().max().item() if m else 1))


@pytest.mark.parametrize(("shape", "bits"), CASES)
def test_integer_sums_are_exact(shape, bits):
    """With scales of one in one group the result is an integer, and must be that integer to the last bit."""
    m, k, n, outliers = shape
    layer = make_layer(m, k, n, bits, seed=1)
    layer["scale"] = torch.ones(n, 2)
    for group in (0, 1):
        a_scale = torch.zeros(m, 2)
        a_scale[:, group] = 1.0
        args = (a_scale, layer["packed"], layer["scale"], layer["zero_point"])
        got = ops.dual_scale_linear_dynamic(layer["a"], *args, None, bits, outliers, torch.float64)
        want = expected(layer["a"], (0, 0), a_scale.double(), layer, outliers, None)
        assert torch.equal(got, want.float().double())


@pytest.mark.parametrize("bits", (4, 8))
def test_zero_points_outside_the_code_range(bits):
    """Unclamped zero-points of the reference implementation stay exact."""
    layer = make_layer(9, 32, 6, bits)
    layer["zero_point"][:] = torch.tensor([-126, 300], dtype=torch.int16)
    input_scale, input_zero_point = torch.tensor([0.5, 0.25]), torch.tensor([-80, 400], dtype=torch.int32)
    args = (layer["packed"], layer["scale"], layer["zero_point"], input_scale, input_zero_point)
    got = ops.dual_scale_linear_static(layer["a"], *args, None, bits, 8, torch.float32)
    want = expected(layer["a"], input_zero_point.double() - 128, input_scale.double(), layer, 8, None)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("bits", (4, 8))
def test_views_and_batches(bits):
    layer = make_layer(12, 24, 10, bits)
    args = (layer["packed"], layer["scale"], layer["zero_point"])
    scale = torch.rand(12, 2)
    want = ops.dual_scale_linear_dynamic(layer["a"], scale, *args, None, bits, 8, torch.bfloat16)
    wide = torch.zeros(14, 30, dtype=torch.int8)
    wide[1:13, 3:27] = layer["a"]
    offset = torch.zeros(layer["packed"].numel() + 1, dtype=torch.uint8)
    offset[1:] = layer["packed"].flatten()
    args = (offset[1:].view_as(layer["packed"]), *args[1:])
    got = ops.dual_scale_linear_dynamic(wide[1:13, 3:27], scale, *args, None, bits, 8, torch.bfloat16)
    assert torch.equal(got, want) and got.dtype == torch.bfloat16
    batched = ops.dual_scale_linear_dynamic(
        layer["a"].view(3, 4, 24), scale.view(3, 4, 2), *args, None, bits, 8, torch.bfloat16
    )
    assert torch.equal(batched.view(12, 10), want)


def test_quantize_static():
    order = torch.tensor([2, 0, 1, 3], dtype=torch.int32)
    x = torch.tensor([[1.0, -3.0, 100.0, 0.25], [0.0, 0.5, -100.0, 0.75]])
    scale, zero_point = torch.tensor([2.0, 0.5]), torch.tensor([10, 128], dtype=torch.int32)
    got = ops.quantize_static(x, order, 1, scale, zero_point)
    # 0.25 / 0.5 = 0.5 and 0.75 / 0.5 = 1.5 round to the even neighbour
    want = torch.tensor([[60 - 128, 2, -6, 0], [0 - 128, 0, 1, 2]], dtype=torch.int8)
    assert torch.equal(got, want)
    assert torch.equal(ops.quantize_static(x.bfloat16(), order, 1, scale, zero_point), want)


@pytest.mark.parametrize("rotation", (1, 2, 16))
def test_quantize_rows(rotation):
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    x[0, 1] = 0
    codes, scale = ops.quantize_rows(x, *row_quantizer(48, rotation))
    assert_row_codes(codes, scale, rotated(x, *row_quantizer(48, rotation)))
    torch.testing.assert_close(ops.rotate(ops.rotate(x, rotation), rotation), x)  # its own inverse
    with pytest.raises(ValueError, match=r"rotation is 32, expected a power of two that divides 48 \(the channels\)"):
        ops.quantize_rows(x, *row_quantizer(48, 32))


@pytest.mark.parametrize("outliers", (0, 3, 16))
def test_quantize_dynamic(outliers):
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    x[0, 1] = 0
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    codes, scale = ops.quantize_dynamic(x, order, outliers)
    assert scale.shape == (2, 5, 2) and bool((scale > 0).all())
    assert not codes[0, 1].any()
    permuted = x[..., order.long()]
    for g, part in enumerate((slice(0, outliers), slice(outliers, 16))):
        back = codes[..., part] * scale[..., g, None]
        assert bool(((back - permuted[..., part]).abs() <= scale[..., g, None] / 2 * 1.0001).all())
        if part.stop > part.start:
            assert int(codes[1, :, part].abs().max()) == 127
        else:
            assert bool((scale[..., g] == 1).all())


@pytest.mark.parametrize("bits", (4, 8))
def test_weight_only_equals_dequantized(bits):
    layer = make_layer(1, 32, 6, bits)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    args = (layer["packed"], layer["scale"], layer["zero_point"], order)
    weight = ops.dequantize_weight(*args, bits, 8, torch.float32)
    zero_point = torch.cat([layer["zero_point"][:, :1].expand(-1, 8), layer["zero_point"][:, 1:].expand(-1, 24)], 1)
    scale = torch.cat([layer["scale"][:, :1].expand(-1, 8), layer["scale"][:, 1:].expand(-1, 24)], 1)
    want = torch.empty(6, 32)
    want[:, order.long()] = (layer["codes"].float() - zero_point) * scale
    assert torch.equal(weight, want)
    x, bias = torch.randn(4, 32), torch.randn(6)
    got = ops.weight_only_linear(x, *args, bias, bits, 8)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, want, bias))


def all_calls(bits):
    layer = make_layer(7, 16, 6, bits)
    x, order = torch.randn(7, 16), torch.randperm(16).to(torch.int32)
    input_scale, input_zero_point = torch.tensor([0.5, 0.03]), torch.tensor([3, 120], dtype=torch.int32)
    weight, bias = (layer["packed"], layer["scale"], layer["zero_point"]), torch.randn(6)
    return [
        (ops.quantize_static, (x, order, 4, input_scale, input_zero_point)),
        (ops.quantize_dynamic, (x, order, 4)),
        (ops.unpack_weight, (layer["packed"], bits)),
        (
            ops.dual_scale_linear_static,
            (layer["a"], *weight, input_scale, input_zero_point, bias, bits, 4, torch.bfloat16),
        ),
        (ops.dual_scale_linear_dynamic, (layer["a"], torch.rand(7, 2), *weight, None, bits, 4, torch.float32)),
        (ops.dequantize_weight, (*weight, order, bits, 4, torch.bfloat16)),
        (ops.weight_only_linear, (x, *weight, order, bias, bits, 4)),
    ]


@pytest.mark.parametrize("bits", (4, 8))
def test_opcheck(bits):
    for op, args in all_calls(bits):
        torch.library.opcheck(op.overload, args)


def test_compiles_as_one_graph():
    calls = all_calls(4)

    def everything(x):
        return [op(*((x, *args[1:]) if args[0].is_floating_point() else args)) for op, args in calls]

    x = torch.randn(7, 16)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x), everything(x), strict=True):
        for g, w in zip(
            got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,), strict=True
        ):
            assert torch.equal(g, w)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits is 3"),
        ({"outliers": 17}, "num_outliers is 17, expected 0 to 16"),
        ({"a": torch.zeros(2, 15, dtype=torch.int8)}, r"shape of the quantized activation is \(2, 15\)"),
        ({"a": torch.zeros(2, 16)}, "dtype of the quantized activation is torch.float32"),
        ({"scale": torch.zeros(6, 1)}, r"shape of weight_scale is \(6, 1\), expected \(6, 2\)"),
        ({"zero_point": torch.zeros(6, 2)}, "dtype of weight_zero_point is torch.float32, expected torch.int16"),
    ],
)
def test_bad_arguments_are_named(change, message):
    given = {**make_layer(2, 16, 6, 8), "bits": 8, "outliers": 4, **change}
    with pytest.raises(ValueError, match=message):
        ops.dual_scale_linear_static(
            given["a"], given["packed"], given["scale"], given["zero_point"],
            torch.ones(2), torch.zeros(2, dtype=torch.int32), None, given["bits"], given["outliers"], torch.float32,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "bits"), CASES)
def test_cuda_equals_cpu(shape, bits):
    m, k, n, outliers = shape
    layer = make_layer(m, k, n, bits)
    args = (layer["a"], torch.rand(m, 2), layer["packed"], layer["scale"], layer["zero_point"])
    want = ops.dual_scale_linear_dynamic(*args, None, bits, outliers, torch.float32)
    got = ops.dual_scale_linear_dynamic(*(t.cuda() for t in args), None, bits, outliers, torch.float32)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-6 * (want.abs().max().item() if m else 1))
