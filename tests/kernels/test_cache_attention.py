"""QK norm, RoPE, the cache append and 8-bit attention, against float64 and torch's own attention."""

import pytest
import torch
from kernel_inputs import generator
from torch.nn import functional as F

import qarvd_kernels as ops

CACHES = [torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn]
B, T, H, D, S = 2, 5, 3, 8, 12


def append_arguments(
    key_dtype, value_dtype, quantize_query=False, start=4, batch=B, tokens=T, heads=H, head_dim=D, room=S
):
    g, width = generator(), heads * head_dim
    qkv = torch.randn(batch, tokens, 3 * width, generator=g) * 2
    q_weight, k_weight = (1 + 0.2 * torch.randn(width, generator=g) for _ in range(2))
    angle = torch.rand(tokens, head_dim // 2, generator=g) * 6
    caches = [torch.full((batch, room, heads, head_dim), 3.0).to(dtype) for dtype in (key_dtype, value_dtype)]
    scale = torch.rand(heads, generator=g) * 0.02 + 0.02
    scales = [scale if dtype.itemsize == 1 else None for dtype in (key_dtype, value_dtype)]
    query_scale = scale * 0.9 if quantize_query else None
    return [qkv, q_weight, k_weight, 1e-6, angle.cos(), angle.sin(), *caches, query_scale, *scales, start]


def with_tokens_innermost(cache):
    """The same values, `[B, S, H, D]` by shape and `[B, H, D, S]` in memory."""
    return cache.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def per_sample(arguments, *positions):
    """The arguments with scales `[B, H]`, another one for every sample, in place of the `[H]` at `positions`."""
    factors = torch.linspace(0.5, 2, arguments[0].shape[0])[:, None]
    return [x * factors.to(x.device) if i in positions and x is not None else x for i, x in enumerate(arguments)]


def alone(arguments, sample):
    """The arguments of one sample of a batch, tensors per sample cut to it."""
    batch = arguments[0].shape[0]
    cut = [x[sample : sample + 1] if isinstance(x, torch.Tensor) and x.ndim > 2 else x for x in arguments]
    return [x[sample] if isinstance(x, torch.Tensor) and x.shape == (batch, H) else x for x in cut]


def over_channels(scale):
    """Scales `[H]` or `[B, H]` as float64 beside `[B, T, H, D]`."""
    return scale.double()[..., None, :, None]


def append_reference(arguments):
    """float64 q, k, v `[B, T, H, D]` through complex numbers."""
    qkv, q_weight, k_weight, eps, cos, sin, key_cache = arguments[:7]
    heads = (-1, key_cache.shape[3])

    def norm_rotate(x, weight):
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
        pairs = torch.view_as_complex(x.unflatten(-1, heads).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())[:, None]).flatten(-2)

    query, key, value = qkv.double().chunk(3, dim=-1)
    return norm_rotate(query, q_weight), norm_rotate(key, k_weight), value.unflatten(-1, heads)


def assert_stored(stored, exact, scale):
    if scale is None:
        torch.testing.assert_close(stored.double(), exact, rtol=8e-3, atol=1e-6)
    elif stored.dtype == torch.int8:
        assert float((stored.double() - (exact / over_channels(scale)).clamp(-127, 127)).abs().max()) < 0.501
    else:
        want = (exact / over_channels(scale)).clamp(-448, 448)
        torch.testing.assert_close(stored.double(), want, rtol=1 / 15, atol=2e-3)


@pytest.mark.parametrize("key_dtype", CACHES)
@pytest.mark.parametrize("value_dtype", CACHES)
def test_qk_norm_rope_append(key_dtype, value_dtype):
    for quantize_query in {False, key_dtype.itemsize == 1}:
        arguments = append_arguments(key_dtype, value_dtype, quantize_query)
        key_cache, value_cache, query_scale, key_scale, value_scale = arguments[6:11]
        query = ops.qk_norm_rope_append(*arguments)
        want = append_reference(arguments)
        assert query.dtype == (key_dtype if quantize_query else torch.float32)
        assert_stored(query, want[0], query_scale)
        assert_stored(key_cache[:, 4:9], want[1], key_scale)
        assert_stored(value_cache[:, 4:9], want[2], value_scale)
        for cache in (key_cache, value_cache):  # nothing else is touched
            assert bool((cache[:, :4].float() == 3).all() and (cache[:, 9:].float() == 3).all())


