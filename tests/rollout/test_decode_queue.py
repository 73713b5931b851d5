"""Other decoders than the VAE as it is: compiled, somebody's own, beside the denoising."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from qarvd_diffusers.rollout.decoder import CheckedDecoder
from qarvd_diffusers.rollout.reencoding import ReencodingDecoder

PROMPT = "a red circle"
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.8, 1.0, 1.2]}  # of the fixture's VAE


class TinyDecoder:
    """Four times in time, eight in space, grey of the latents' mean; counts the frames it has seen."""

    def __init__(self, **statistics):
        vars(self).update(STATISTICS | statistics)
        self.reset()

    def reset(self):
        self.frames = 0

    def decode(self, latents):
        grey = latents.mean(1, keepdim=True).tanh().repeat(1, 3, 1, 1, 1)
        pixels = grey.repeat_interleave(4, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
        first = 3 if self.frames == 0 else 0
        self.frames += latents.shape[2]
        return pixels[:, :, first:]

    def state_dict(self):
        return {"frames": torch.tensor(self.frames)}

    def load_state_dict(self, state):
        self.frames = int(state["frames"])


def stream(pipe, decoder=None, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipe.stream(PROMPT, generator=generator, output_type="pt", decoder=decoder, **{"num_chunks": 3, **kwargs})


def frames(stream):
    return torch.cat([chunk.frames for chunk in stream], dim=1)


@pytest.mark.parametrize("make", [TinyDecoder, TinyDecoder()], ids=["function", "object"])
def test_a_decoder_of_ones_own(tiny_pipeline, make):
    chunks = list(stream(tiny_pipeline, make))
    assert [chunk.frames.shape for chunk in chunks] == [(1, n, 3, 32, 48) for n in (9, 12, 12)]
    expected = TinyDecoder().decode(torch.cat([chunk.latents for chunk in chunks], dim=2))
    torch.testing.assert_close(frames(chunks), (expected.movedim(2, 1) + 1) / 2)
    tiny_pipeline.vae = None
    assert torch.equal(frames(stream(tiny_pipeline, make)), frames(chunks))


def test_its_state_is_saved_with_the_stream(tiny_pipeline, tmp_path):
    expected = frames(stream(tiny_pipeline, TinyDecoder))
    running = stream(tiny_pipeline, TinyDecoder)
    first = next(running).frames
    running.save_state(tmp_path / "s.safetensors")
    rest = tiny_pipeline.restore_stream(tmp_path / "s.safetensors", decoder=TinyDecoder)
    assert torch.equal(torch.cat([first, frames(rest)], dim=1), expected)


class Forgetful:
    """Says for what latents it is, and nothing else."""

    latents_mean, latents_std = STATISTICS["latents_mean"], STATISTICS["latents_std"]

    def decode(self, latents):
        return latents


class Stateless(Forgetful):
    def decode(self, latents):
        return TinyDecoder().decode(latents)


def test_unfit_decoders_are_refused(tiny_pipeline, tmp_path):
    for decoder, message in (
        (object(), "expected an object with decode"),
        (TinyDecoder(latents_std=None), "does not say what latents it was made for: give it latents_std"),
        (TinyDecoder(latents_mean=[0.0] * 16), "made for 16 latent channels, the model has 4"),
        (
            TinyDecoder(latents_mean=[0.1, -0.2, 0.4, 0.0]),
            r"latents of other statistics: its latents_mean is off by up to 0\.1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            stream(tiny_pipeline, decoder)
    with pytest.raises(ValueError, match=r"\(Forgetful\) gave \[1, 4, 3, 4, 6\], expected pixels \[1, 3, frames"):
        next(stream(tiny_pipeline, Forgetful()))
    running = stream(tiny_pipeline, Stateless)
    next(running)
    with pytest.raises(ValueError, match=r"a Stateless cannot be saved: it has no state_dict"):
        running.save_state(tmp_path / "s.safetensors")
    decoder = ReencodingDecoder(CheckedDecoder(Stateless()), lambda pixels: pixels, frames=1, scale=4)
    decoder.reset()
    with pytest.raises(ValueError, match=r"a Stateless cannot be saved: it has no state_dict"):
        decoder.state_dict()
    with pytest.raises(ValueError, match=r"a Stateless cannot be restored: it has no load_state_dict"):
        decoder.load_state_dict({})


def test_compiled_decoder_is_the_decoder_in_three_graphs(tiny_pipeline):
    """One each for the first, the second and all later frames of a video, without a break."""
    expected = frames(stream(tiny_pipeline))
    torch._dynamo.reset()
    counters.clear()
    tiny_pipeline.vae.decoder.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(frames(stream(tiny_pipeline)), expected, atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == 3


def test_overlap_changes_nothing_on_the_cpu(tiny_pipeline):
    assert torch.equal(frames(stream(tiny_pipeline, overlap_decoding=True)), frames(stream(tiny_pipeline)))
    running = stream(tiny_pipeline, overlap_decoding=True)
    next(running)
    with pytest.raises(ValueError, match="has computed more than it returned"):
        running.save_state("never.safetensors")


@pytest.mark.gpu
def test_overlapped_decoding_on_cuda_computes_the_same(tiny_pipeline):
    tiny_pipeline.to("cuda")
    expected = frames(stream(tiny_pipeline, num_chunks=6))
    running = stream(tiny_pipeline, num_chunks=6, overlap_decoding=True)
    chunks = list(running)
    assert [chunk.index for chunk in chunks] == list(range(6))
    torch.testing.assert_close(frames(chunks), expected, atol=1e-5, rtol=0)
