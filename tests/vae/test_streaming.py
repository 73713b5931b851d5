"""Streaming decode: pieces equal the whole, bit by bit, and streams do not meet."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_wan import make_wan22_vae

from qarvd_diffusers.vae.fused import FastResidualBlock
from qarvd_diffusers.vae.streaming import StreamingVAEDecoder, optimize_vae


@pytest.fixture
def vae(tiny_pipeline):
    return tiny_pipeline.vae


def latents(seed, frames=6):
    return torch.randn(1, 4, frames, 4, 6, generator=torch.Generator().manual_seed(seed))


def whole(vae, z):
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        return vae.decode(z * std + mean).sample


@pytest.mark.parametrize("sizes", [(3, 3), (1, 3, 2), (6,), (1, 1, 1, 1, 1, 1)])
def test_pieces_equal_the_whole(vae, sizes):
    z = latents(0)
    decoder = StreamingVAEDecoder(vae)
    pieces = [decoder.decode(piece) for piece in z.split(sizes, dim=2)]
    assert pieces[0].shape[2] == 1 + 4 * (sizes[0] - 1)
    assert torch.equal(torch.cat(pieces, dim=2), whole(vae, z))


@pytest.mark.parametrize("frames_at_once", (2, 8))
def test_frames_at_once_change_no_more_than_rounding(vae, frames_at_once):
    z = latents(0, frames=8)
    decoder = StreamingVAEDecoder(vae, frames_at_once)
    pieces = [decoder.decode(piece) for piece in z.split((3, 5), dim=2)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole(vae, z), atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames_at_once", (1, 2, None))
@pytest.mark.parametrize("sizes", [(3, 3), (1, 3, 2)])
def test_optimized_decoder_computes_the_same(vae, sizes, frames_at_once):
    fast, z = copy.deepcopy(vae), latents(0)
    expected, names = whole(vae, z), list(vae.state_dict())
    optimize_vae(fast)
    assert list(fast.state_dict()) == names
    assert type(fast.decoder.mid_block.resnets[0]) is FastResidualBlock
    decoder = StreamingVAEDecoder(fast, frames_at_once)
    pieces = [decoder.decode(piece) for piece in z.split(sizes, dim=2)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole(fast, z), expected, atol=1e-5, rtol=0)


def test_optimized_decoder_goes_on_from_a_plain_ones_memory(vae):
    fast, z = copy.deepcopy(vae), latents(0)
    optimize_vae(fast)
    decoders = StreamingVAEDecoder(vae), StreamingVAEDecoder(fast)
    for decoder in decoders:
        decoder.decode(z[:, :, :1])
    for given, taking in (decoders, decoders[::-1]):
        taking.load_state_dict(given.state_dict())
        other = StreamingVAEDecoder(taking._vae)
        other.load_state_dict(given.state_dict())
        torch.testing.assert_close(other.decode(z[:, :, 1:]), whole(vae, z)[:, :, 1:], atol=1e-5, rtol=0)


def test_streams_on_one_vae_are_independent(vae):
    streams = [StreamingVAEDecoder(vae) for _ in range(2)]
    inputs = [latents(seed) for seed in (1, 2)]
    pieces = [[], []]
    for start in (0, 3):
        for stream, z, out in zip(streams, inputs, pieces, strict=True):
            out.append(stream.decode(z[:, :, start : start + 3]))
        whole(vae, latents(3))  # a plain decode in between changes nothing either
    for z, out in zip(inputs, pieces, strict=True):
        assert torch.equal(torch.cat(out, dim=2), whole(vae, z))


def test_patched_vae_of_wan22():
    torch.manual_seed(0)
    vae = make_wan22_vae()
    z = latents(0)
    decoder = StreamingVAEDecoder(vae)
    pieces = [decoder.decode(piece) for piece in z.split(3, dim=2)]
    expected = whole(vae, z)
    assert torch.equal(torch.cat(pieces, dim=2), expected)
    optimize_vae(vae)
    torch.testing.assert_close(StreamingVAEDecoder(vae).decode(z), expected, atol=1e-5, rtol=0)


def test_unsupported_vaes_are_refused(vae):
    vae.enable_tiling()
    with pytest.raises(ValueError, match="disable_tiling"):
        StreamingVAEDecoder(vae)
    with pytest.raises(ValueError, match="needs an AutoencoderKLWan, got Linear"):
        StreamingVAEDecoder(torch.nn.Linear(1, 1))