@pytest.mark.parametrize("dtype", CACHES)
def test_append_to_values_with_tokens_innermost(dtype):
    plain, innermost = append_arguments(dtype, dtype), append_arguments(dtype, dtype)
    innermost[7] = with_tokens_innermost(innermost[7])
    assert torch.equal(ops.qk_norm_rope_append(*plain), ops.qk_norm_rope_append(*innermost))
    assert torch.equal(plain[7].float(), innermost[7].float()) and not innermost[7].is_contiguous()


def test_append_saturates():
    for dtype, largest in ((torch.int8, 127), (torch.float8_e4m3fn, 448)):
        arguments = append_arguments(dtype, dtype, True)
        arguments[0] *= 1e4
        arguments[8] = arguments[9] = torch.full((H,), 1e-4)
        query = ops.qk_norm_rope_append(*arguments)
        assert float(query.float().abs().max()) == float(arguments[7].float().abs().max()) == largest
        assert bool(arguments[6].float().isfinite().all())


def attention_arguments(length=S, batch=B, tokens=T, heads=H, head_dim=D, room=S, mean=0.0, dtype=torch.bfloat16):
    """Keys at both ends of the code range; a row of zeros among the queries, and one that is large."""
    g = generator(2)
    query = torch.randn(batch, tokens, heads, head_dim, generator=g)
    query[:, 0], query[:, -1] = 0, query[:, -1] * 40
    key = torch.randint(-127, 128, (batch, room, heads, head_dim), generator=g).to(torch.int8)
    key[:, 0], key[:, length // 2] = 127, -127
    key_scale = torch.rand(heads, generator=g) * 0.02 + 0.01
    value_scale = torch.rand(heads, generator=g) * 0.02 + 0.02
    value = torch.randn(batch, room, heads, head_dim, generator=g) + mean
    value = (value / value_scale[:, None]).clamp(-127, 127).round().to(torch.int8)
    return [query.to(dtype), key, value, key_scale, value_scale, length]


def attention_reference(arguments, tile=ops.KEY_TILE):
    """float64 attention of queries rounded to 255 levels per row, and of weights to 256 per row and tile of keys.

    Weights are not rounded if `tile` is None.
    """
    query, key, value, key_scale, value_scale, length = arguments
    step = query.float().abs().amax(-1, keepdim=True) / 127
    codes = (query.float() / step.where(step > 0, 1)).round().double()
    key, value = (x.double() * over_channels(scale) for x, scale in ((key, key_scale), (value, value_scale)))
    query, key, value = (t.transpose(1, 2) for t in (codes * step.double(), key[:, :length], value[:, :length]))
    weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
    if tile is not None:
        largest = [part.amax(-1, keepdim=True) for part in weights.split(tile, -1)]
        levels = [(255 * part / m).round() / 255 * m for part, m in zip(weights.split(tile, -1), largest, strict=True)]
        weights = torch.cat(levels, -1)
        weights /= weights.sum(-1, keepdim=True)
    return (weights @ value).transpose(1, 2)


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("length", (1, 7, S))
@pytest.mark.parametrize("mean", (0, 2))
def test_attention_int8(length, mean):
    arguments = attention_arguments(length, mean=mean)
    got, want = ops.attention_int8(*arguments), attention_reference(arguments)
    assert got.dtype == torch.bfloat16 and got.shape == want.shape
    assert error(got, want) < 2e-3
    assert error(got, attention_reference(arguments, tile=None)) < 5e-3  # what the rounding of weights costs
    arguments[1][:, length:] = 99  # what lies after `length` is not seen
    assert torch.equal(ops.attention_int8(*arguments), got)


def fp8_arguments(length=S, batch=B, tokens=T, heads=H, head_dim=D, room=S, mean=0.0):
    g = generator(3)
    scales = [torch.rand(heads, generator=g) * 0.01 + 0.01 for _ in range(3)]
    means = torch.tensor([0.0, 0.0, mean])
    tensors = [
        ((torch.randn(batch, size, heads, head_dim, generator=g) + m) / scale[:, None]).clamp(-448, 448)
        for size, scale, m in zip((tokens, room, room), scales, means, strict=True)
    ]
    return [*(x.to(torch.float8_e4m3fn) for x in tensors), *scales, length]


def fp8_reference(arguments):
    """Attention on what the codes stand for, float64."""
    *tensors, length = arguments
    query, key, value = (x.double() * over_channels(scale) for x, scale in zip(tensors[:3], tensors[3:], strict=True))
    query, key, value = (t.transpose(1, 2) for t in (query, key[:, :length], value[:, :length]))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


@pytest.mark.parametrize("length", (1, 7, S))
def test_attention_fp8(length):
    arguments = fp8_arguments(length)
    got, want = ops.attention_fp8(*arguments), fp8_reference(arguments)
    assert got.dtype == torch.bfloat16 and got.shape == want.shape
    assert error(got, want) < 8e-3  # 16-bit operands
    arguments[1][:, length:] = arguments[2][:, length:] = 99.0  # what lies after `length` is not seen
    assert torch.equal(ops.attention_fp8(*arguments), got)
    arguments[2] = with_tokens_innermost(arguments[2])
    torch.testing.assert_close(ops.attention_fp8(*arguments), got, rtol=8e-3, atol=5e-3)


@pytest.mark.parametrize("dtype", (torch.int8, torch.float8_e4m3fn))
def test_scales_of_each_sample(dtype):
    """With scales `[B, H]` a sample is stored and read as if it were alone with its `[H]`."""
    batch = per_sample(append_arguments(dtype, dtype), 9, 10)
    parts = [alone([x.clone() if isinstance(x, torch.Tensor) else x for x in batch], b) for b in range(B)]
    ops.qk_norm_rope_append(*batch)
    assert_stored(batch[6][:, 4:9], append_reference(batch)[1], batch[9])
    for sample, part in enumerate(parts):
        ops.qk_norm_rope_append(*part)
        for cache in (6, 7):
            assert torch.equal(batch[cache][sample].float(), part[cache][0].float())
    int8 = dtype == torch.int8
    batch = per_sample(attention_arguments(), 3, 4) if int8 else per_sample(fp8_arguments(), 4, 5)
    op, reference = (ops.attention_int8, attention_reference) if int8 else (ops.attention_fp8, fp8_reference)
    got = op(*batch)
    assert error(got, reference(batch)) < 8e-3
    for sample in range(B):
        torch.testing.assert_close(got[sample : sample + 1], op(*alone(batch, sample)), rtol=8e-3, atol=2e-3)
    batch[4] = batch[4][:1, :2]
    with pytest.raises(ValueError, match=r"_scale is \(1, 2\), expected \(2, 3\)"):
        op(*batch)


def test_no_gpu_wants_tokens_innermost():
    for dtype in (torch.int8, torch.float8_e4m3fn):
        assert not ops.tokens_innermost(torch.device("cpu"), 128, dtype)


def calls():
    return [
        (ops.qk_norm_rope_append, append_arguments(torch.int8, torch.bfloat16, True)),
        (ops.qk_norm_rope_append, append_arguments(torch.bfloat16, torch.bfloat16)),
        (ops.attention_int8, attention_arguments()),
    ]


def test_opcheck():
    for op, arguments in calls():
        torch.library.opcheck(op.overload, tuple(arguments))
    # The schema test compares inputs before and after, for which torch has no float8 arithmetic on the CPU.
    utilities = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.attention_fp8.overload, tuple(fp8_arguments()), test_utils=utilities)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(B, T, 71), r"shape of qkv is \(2, 5, 71\), expected \[B, T, 72\]"),
        (4, torch.zeros(T, 3), r"shape of cos is \(5, 3\), expected \(5, 4\)"),
        (9, None, "key_scale is None, expected a tensor for a torch.int8 cache"),
        (11, 8, r"start is 8, expected 0 to 7 \(5 of 12 tokens\)"),
        (7, torch.zeros(B, S, H, D, dtype=torch.int32), "dtype of the value cache is torch.int32"),
    ],
)
def test_bad_arguments_are_named(position, value, message):
    arguments = append_arguments(torch.int8, torch.bfloat16)
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        ops.qk_norm_rope_append(*arguments)
