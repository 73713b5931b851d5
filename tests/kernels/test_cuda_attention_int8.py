"""int8 attention on a Hopper GPU, and what the rounding of softmax weights costs anywhere."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import generator
from test_cache_attention import attention_arguments, attention_reference, error, per_sample, with_tokens_innermost
from test_cuda_attention import gpu

import qarvd_kernels as ops
from qarvd_kernels.cuda import attention

BAR = 2.5e-3  # of a float64 reference; rounding the result to bfloat16 alone takes 1.7e-3 of it


def cached(batch, tokens, length, heads, mean=0.0, spread=1.0):
    """Arguments on the GPU with values as the kernel needs them; what lies after `length` would be seen at once."""
    arguments = attention_arguments(length, batch, tokens, heads, 128, -(-length // 16) * 16 + 16, mean=mean)
    arguments[0] *= spread
    arguments[1][:, length:] = arguments[2][:, length:] = 127
    arguments[2] = with_tokens_innermost(arguments[2])
    return [x.to("cuda") if isinstance(x, torch.Tensor) else x for x in arguments]


def about_mean(got, want):
    """Relative error of `[B, T, H, D]`, where the mean over queries does not count as right."""
    return float((got.double() - want).norm() / (want - want.mean(1, keepdim=True)).norm())


@pytest.mark.parametrize("spread", (0.5, 1.0, 2.0, 3.0))
@pytest.mark.parametrize("dominant", (False, True))
def test_weights_of_many_keys(spread, dominant):
    """At 32,760 keys the rounding of weights by tile costs at most 3.5 % of what differs between queries."""
    g, length, dim = generator(5), 32760, 64
    query, key, value = (torch.randn(1, size, 1, dim, generator=g) for size in (24, length, length))
    query = query * spread
    if dominant:
        key[:, 1000] = query.mean(1) * 4 / query.mean(1).square().mean().sqrt() / spread
    scales = [x.abs().amax((0, 1, 3)) / 127 for x in (key, value)]
    codes = [(x / scale[:, None]).round().to(torch.int8) for x, scale in zip((key, value), scales, strict=True)]
    arguments = [query.bfloat16(), *codes, *scales, length]
    got = ops.attention_int8(*arguments)
    assert about_mean(got, attention_reference(arguments, tile=None)) < 0.035
    exact = [query.bfloat16().double().transpose(1, 2), *(x.double().transpose(1, 2) for x in (key, value))]
    float_attention = torch.nn.functional.scaled_dot_product_attention(*exact).transpose(1, 2)
    assert about_mean(got, float_attention) < 0.035


class TestOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize(
        ("batch", "tokens", "length", "heads"),
        [
            (1, 1, 1, 1),
            (1, 7, 129, 2),
            (2, 300, 777, 3),
            (2, 129, 64, 2),
            (1, 4680, 4680, 12),
            (1, 4683, 9361, 12),
            (3, 129, 4683, 5),
            (2, 1560, 6240, 12),
        ],
    )
    @pytest.mark.parametrize("mean", (0.0, 2.0))
    def test_against_float64(self, batch, tokens, length, heads, mean):
        arguments = cached(batch, tokens, length, heads, mean)
        torch.full((batch, tokens, heads, 128), float("nan"), device="cuda", dtype=torch.bfloat16)
        got = attention.attention_int8(*arguments)
        rows = torch.arange(0, tokens, max(tokens // 100, 1), device="cuda")
        rows = torch.cat([rows, rows.new_tensor([tokens - 1])])
        assert bool(got.isfinite().all())
        some = [arguments[0][:, rows], *arguments[1:]]
        assert error(got[:, rows], attention_reference(some)) < BAR
        assert torch.equal(attention.attention_int8(*arguments), got)

    def test_scales_of_each_sample(self):
        """Also by the implementations that take over where values do not lie with tokens innermost."""
        arguments = per_sample(cached(3, 193, 777, 5), 3, 4)
        want = attention_reference(arguments)
        assert error(attention.attention_int8(*arguments), want) < BAR
        arguments[2] = arguments[2].contiguous()
        assert error(ops.attention_int8(*arguments), want) < BAR

    @pytest.mark.parametrize("spread", (0.1, 1.0, 3.0))
    @pytest.mark.parametrize("mean", (0.0, 1.0))
    def test_many_keys(self, mean, spread):
        arguments = cached(1, 256, 32760, 2, mean=mean, spread=spread)
        assert error(attention.attention_int8(*arguments), attention_reference(arguments)) < BAR

    def test_extreme_values(self):
        """One key takes all the weight, far above the first tiles' maximum; the largest sums that there are."""
        arguments = cached(1, 200, 2000, 2)
        arguments[0][:] = 50.0
        arguments[1][:, :] = -127
        arguments[1][:, 100] = 127  # key tiles run backwards: this one is met last
        arguments[2].fill_(127)
        got = attention.attention_int8(*arguments)
        want = 127 * arguments[4].double()[:, None].expand_as(got)
        assert error(got, want) < BAR
        arguments[2].fill_(-127)
        assert torch.equal(attention.attention_int8(*arguments), -got)

    def test_every_tile_exceeds_the_last_ones_maximum(self):
        """Key tiles run backwards: with scores that fall along the keys the reference moves time and again."""
        arguments = cached(1, 200, 4000, 2, mean=1.0)
        arguments[0][..., 0] = 40.0
        arguments[1][:, :4000, :, 0] = torch.linspace(127, -127, 4000, device="cuda")[:, None].to(torch.int8)
        assert error(attention.attention_int8(*arguments), attention_reference(arguments)) < BAR

    def test_queries_of_zero_and_far_apart(self):
        arguments = cached(1, 130, 400, 2)
        arguments[0][:, ::2] = 0
        arguments[0][:, 1::4] *= 1e-30
        arguments[0][:, 3::4] *= 100
        assert error(attention.attention_int8(*arguments), attention_reference(arguments)) < BAR

    def test_in_the_operator(self):
        arguments = cached(1, 130, 400, 2)
        assert torch.equal(ops.attention_int8(*arguments), attention.attention_int8(*arguments))
        assert ops.tokens_innermost(torch.device("cuda"), 128, torch.int8)
        assert not ops.tokens_innermost(torch.device("cuda"), 64, torch.int8)
        assert "expected torch.bfloat16" in attention.unsupported_reason(
            "attention_int8",
            torch.device("cuda", 0),
            {"query": arguments[0].half(), "key": arguments[1], "value": arguments[2]},
        )

    def test_on_a_stream_and_in_a_graph(self):
        arguments = cached(1, 300, 1000, 12)
        want, stream, graph = attention.attention_int8(*arguments), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=stream):
            out = attention.attention_int8(*arguments)
        for _ in range(3):
            out.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, want)
