"""Bookkeeping of the K/V cache: which frames stay, where they lie, and what a wrong pass is told."""

from __future__ import annotations

import pytest
import torch

from qarvd_diffusers.models import KVCache

TOKENS, HEADS = 2, (1, 1)


def write(cache, offset, frames, value=None):
    """Write K = V = `value` (or the absolute frame index) for `frames` frames."""
    like = torch.zeros(1, 1)
    start = cache.begin_pass(offset, frames, TOKENS, HEADS, like)
    index = torch.arange(offset, offset + frames).repeat_interleave(TOKENS).float() if value is None else None
    key = torch.full((1, frames * TOKENS, 1, 1), float(value)) if index is None else index.view(1, -1, 1, 1)
    with torch.no_grad():
        return [layer.update(key, key, start) for layer in cache.layers]


def frames_in(cache):
    return cache.visible(0)[0].flatten()[::TOKENS].int().tolist()


@pytest.mark.parametrize(
    ("window", "sink", "kept"),
    [
        (-1, 0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        (6, 0, [6, 7, 8, 9, 10, 11]),
        (9, 3, [0, 1, 2, 6, 7, 8, 9, 10, 11]),
        (6, 3, [0, 1, 2, 9, 10, 11]),
        (8, 1, [0, 5, 6, 7, 8, 9, 10, 11]),
    ],
)
def test_window_keeps_sink_and_latest_frames(window, sink, kept):
    cache = KVCache(2, window, sink)
    for offset in range(0, 12, 3):
        write(cache, offset, 3, value=-1)
        write(cache, offset, 3)
    assert cache.frames == kept
    assert frames_in(cache) == kept


def test_full_cache_is_allocated_once_when_the_length_is_known():
    cache = KVCache(1, num_frames=9)
    write(cache, 0, 3)
    buffer = cache.layers[0].key
    write(cache, 3, 3)
    write(cache, 6, 3)
    assert cache.layers[0].key is buffer and buffer.shape[1] == 9 * TOKENS
    write(cache, 9, 3)  # one chunk more than announced still works
    assert frames_in(cache) == list(range(12))


def test_clone_is_independent():
    cache = KVCache(1)
    write(cache, 0, 3)
    branch = cache.clone()
    write(branch, 3, 3)
    write(branch, 3, 3, value=-1)
    assert frames_in(cache) == [0, 1, 2]
    assert len(branch.frames) == 6


def test_text_is_kept_until_reset():
    cache = KVCache(1)
    assert cache.layers[0].get_text() is None
    cache.layers[0].store_text(torch.ones(1), torch.zeros(1))
    assert cache.layers[0].get_text() is not None and cache.nbytes == 8
    cache.reset_text()
    assert cache.layers[0].get_text() is None


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="local_attention_frames is 3"):
        KVCache(1, 3, 3)
    cache = KVCache(1, 4, 2)
    write(cache, 0, 2)
    with pytest.raises(ValueError, match="do not fit into local_attention_frames = 4"):
        write(cache, 2, 3)
    cache = KVCache(1)
    write(cache, 0, 3)
    with pytest.raises(ValueError, match="neither follows nor repeats"):
        write(cache, 4, 3)
    with pytest.raises(ValueError, match="another layout"):
        cache.begin_pass(3, 3, TOKENS + 1, HEADS, torch.zeros(1, 1))
    cache.clear()
    write(cache, 7, 1)
    assert cache.frames == [7]


# 8-bit storage


