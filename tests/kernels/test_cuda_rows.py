"""Norms and static quantization in CUDA: what is refused on any machine, the codes on a Hopper GPU."""

from __future__ import annotations

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

from qarvd_kernels.cuda import norm, quantize, rows


def hopper_reason() -> str | None:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU of compute capability 9.0 (Hopper)"
    return rows.unsupported_reason("norm_quantize", torch.device("cuda", 0), None)


gpu = [pytest.mark.gpu, pytest.mark.skipif(hopper_reason() is not None, reason=str(hopper_reason()))]


@pytest.mark.parametrize(
    ("channels", "dtypes", "reason"),
    [
        (1536, (torch.bfloat16, torch.bfloat16), None),
        (5120, (torch.float16, None), None),
        (1500, (torch.bfloat16, None), "rows of 1500 channels, expected a multiple of 256 up to 5120"),
        (8960, (torch.bfloat16, None), "rows of 8960 channels"),
        (1536, (torch.float32, None), "activations in torch.float32, expected one 16-bit dtype"),
        (1536, (torch.bfloat16, torch.float16), "activations in torch.bfloat16 and torch.float16"),
    ],
)
def test_refuses_other_rows(channels, dtypes, reason):
    x, y = (None if dtype is None else torch.empty(2, channels, dtype=dtype) for dtype in dtypes)
    got = rows._unsupported_arguments("add_norm_quantize", {"x": x, "y": y})
    assert got is None if reason is None else got.startswith(reason)


def test_refuses_other_rotations():
    x = torch.empty(2, 1536, dtype=torch.bfloat16)
    got = rows._unsupported_arguments("norm_quantize_rows", {"x": x, "rotation": 64})
    assert got == "blocks of 64 channels, expected one of (1, 128)"
    assert rows._unsupported_arguments("norm_quantize_rows", {"x": x, "rotation": 128}) is None


def test_refuses_to_write_to_what_is_not_contiguous():
    x = torch.empty(1536, 1536, dtype=torch.bfloat16).T
    assert rows._unsupported_arguments("add_norm_quantize_", {"x": x}) == "x is not contiguous"
    assert rows._unsupported_arguments("add_norm_quantize", {"x": x}) is None


def test_refuses_other_devices():
    for module in (norm, quantize):
        assert "needs an NVIDIA GPU" in module.unsupported_reason("norm_quantize", torch.device("cpu"), None)


def on_gpu(arguments):
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]


def poison(x):
    """Leaves freed blocks of garbage, which the next allocations of these sizes most likely get."""
    for dtype in (x.dtype, torch.int8):
        torch.empty(x.shape, dtype=dtype, device="cuda").view(torch.uint8).fill_(0xFF)


