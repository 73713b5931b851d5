"""The chunk loop apart from its pipeline: branches, and noise drawn ahead."""

from __future__ import annotations

import pytest
import torch

SHAPE = {"height": None, "width": None, "output_type": "latent", "num_frames": None, "latents": None}


def make_loop(pipe, initial=None, drawn=True, num_chunks=3):
    inputs = pipe.check_stream_inputs(
        prompt="a red circle",
        prompt_embeds=None,
        num_chunks=num_chunks,
        renoise_latents=None,
        initial_latents=initial,
        generator=torch.Generator().manual_seed(4),
        **SHAPE,
    )
    if drawn:
        inputs = inputs.with_drawn_noise(torch.device("cpu"), torch.float32)
    return pipe.make_loop(inputs, prompt="a red circle")


def test_drawn_noise_is_what_the_stream_draws(tiny_pipeline):
    ahead, on_the_way = make_loop(tiny_pipeline), make_loop(tiny_pipeline, drawn=False)
    for (chunk, a), (other, b) in zip(ahead.run(), on_the_way.run(), strict=True):
        assert chunk == other and torch.equal(a, b)


@pytest.mark.parametrize("start", (False, True))
def test_a_branch_goes_on_alone(tiny_pipeline, start):
    """Taken between any two chunks it ends as the loop itself does, and disturbs nothing."""
    initial = torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(1)) if start else None
    expected = list(make_loop(tiny_pipeline, initial).run())
    assert [chunk for chunk, _ in expected] == ([-1] if start else []) + [0, 1, 2]
    loop = make_loop(tiny_pipeline, initial)
    rollout = loop.run()
    for done in range(len(expected) + 1):
        rest = list(loop.branch().run())
        assert [chunk for chunk, _ in rest] == [chunk for chunk, _ in expected[done:]]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(rest, expected[done:], strict=True))
        if done < len(expected):
            chunk, latents = next(rollout)
            assert chunk == expected[done][0] and torch.equal(latents, expected[done][1])


def test_noise_that_is_still_to_be_drawn_cannot_be_shared(tiny_pipeline):
    with pytest.raises(ValueError, match=r"cannot branch: build it from StreamInputs.with_drawn_noise"):
        make_loop(tiny_pipeline, drawn=False).branch()
    with pytest.raises(ValueError, match="give num_chunks"):
        make_loop(tiny_pipeline, num_chunks=None)
