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
    with pytest.raises(ValueError, match="do not fit into local_attention_frames = 4"):
        write(cache, 0, 3)
    cache = KVCache(1)
    write(cache, 0, 3)
    with pytest.raises(ValueError, match="neither follows nor repeats"):
        write(cache, 4, 3)
    with pytest.raises(ValueError, match="another layout"):
        cache.begin_pass(3, 3, TOKENS + 1, HEADS, torch.zeros(1, 1))
    cache.clear()
    write(cache, 7, 1)
    assert cache.frames == [7]
