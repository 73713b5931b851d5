"""8-bit attention on a Hopper GPU; that it compiles as meant is tested with the other CUDA sources."""

from __future__ import annotations

import pytest
import torch
from fp8_attention_reference import attention_reference, tensor_core_scores
from kernel_inputs import generator
from test_cache_attention import error, fp8_reference, per_sample, with_tokens_innermost

import qarvd_kernels as ops
from qarvd_kernels.cuda import attention

FP8 = torch.float8_e4m3fn
BAR = 2e-3  # of a float64 reference; rounding the result to bfloat16 alone takes 1.7e-3 of it


def hopper_reason() -> str | None:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU of compute capability 9.0 (Hopper)"
    return attention.unsupported_reason("attention_fp8", torch.device("cuda", 0), None)


gpu = [pytest.mark.gpu, pytest.mark.skipif(hopper_reason() is not None, reason=str(hopper_reason()))]


def cached(batch, tokens, length, heads, mean=0.0, spread=1.0, device="cuda"):
    """Arguments of `attention_fp8`, with a cache that holds NaN after `length`."""
    g, room = generator(length), -(-length // 16) * 16
    query, key, value = (torch.randn(batch, size, heads, 128, generator=g) for size in (tokens, length, length))
    query, value = query * spread, value + mean * torch.randn(heads, 128, generator=g)
    scales = [x.abs().amax((0, 1, 3)) * 4 / 448 for x in (query, key, value)]
    codes = [(x / scale[:, None]).to(FP8) for x, scale in zip((query, key, value), scales, strict=True)]
    for index in (1, 2):
        behind = torch.full((batch, room - length, heads, 128), float("nan")).to(FP8)
        codes[index] = torch.cat([codes[index].view(torch.uint8), behind.view(torch.uint8)], 1).view(FP8)
    codes[2] = with_tokens_innermost(codes[2].view(torch.uint8)).view(FP8)
    return [*(x.to(device) for x in codes), *(x.to(device) for x in scales), length]


def test_refuses_other_devices_and_layouts():
    assert "needs an NVIDIA GPU" in attention.unsupported_reason("attention_fp8", torch.device("cpu"), None)
    query, key, value = cached(2, 5, 20, 3, device="cpu")[:3]
    assert attention._unsupported_layout(query, key, value) is None
    assert "tokens innermost" in attention._unsupported_layout(query, key, key)
    assert "same room" in attention._unsupported_layout(query, key[:, :20].contiguous(), value)
    room = attention.MAX_ROOM + 16
    far = torch.empty(1, 1, 128, room, device="meta").permute(0, 3, 1, 2)
    assert "at most" in attention._unsupported_layout(query[:1, :, :1], far, far)
    assert "heads of 64" in attention._unsupported_layout(query[..., :64], key[..., :64], value[..., :64])


@pytest.mark.parametrize(
    ("products", "total"),
    [
        ([(1, 1), (1.5, -1.5)], -1.25),
        ([(256, 32), (1, 0.5)], 8192),  # half a unit is cut off
        ([(256, 32), (1, 1.75)], 8193),
        ([(256, 32), (1, -1.75)], 8191),  # towards zero
        ([(256, 32), (1, 0.75), (1, 0.75)], 8192),  # each by itself
        ([(256, 32)] + [(0, 0)] * 31 + [(1, 0.75), (1, 1)], 8193),  # also beside an earlier sum
        ([(1.5, 1.5), (1, -1.25), (2**-6, 2**-7)], 1 + 2**-13),  # 1.5 * 1.5 has exponent 0
        ([(256, 64), (1, 1)], 16384),  # the sum needs a bit more
        ([(448, 448)] * 2 + [(448, -448)] * 2 + [(2**-9, 1)], 0),
        ([(2**-9, 2**-9)], 2**-18),
    ],
)
def test_how_tensor_cores_sum(products, total):
    rows = torch.zeros(2, 1, 64)
    rows[:, 0, : len(products)] = torch.tensor(products).T
    query, key = rows.to(FP8)
    assert tensor_core_scores(query, key).item() == total


def test_reference_is_attention_but_for_roundings():
    """In 3 bits a weight is up to 1 / 16 off, 0.027 on average; one key alone, or values that are equal, hide that."""
    arguments = cached(2, 9, 300, 2, device="cpu")
    assert 0.01 < error(attention_reference(arguments), fp8_reference(arguments)) < 0.03
    arguments[2][:, :300] = arguments[2][:, :1].clone()
    torch.testing.assert_close(attention_reference(arguments), fp8_reference(arguments))
    arguments = cached(1, 3, 1, 2, device="cpu")
    torch.testing.assert_close(attention_reference(arguments), fp8_reference(arguments))


class TestOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize(
        ("batch", "tokens", "length", "heads"),
        [
            (1, 1, 1, 1),
            (1, 7, 129, 2),
            (2, 300, 777, 3),
            (2, 193, 64, 2),
            (1, 4680, 4680, 12),
            (1, 4683, 9361, 12),
            (3, 129, 4683, 5),
            (2, 1560, 6240, 12),
        ],
    )
    def test_against_float64(self, batch, tokens, length, heads):
        """What lies after the visible keys is NaN, and so was the output."""
        arguments = cached(batch, tokens, length, heads)
        torch.full((batch, tokens, heads, 128), float("nan"), device="cuda", dtype=torch.bfloat16)
        got = attention.attention_fp8(*arguments)
        rows = torch.arange(0, tokens, max(tokens // 100, 1), device="cuda")
        rows = torch.cat([rows, rows.new_tensor([tokens - 1])])
        assert bool(got.isfinite().all())
        some = [arguments[0].view(torch.uint8)[:, rows].view(FP8), *arguments[1:]]
        assert error(got[:, rows], attention_reference(some)) < BAR
        assert error(got[:, rows], fp8_reference(some)) < 0.03  # what weights of 3 bits cost
        assert torch.equal(attention.attention_fp8(*arguments), got)

    def test_scales_of_each_sample(self):
        """Also by the implementations that take over where values do not lie with tokens innermost."""
        arguments = per_sample(cached(3, 193, 777, 5), 4, 5)
        assert error(attention.attention_fp8(*arguments), attention_reference(arguments)) < BAR
        arguments[2] = arguments[2].contiguous()
        assert error(ops.attention_fp8(*arguments), fp8_reference(arguments)) < 0.03

    @pytest.mark.parametrize("spread", (0.1, 1.0))
    def test_many_keys_whose_values_have_a_mean(self, spread):
        """Accumulators of 8-bit products lose a fifth here unless they are emptied in time."""
        arguments = cached(1, 256, 32760, 2, mean=1.0, spread=spread)
        assert error(attention.attention_fp8(*arguments), fp8_reference(arguments)) < 0.01

    @pytest.mark.parametrize("spread", (0.1, 1.0, 2.0, 3.0, 4.0))
    @pytest.mark.parametrize("mean", (0.0, 1.0))
    def test_many_keys(self, mean, spread):
        arguments = cached(1, 256, 32760, 2, mean=mean, spread=spread)
        assert error(attention.attention_fp8(*arguments), attention_reference(arguments)) < BAR

    @pytest.mark.parametrize("spread", (2.0, 3.0, 4.0))
    def test_long_tails(self, spread):
        """Rows that are not split have one reference: e4m3 keeps few bits of weights below 2^-14 of the largest."""
        arguments = cached(1, 2112, 9360, 12, spread=spread)
        got = attention.attention_fp8(*arguments)[:, ::41]
        arguments[0] = arguments[0].view(torch.uint8)[:, ::41].view(FP8)
        assert error(got, attention_reference(arguments)) < 5e-3

    def test_extreme_values(self):
        """One key takes all the weight, far above the first tiles' maximum; codes at the ends of the range."""
        arguments = cached(1, 200, 2000, 2)
        arguments[0][:] = 448.0
        arguments[1][:, :] = -448.0
        arguments[1][:, 100] = 448.0  # key tiles run backwards: this one is met last
        got = attention.attention_fp8(*arguments)
        want = arguments[2][:, 100:101].double() * arguments[5].double()[:, None]
        assert error(got, want.expand_as(got)) < BAR

    def test_every_tile_exceeds_the_last_ones_maximum(self):
        """Key tiles run backwards: with scores that fall along the keys the reference moves time and again."""
        arguments = cached(1, 200, 4000, 2, mean=1.0)
        arguments[0][..., 0] = 448.0
        arguments[1][:, :4000, :, 0] = torch.linspace(448, -448, 4000, device="cuda")[:, None].to(FP8)
        got = attention.attention_fp8(*arguments)
        assert error(got, attention_reference(arguments)) < BAR
        assert error(got, fp8_reference(arguments)) < 0.03

    def test_in_the_operator(self):
        arguments = cached(1, 130, 400, 2)
        assert torch.equal(ops.attention_fp8(*arguments), attention.attention_fp8(*arguments))
        assert ops.tokens_innermost(torch.device("cuda"), 128, FP8)
        assert not ops.tokens_innermost(torch.device("cuda"), 64, FP8)
        arguments[2] = arguments[2].contiguous()  # not its layout: another implementation takes over
        assert error(ops.attention_fp8(*arguments), fp8_reference(arguments)) < 0.03

    def test_on_a_stream_and_in_a_graph(self):
        arguments = cached(1, 300, 1000, 12)
        want, stream, graph = attention.attention_fp8(*arguments), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=stream):
            out = attention.attention_fp8(*arguments)
        for _ in range(3):
            out.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, want)
