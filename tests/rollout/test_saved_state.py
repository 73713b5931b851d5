"""States of streams in memory: restoring is exact, can be repeated, and can make the video longer."""

from __future__ import annotations

import pytest
import torch

PROMPT, OTHER = "a red circle moves left", "a blue square"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=[-1, 9], ids=["all frames", "window"])
def pipe(tiny_pipeline, request):
    tiny_pipeline.register_to_config(local_attention_frames=request.param, sink_frames=3)
    return tiny_pipeline


def frames(stream):
    return torch.cat([chunk.frames for chunk in stream], dim=1)


@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
def test_a_state_in_memory_is_continued_exactly_and_again(pipe, kv_cache):
    """The stream that was saved, two restored ones and one of full length make the same frames; a state stays as it
    is.
    """
    options = {"output_type": "pt", "kv_cache": kv_cache}
    expected = frames(pipe.stream(PROMPT, num_chunks=5, generator=seeded(), **options))
    stream = pipe.stream(PROMPT, num_chunks=3, generator=seeded(), **options)
    begun = torch.cat([next(stream).frames for _ in range(2)], dim=1)
    state = stream.state()
    rest = frames(stream)
    assert torch.equal(torch.cat([begun, rest], dim=1), expected[:, : begun.shape[1] + rest.shape[1]])
    for _ in range(2):
        steps, generator = [], seeded(9)
        restored = pipe.restore_stream(
            state,
            num_chunks=5,
            generator=generator,
            callback_on_step_end=lambda _, step, time, tensors: steps.append((step, *tensors)),  # noqa: B023
        )
        assert torch.equal(torch.cat([begun, frames(restored)], dim=1), expected)
        assert steps == [(step, "latents") for step in range(2 * 4, 5 * 4)]
    whole = seeded()
    list(pipe.stream(PROMPT, num_chunks=5, generator=whole, **options))
    assert torch.equal(generator.get_state(), whole.get_state())


def test_a_state_in_memory_is_that_of_a_file(pipe, tmp_path):
    stream = pipe.stream(PROMPT, num_chunks=2, generator=seeded(), output_type="latent")
    next(stream)
    stream.set_prompt(OTHER)
    state = stream.state()
    state.save(tmp_path / "saved.safetensors")
    stream.save_state(tmp_path / "again.safetensors")
    assert (tmp_path / "saved.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    in_memory, on_disk = (pipe.restore_stream(which) for which in (state, tmp_path / "saved.safetensors"))
    assert torch.equal(frames(in_memory), frames(on_disk))


def test_arguments_that_a_saved_stream_cannot_take(pipe):
    stream = pipe.stream(PROMPT, num_chunks=2, generator=[seeded()], output_type="latent")
    next(stream)
    next(stream)
    with pytest.raises(ValueError, match="num_chunks is 1, expected at least the 2 chunks that the state has made"):
        pipe.restore_stream(stream.state(), num_chunks=1)
    with pytest.raises(ValueError, match="the noise of the state was drawn by one generator per sample"):
        pipe.restore_stream(stream.state(), generator=seeded())
    noise = torch.randn(1, 4, 6, 4, 6, generator=seeded())
    stream = pipe.stream(PROMPT, latents=noise, generator=seeded(), output_type="latent")
    next(stream)
    with pytest.raises(ValueError, match=r"num_chunks is 3, .* and at most the 2 that it has noise for"):
        pipe.restore_stream(stream.state(), num_chunks=3)