SHAPES = [
    (1, 256, 0, 1),
    (7, 512, 512, 1),
    (6, 1536, 128, 3),
    (4680, 1536, 128, 3),
    (4683, 1536, 130, 3),
    (63, 5120, 128, 1),
]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize(("m", "c", "outliers", "groups"), SHAPES)  # rows, channels, outliers, groups of rows
class TestOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize(("affine", "modulated"), [(False, True), (True, False), (True, True), (False, False)])
    @pytest.mark.parametrize("added", ("no", "plain", "gated"))
    def test_norms(self, m, c, outliers, groups, dtype, affine, modulated, added):
        g = generator(1)
        x, y = ((torch.randn(m, c, generator=g) * 2 + 1).to(dtype) for _ in range(2))
        x[0] = 100.0 + torch.arange(c) % 2  # a mean far above the deviation
        gate = torch.randn(groups, c, generator=g) if added == "gated" else None
        tables, order = norm_tables(c, groups, affine, modulated), quantizer(c, outliers)
        poison(x)
        if added == "no":
            codes, total = norm.norm_quantize(*on_gpu((x, *tables, 1e-6, *order))), x.double()
        else:
            total = x.double() + y.double() * (1 if gate is None else gate.double().repeat_interleave(m // groups, 0))
            got, codes = norm.add_norm_quantize(*on_gpu((x, y, gate, *tables, 1e-6, *order)))
            torch.testing.assert_close(got.cpu().double(), total, rtol=2**-8, atol=1e-5)
            in_place = x.cuda()
            again = norm.add_norm_quantize_(in_place, *on_gpu((y, gate, *tables, 1e-6, *order)))
            assert torch.equal(in_place, got) and torch.equal(again, codes)
        assert_codes(codes.cpu(), codes_reference(norm_reference(total, *tables, 1e-6), *order)[0], slack=4e-3)

    def test_quantize_static(self, m, c, outliers, groups, dtype):
        x = (torch.randn(m, c, generator=generator()) * 3).to(dtype)
        x[0, :4] = torch.tensor([6e4, -6e4, float("inf"), -float("inf")])
        order = quantizer(c, outliers)
        poison(x)
        got = quantize.quantize_static(*on_gpu((x.view(1, m, c), *order)))
        assert_codes(got[0].cpu(), codes_reference(x, *order)[0])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("rotation", (1, 128))
@pytest.mark.parametrize(("m", "c", "_", "groups"), SHAPES)
class TestScalesPerRowOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize(("affine", "modulated"), [(False, True), (True, False), (False, False)])
    @pytest.mark.parametrize("added", ("no", "plain", "gated"))
    def test_norms(self, m, c, _, groups, rotation, dtype, affine, modulated, added):
        g = generator(1)
        x, y = ((torch.randn(m, c, generator=g) * 2 + 1).to(dtype) for _ in range(2))
        gate = torch.randn(groups, c, generator=g) if added == "gated" else None
        tables, rows_quantizer = norm_tables(c, groups, affine, modulated), row_quantizer(c, rotation)
        poison(x)
        if added == "no":
            codes, scale = norm.norm_quantize_rows(*on_gpu((x, *tables, 1e-6, *rows_quantizer)))
            total = x.double()
        else:
            total = x.double() + y.double() * (1 if gate is None else gate.double().repeat_interleave(m // groups, 0))
            got = x.cuda()
            codes, scale = norm.add_norm_quantize_rows_(got, *on_gpu((y, gate, *tables, 1e-6, *rows_quantizer)))
            torch.testing.assert_close(got.cpu().double(), total, rtol=2**-8, atol=1e-5)
        exact = rotated(norm_reference(total, *tables, 1e-6), *rows_quantizer)
        assert_row_codes(codes.cpu(), scale.cpu(), exact, slack=4e-3)

    def test_quantize_rows(self, m, c, _, groups, rotation, dtype):
        x = (torch.randn(m, c, generator=generator()) * 3).to(dtype)
        x[-1] = 0
        poison(x)
        codes, scale = quantize.quantize_rows(*on_gpu((x.view(1, m, c), *row_quantizer(c, rotation))))
        assert codes.shape == (1, m, c) and scale.shape == (1, m)
        assert_row_codes(codes[0].cpu(), scale[0].cpu(), rotated(x, *row_quantizer(c, rotation)), slack=4e-3)


class TestMoreOnGPU:
    pytestmark = gpu

    def test_views_that_start_anywhere(self):
        x = torch.randn(9, 512, device="cuda", dtype=torch.bfloat16).flatten()[3 : 3 + 8 * 512].view(8, 512)
        order = quantizer(512, 16)
        got = quantize.quantize_static(x, *on_gpu(order))
        assert_codes(got.cpu(), codes_reference(x.cpu(), *order)[0])

    def test_sums_in_place_that_start_anywhere(self):
        held = torch.randn(9 * 512, device="cuda", dtype=torch.bfloat16)
        x, y, before = held[3 : 3 + 8 * 512].view(8, 512), torch.randn_like(held)[: 8 * 512].view(8, 512), held.clone()
        arguments = (*[None] * 4, 1e-6, *on_gpu(quantizer(512, 16)))
        total, codes = norm.add_norm_quantize(x, y, None, *arguments)
        assert torch.equal(norm.add_norm_quantize_(x, y, None, *arguments), codes) and torch.equal(x, total)
        assert torch.equal(held[:3], before[:3]) and torch.equal(held[3 + 8 * 512 :], before[3 + 8 * 512 :])

    def test_follows_a_kernel_that_is_still_running(self):
        """The launch overlaps the end of the kernel before it, and must not read what that one has yet to write."""
        order = on_gpu(quantizer(1536, 128))
        x = torch.randn(4680, 1536, device="cuda", dtype=torch.bfloat16)
        tables = on_gpu(norm_tables(1536, 1, False, True))
        want = None
        for _ in range(20):
            total, first = norm.add_norm_quantize(x, x, None, *tables, 1e-6, *order)
            total, second = norm.add_norm_quantize(total, x, None, *tables, 1e-6, *order)
            want = (first, second) if want is None else want
            assert torch.equal(first, want[0]) and torch.equal(second, want[1])
            stream = x.clone()
            for codes in want:
                assert torch.equal(norm.add_norm_quantize_(stream, x, None, *tables, 1e-6, *order), codes)
            assert torch.equal(stream, total)
