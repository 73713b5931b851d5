"""Controls of a stream: who gets them, when a change takes effect, and what is refused before work."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_pipeline import build_pipeline, build_world

from qarvd_diffusers import ARVDPipeline, QARVDConfig
from qarvd_diffusers.controls.control import Control
from qarvd_diffusers.rollout.steerable import SteerableMixin
from qarvd_diffusers.rollout.steering import control_source

PROMPT = "a red circle"


class ToyWorld(ARVDPipeline):
    """A third party's world: an action per chunk is added to what the model says."""

    def run_pass(self, *args, controls=None, **kwargs):
        self.seen.append((kwargs["frame_offset"] // 3, controls))
        flow = super().run_pass(*args, **kwargs)
        return flow if controls is None else flow + 0.1 * controls

    # As a pipeline has them that is no `ARVDPipeline`.
    held, steered_by, prepare_controls = (
        SteerableMixin.held,
        SteerableMixin.steered_by,
        SteerableMixin.prepare_controls,
    )


@pytest.fixture
def toy():
    pipe = ToyWorld(**{**build_pipeline().components, "scheduler": None}, height=32, width=48)
    pipe.set_progress_bar_config(disable=True)
    pipe.seen = []
    return pipe


@pytest.fixture(scope="module")
def world():
    return build_world()


def stream(pipe, **options):
    generator = torch.Generator().manual_seed(1)
    return pipe.stream(PROMPT, **{"num_chunks": 3, "output_type": "latent", "generator": generator, **options})


def picture(batch=1):
    return torch.rand(batch, 3, 32, 48, generator=torch.Generator().manual_seed(7))


def latents(chunks):
    return [chunk.latents for chunk in chunks]


@pytest.mark.parametrize(
    "controls",
    [
        [1, 2, 3],
        torch.tensor([1, 2, 3]),
        {0: 1, 1: 2, 2: 3},
        lambda chunk: chunk + 1,
        iter([1, 2, 3]),
    ],
)
def test_every_pass_of_a_chunk_gets_its_entry(toy, controls):
    list(stream(toy, controls=controls))
    assert [(chunk, int(value)) for chunk, value in toy.seen] == [(c, c + 1) for c in range(3) for _ in range(5)]


def test_a_change_takes_effect_at_the_next_chunk(toy):
    plain = latents(stream(toy, controls=[1, 1, 1]))
    toy.seen.clear()
    running = stream(toy, controls=[1, 1, 1])
    first = next(running).latents
    running.set_controls(5)
    rest = latents(running)
    assert [value for _, value in toy.seen] == [1] * 5 + [5] * 10  # the refresh of chunk 0 sees what chunk 0 saw
    assert torch.equal(first, plain[0]) and not torch.equal(rest[0], plain[1])
    with pytest.raises(ValueError, match="the stream has ended: other controls would have no effect"):
        running.set_controls(1)


@pytest.mark.parametrize(
    ("controls", "options", "message"),
    [
        ([1, 2], {}, "controls has 2 entries, the stream has 3 chunks"),
        ([1, 2, 3], {"num_chunks": None}, "has 3 entries, the stream has no end: pass num_chunks, or a function"),
        ({3: 1}, {}, "controls has the key 3, expected chunks from 0 to 2"),
        ({"up": 1}, {}, "controls has the key 'up'"),
        ("www", {}, "controls is a str, expected one entry per chunk"),
        (4, {}, "controls is a int, expected one entry per chunk"),
    ],
)
def test_controls_that_do_not_fit(toy, controls, options, message):
    with pytest.raises(ValueError, match=message):
        stream(toy, controls=controls, **options)
    assert not toy.seen


def test_an_iterator_that_ends_early():
    source = control_source(iter([1]), 3)
    assert source(0) == source(0) == 1
    with pytest.raises(ValueError, match="controls ended before chunk 1"):
        source(1)


def test_a_model_that_takes_none(tiny_pipeline):
    with pytest.raises(ValueError, match="this model takes none: leave them out"):
        stream(tiny_pipeline, controls=["w"] * 3)
    running = stream(tiny_pipeline)
    with pytest.raises(ValueError, match="this model takes none"):
        running.set_controls("w")


def test_a_world_by_keys(world):
    """Keys, mappings and tensors say the same; standing still is the default."""
    start = {"image": picture()}
    steered = latents(stream(world, controls=["w", "w arrowleft", ""], **start))
    same = stream(world, controls=[Control("w"), {"keys": "w", "mouse": (-15, 0)}, None], **start)
    tensors = stream(world, controls=["w", "w arrowleft", ""], **start)._session.request.inputs.controls
    third = stream(world, controls=[tensors(chunk) for chunk in range(3)], **start)
    for one, two, three in zip(steered, latents(same), latents(third), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    still = latents(stream(world, **start))
    assert torch.equal(still[2], latents(stream(world, controls=lambda chunk: "", **start))[2])
    assert (still[0] - steered[0]).abs().max() > 1e-4


def test_a_key_pressed_while_it_runs(world):
    start = {"image": picture()}
    still = latents(stream(world, **start))
    running = stream(world, **start)
    first = next(running).latents
    with pytest.raises(ValueError, match="keys are 'x'"):
        running.set_controls("x")
    running.set_controls("d")
    second = next(running).latents
    assert torch.equal(first, still[0]) and not torch.equal(second, still[1])
    assert torch.equal(second, latents(stream(world, controls=["", "d", "d"], **start))[1])


def test_an_event_is_a_prompt_from_its_chunk_on(world):
    start = {"image": picture()}
    by_hand = stream(world, **start)
    expected = [next(by_hand).latents]
    by_hand.set_prompt("a blue square moves left")
    expected += latents(by_hand)
    got = latents(stream(world, controls={1: Control(event="a blue square moves left"), 2: ""}, **start))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_batches(world):
    together = latents(
        world.stream(
            [PROMPT, "a blue square"], image=picture(2), num_chunks=2, output_type="latent", controls=["w", "a"],
            generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        )
    )  # fmt: skip
    one = latents(stream(world, image=picture(2)[:1], num_chunks=2, controls=["w", "a"]))
    torch.testing.assert_close(together[1][:1], one[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"goes on from a picture: pass image= \(or image_latents=\), got none"),
        ({"image": 0, "image_latents": torch.zeros(1, 4, 9, 4, 6)}, "got image and image_latents"),
        ({"image": 0, "initial_latents": torch.zeros(1, 4, 3, 4, 6)}, "takes no initial_latents"),
        ({"image_latents": torch.zeros(1, 4, 3, 4, 6)}, r"\[1, 4, F, h, w\] with at least 9 latent frames"),
        ({"image": 0, "controls": ["w"] * 2}, "controls has 2 entries, the stream has 3 chunks"),
        ({"image": 0, "controls": ["w", "x", "w"]}, r"keys are 'x': \['x'\] do nothing"),
        ({"image": 0, "controls": [Control(["w"] * 2)] * 3}, "controls of chunk 0: keys are for 2 latent frames"),
        ({"image": 0, "controls": [torch.zeros(1, 448, 3, 4, 6)] * 3}, r"expected \[1 or 1, 384, 3, 4, 6\]"),
        ({"image": 0, "controls": [{"poses": 1}] * 3}, r"controls of chunk 0 has \['poses'\], expected a Control"),
    ],
)
def test_bad_starts_and_controls(world, options, message):
    options = {name: picture() if isinstance(value, int) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        stream(world, **options)


def test_a_model_without_channels_for_a_picture(tiny_pipeline):
    with pytest.raises(ValueError, match="no input channels for a picture: pass image= or initial_latents="):
        stream(tiny_pipeline, image_latents=torch.zeros(1, 4, 9, 4, 6))


def test_the_picture_in_an_endless_stream(world):
    """What is encoded once and then repeated is what encoding the whole video would give."""
    long = stream(world, image=picture(), num_chunks=14)._session.request.inputs.condition
    endless = stream(world, image=picture(), num_chunks=None)._session.request.inputs
    assert endless.condition.shape[2] < 42 == 3 * 14
    whole = world.encode_frames(torch.nn.functional.pad(2 * picture()[:, :, None] - 1, (0, 0, 0, 0, 0, 4 * 41)))
    for offset in range(0, 42, 3):
        got = endless.conditioned(torch.zeros(1, 4, 3, 4, 6), offset)
        torch.testing.assert_close(got[:, 8:], whole[:, :, offset : offset + 3], atol=2e-3, rtol=0)
        assert torch.equal(
            got[:, 4:8], torch.tensor([float(offset == 0), 0, 0]).view(1, 1, 3, 1, 1).expand(1, 4, 3, 4, 6)
        )
    assert long.shape == endless.condition.shape


def test_saved_in_the_middle(world, tmp_path):
    """Goes on bit by bit with the same controls, and says so if they are missing."""
    controls, start = ["w", "d arrowup", "s"], {"image": picture()}
    expected = latents(stream(world, controls=controls, **start))
    running = stream(world, controls=controls, **start)
    next(running)
    running.save_state(tmp_path / "state")
    again = world.restore_stream(tmp_path / "state", controls=controls)
    assert all(torch.equal(a, b) for a, b in zip(latents(again), expected[1:], strict=True))
    with pytest.raises(ValueError, match="state was steered by controls, which are not saved: pass controls= again"):
        world.restore_stream(tmp_path / "state")
    still = latents(stream(world, **start))
    running = stream(world, **start)
    next(running)
    running.save_state(tmp_path / "still")
    assert torch.equal(latents(world.restore_stream(tmp_path / "still"))[0], still[1])


@pytest.mark.parametrize("how", ["keep", "recache", "new_text_only"])
def test_prompt_switches(world, how):
    running = stream(world, image=picture(), controls=["w", "a", "d"])
    next(running)
    running.set_prompt("a blue square", on_prompt_switch=how)
    assert all(torch.isfinite(one).all() for one in latents(running))


def test_re_caching_sees_the_controls_of_its_frames(toy):
    def chunkwise(value):
        return torch.full((1, 1, 3, 1, 1), float(value))

    running = stream(toy, controls=[chunkwise(1), chunkwise(2), chunkwise(3)])
    next(running), next(running)
    running.set_prompt("a blue square", on_prompt_switch="recache")
    toy.seen.clear()
    next(running)
    assert toy.seen[1][1].flatten().tolist() == [1, 1, 1, 2, 2, 2]  # after the refresh of chunk 1


def test_calibration_sensitivity_and_evaluation_are_steered(world):
    """By `stream_defaults`; and the injectors stay float."""
    from qarvd_diffusers import evaluate

    pipe = build_world()
    pipe.set_progress_bar_config(disable=True)
    pipe.stream_defaults = {"image": picture(), "controls": lambda chunk: "w arrowright"}
    prompts = (PROMPT, "a blue square")
    config = QARVDConfig("w8a8", calibration_prompts=prompts, calibration_chunks=2, rounding="nearest")
    seen = []
    run_pass = pipe.run_pass
    pipe.run_pass = lambda *args, **kwargs: seen.append(kwargs.get("controls")) or run_pass(*args, **kwargs)
    assert pipe.measure_sensitivity(config, prompts, num_chunks=2).complete
    float_pipe = build_world()
    float_pipe.set_progress_bar_config(disable=True)
    float_pipe.stream_defaults = pipe.stream_defaults
    pipe.quantize(config)
    report = evaluate(float_pipe, pipe, prompts, num_chunks=2)
    assert min(report["psnr_db"]) > 25
    expected = stream(world, image=picture(), controls=lambda chunk: "w arrowright")._session.request.inputs.controls
    assert seen and all(torch.equal(one, expected(0)) or torch.equal(one, expected(1)) for one in seen)
    assert dataclasses.is_dataclass(expected)
