"""The scene grammar, and the judge against rendered truth."""

import numpy as np
import pytest

from qarvd_diffusers.evaluation import moving_shapes as ms


def render(scene: ms.Scene, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [F, 64, 64, 3]: the scene from a random start, drawn independently of the training renderer."""
    rows, columns = np.mgrid[:64, :64] + 0.5
    video = np.empty((num_frames, 64, 64, 3))
    video[:] = ms.BACKGROUNDS[scene.background]
    for slot, sprite in enumerate(scene.sprites):
        phase, (jitter_x, jitter_y) = rng.uniform(0, 2 * np.pi), rng.uniform(-1, 1, 2)
        pair, orbits = len(scene.sprites) == 2, "clockwise" in sprite.motion
        middle = complex(32, 16 + 32 * slot) if pair else 32 + 32j
        reach = (16, 2) if pair else (3, 3) if orbits else (12, 12)
        rest = middle + complex(reach[0] * jitter_x, reach[1] * jitter_y)
        for frame in range(num_frames):
            turn = 2 * np.pi * frame / ms.TRAVEL_PERIOD
            swell = np.sin(phase + 2 * np.pi * frame / ms.PULSE_PERIOD) if sprite.motion == "pulse" else 0.0
            travel = 64 * (phase + turn) / (2 * np.pi)
            back = 64 * (phase - turn) / (2 * np.pi)
            position = {
                "left": complex(back, rest.imag),
                "right": complex(travel, rest.imag),
                "up": complex(rest.real, back),
                "down": complex(rest.real, travel),
                "clockwise": rest + ms.ORBIT_RADIUS * np.exp(1j * (phase + turn)),
                "counterclockwise": rest + ms.ORBIT_RADIUS * np.exp(1j * (phase - turn)),
            }.get(sprite.motion, rest)
            x = (columns - position.real + 32) % 64 - 32
            y = (rows - position.imag + 32) % 64 - 32
            radius = ms.SIZES[sprite.size] * (1 + ms.PULSE_DEPTH * swell)
            coverage = np.clip(0.5 - ms.shape_distance(sprite.shape, x, y, radius), 0, 1)[..., None]
            video[frame] += coverage * (np.array(ms.COLORS[sprite.color]) - video[frame])
    return video.round().astype(np.uint8)


@pytest.fixture(scope="module")
def truth() -> list[tuple[np.ndarray, str]]:
    rng = np.random.default_rng(0)
    scenes = [ms.sample_scene(rng, held_out=bool(i % 2)) for i in range(100)]
    return [(render(scene, 45, rng), scene.prompt) for scene in scenes]


@pytest.mark.parametrize("frame_range", [None, (33, 45)], ids=["clip", "one chunk"])
def test_rendered_truth_is_judged_right(truth, frame_range):
    found = [ms.adherence(video, prompt, frame_range) for video, prompt in truth]
    assert np.mean([f.correct and f.size and f.background for f in found]) >= 0.98


@pytest.mark.parametrize(
    ("attribute", "other"),
    [
        ("color", "a small green circle moving left on a black background"),
        ("shape", "a small red ring moving left on a black background"),
        ("motion", "a small red circle moving right on a black background"),
        ("size", "a large red circle moving left on a black background"),
        ("background", "a small red circle moving left on a gray background"),
    ],
)
def test_each_attribute_is_judged_alone(attribute, other):
    prompt = "a small red circle moving left on a black background"
    video = render(ms.Scene.from_prompt(prompt), 33, np.random.default_rng(1))
    found = ms.adherence(video, other)
    names = ("color", "shape", "motion", "size", "background")
    assert {name: getattr(found, name) for name in names} == {name: name != attribute for name in names}


def test_noise_and_empty_pictures_are_wrong():
    prompt = "a small red circle moving left on a black background"
    noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    assert not ms.adherence(noise, prompt).correct
    assert not ms.adherence(np.zeros_like(noise), prompt).correct


def test_prompts_parse_back():
    rng = np.random.default_rng(2)
    for held_out in (False, True):
        for _ in range(200):
            scene = ms.sample_scene(rng, held_out)
            assert ms.Scene.from_prompt(scene.prompt) == scene
            assert scene.held_out is held_out


def test_held_out_triples_leave_every_pair_in_training():
    sprites = [ms.Sprite(c, s, m, "small") for c in ms.COLORS for s in ms.SHAPES for m in ms.MOTIONS]
    shown = [sprite for sprite in sprites if not sprite.held_out]
    assert len(sprites) - len(shown) == len(sprites) // 7
    for first, second in (("color", "shape"), ("color", "motion"), ("shape", "motion")):
        pairs = {(getattr(sprite, first), getattr(sprite, second)) for sprite in sprites}
        assert {(getattr(sprite, first), getattr(sprite, second)) for sprite in shown} == pairs


def test_bad_input_is_named():
    prompt = "a small red circle moving left on a black background"
    with pytest.raises(ValueError, match="not a sentence"):
        ms.Scene.from_prompt("a cat in the rain")
    with pytest.raises(ValueError, match="expected uint8"):
        ms.adherence(np.zeros((16, 32, 32, 3), np.uint8), prompt)
    with pytest.raises(ValueError, match="at least 8"):
        ms.adherence(np.zeros((4, 64, 64, 3), np.uint8), prompt)