def random_kv(tokens, seed=0, scale=(1.0, 30.0)):
    """K and V `[2, tokens, 2, 8]` whose heads differ in size."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.tensor(scale)[:, None]
    return [torch.randn(2, tokens, 2, 8, generator=generator) * heads for _ in range(2)]


def append(cache, offset, key, value, tokens_per_frame=2):
    frames = key.shape[1] // tokens_per_frame
    start = cache.begin_pass(offset, frames, tokens_per_frame, key.shape[2:], key)
    with torch.no_grad():
        return [layer.update(key, value, start) for layer in cache.layers]


@pytest.mark.parametrize(("storage", "dtype"), [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
def test_eight_bits_hold_the_past_and_leave_the_current_chunk_alone(storage, dtype):
    cache = KVCache(1, storage=storage, num_frames=6)
    first, second = random_kv(6, 0), random_kv(6, 1)
    key, value = append(cache, 0, *first)[0]
    assert torch.equal(key, first[0]) and torch.equal(value, first[1])
    layer = cache.layers[0]
    assert layer.key.dtype == layer.value.dtype == dtype and layer.key.is_contiguous()
    assert layer.key.shape == (2, 12, 2, 8) and layer.key_scale.shape == layer.value_scale.shape == (2, 2)
    scales = layer.key_scale.clone(), layer.value_scale.clone()
    limit, margin = (127, 1.25) if storage == "int8" else (448, 4)
    for scale, tensor in zip(scales, first, strict=True):
        torch.testing.assert_close(scale * limit, margin * tensor.abs().amax((1, 3)))
    key, value = append(cache, 3, *second)[0]
    for got, past, current, scale in zip((key, value), first, second, scales, strict=True):
        assert torch.equal(got[:, 6:], current)
        scale = scale[:, None, :, None]
        codes = past / scale
        codes = codes.round() if storage == "int8" else codes.to(dtype).float()
        torch.testing.assert_close(got[:, :6], codes * scale, rtol=1e-6, atol=0)
        error = (got[:, :6] - past).abs()
        assert (error <= (0.5 if storage == "int8" else 16) * scale * 1.001).all()
    append(cache, 3, 9 * second[0], 9 * second[1])  # later chunks saturate: the scales stand
    assert torch.equal(layer.key_scale, scales[0]) and torch.equal(layer.value_scale, scales[1])
    assert layer.read(6, 12, torch.float32)[0].isfinite().all()
    assert int(layer.key[:, 6:].float().abs().max()) == limit


def test_passes_of_the_first_chunk_widen_the_scales():
    cache = KVCache(1, storage="int8")
    noisy, clean = random_kv(6, 0), random_kv(6, 1)
    append(cache, 0, *clean)
    small = cache.layers[0].key_scale
    append(cache, 0, 2 * noisy[0], 2 * noisy[1])
    append(cache, 0, *clean)
    assert (cache.layers[0].key_scale > small).all()
    read = cache.layers[0].read(0, 6, torch.float32)[0]
    assert ((read - clean[0]).abs() <= 0.501 * cache.layers[0].key_scale[:, None, :, None]).all()


def test_given_scales_stand():
    cache = KVCache(2, storage="int8")
    key, value = torch.full((2, 2), 0.5), torch.ones(2, 2)
    cache.set_scales(key, value)
    append(cache, 0, *random_kv(6))
    assert torch.equal(cache.layers[1].key_scale, key[1]) and torch.equal(cache.layers[1].value_scale, value[1])
    with pytest.raises(ValueError, match="empty KVCache with storage"):
        cache.set_scales(key, value)
    with pytest.raises(ValueError, match="scales of 2 and 2 layers, expected 3"):
        KVCache(3, storage="fp8").set_scales(key, value)


@pytest.mark.parametrize("storage", ("int8", "fp8"))
def test_scales_saved_per_head_go_on(storage):
    """Caches saved before scales were kept per sample have `[heads]`, with which they go on."""
    cache = KVCache(1, storage=storage, num_frames=6)
    append(cache, 0, *random_kv(6, 0))
    tensors, facts = cache.state()
    shared = {name: t.amax(0) if name.endswith("scale") else t for name, t in tensors.items()}
    again = KVCache(1, storage=storage, num_frames=6)
    again.load_state(shared, facts, torch.device("cpu"))
    key = append(again, 3, *random_kv(6, 1))[0][0]
    want = shared["0.key"].float() * shared["0.key_scale"][:, None]
    assert torch.equal(key[:, :6], want) and again.layers[0].key_scale.shape == (2,)


def test_bytes_of_a_storage_and_windows_in_eight_bits():
    sizes = {}
    for storage in ("auto", "bf16", "int8", "fp8"):
        cache = KVCache(1, 9, 3, storage=storage)
        for offset in range(0, 15, 3):
            key = append(cache, offset, *random_kv(6, offset))[0][0]
        assert cache.frames == [0, 1, 2, 9, 10, 11, 12, 13, 14] and key.shape[1] == 18
        torch.testing.assert_close(key[:, :6], random_kv(6, 0)[0], atol=8, rtol=0.07)  # the sink, still itself
        sizes[storage] = cache.layers[0].key.nbytes
        branch = cache.clone()
        append(branch, 15, *random_kv(6, 7))
        assert cache.frames[-1] == 14
    assert sizes["auto"] == 2 * sizes["bf16"] == 4 * sizes["int8"] == 4 * sizes["fp8"]
    with pytest.raises(ValueError, match="kv_cache is 'int4', expected one of auto, bf16, int8, fp8"):
        KVCache(1, storage="int4")


def test_values_with_tokens_innermost_are_the_same_cache(monkeypatch):
    """Strides are all that differs: windows, the moving-average sink, growth, copies and saved states."""
    states = []
    for innermost in (False, True):
        monkeypatch.setattr("qarvd_kernels.tokens_innermost", lambda *_, chosen=innermost: chosen)
        cache = KVCache(1, 9, 3, storage="fp8", sink_ema=0.9)
        for offset in range(0, 15, 3):
            append(cache, offset, *random_kv(6, offset))
        value = cache.layers[0].value
        assert (value.stride(1) == 1) == innermost and value.shape[1] == (32 if innermost else 18)
        branch = cache.clone()
        assert branch.layers[0].value.stride() == value.stride()
        append(branch, 15, *random_kv(6, 15))
        tensors, facts = cache.state()
        again = KVCache(1, 9, 3, storage="fp8", sink_ema=0.9)
        again.load_state({name: tensor.contiguous() for name, tensor in tensors.items()}, facts, value.device)
        append(again, 15, *random_kv(6, 15))
        assert again.layers[0].value.stride() == value.stride()
        grown = KVCache(1, storage="fp8")
        for offset in range(0, 18, 3):
            append(grown, offset, *random_kv(6, offset))
        states.append([part for c in (cache, branch, again, grown) for part in c.visible(0)])
        assert torch.equal(states[-1][2], states[-1][4]) and torch.equal(states[-1][3], states[-1][5])
    for plain, other in zip(*states, strict=True):
        assert torch.equal(plain, other)
