"""Define the scene grammar of the bundled model, and judge analytically how well a video follows its prompt.

A scene is one or two colored shapes that move over a flat background. A `Scene` and an English sentence describe each
other. Every motion is periodic, so a stream of any length stays inside the training distribution. The judge uses no
network: color distance separates object and background, the shape is the template of largest intersection over union,
and the motion is the best fit of the centroid path and the apparent radius among the motions of the grammar.

Videos are uint8 arrays `[frames, 64, 64, 3]`; lengths are in pixels, times in frames. Only numpy is needed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

FRAME_SIZE = 64
TRAVEL_PERIOD = 36  # frames to cross the picture once, or to circle once
PULSE_PERIOD = 18  # frames
PULSE_DEPTH = 0.25  # relative change of the radius
ORBIT_RADIUS = 13.0  # pixels

COLORS = {
    "red": (225, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 90, 245),
    "yellow": (250, 225, 40),
    "magenta": (230, 60, 220),
    "cyan": (50, 215, 225),
    "orange": (250, 135, 20),
}
BACKGROUNDS = {"black": (12, 12, 16), "white": (242, 242, 242), "gray": (118, 118, 118), "navy": (16, 26, 84)}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": 9.0, "large": 13.0}
MOTIONS = {
    "left": "moving left",
    "right": "moving right",
    "up": "moving up",
    "down": "moving down",
    "clockwise": "circling clockwise",
    "counterclockwise": "circling counterclockwise",
    "pulse": "pulsing",
    "still": "staying still",
}
PAIR_MOTIONS = ("left", "right", "pulse", "still")  # these stay inside the upper or the lower half

_VELOCITY = {"left": -1.0, "right": 1.0, "up": -1.0j, "down": 1.0j}
_TURN = {"clockwise": 1.0, "counterclockwise": -1.0}  # the y axis points down


@dataclass(frozen=True)
class Sprite:
    """Describe one moving object by keys of `COLORS`, `SHAPES`, `MOTIONS` and `SIZES`."""

    color: str
    shape: str
    motion: str
    size: str

    @property
    def phrase(self) -> str:
        """The part of the prompt that describes the object."""
        return f"a {self.size} {self.color} {self.shape} {MOTIONS[self.motion]}"

    @property
    def held_out(self) -> bool:
        """Whether training never shows this (color, shape, motion) triple: one in seven is held out."""
        color, shape, motion = (
            list(COLORS).index(self.color),
            SHAPES.index(self.shape),
            list(MOTIONS).index(self.motion),
        )
        return (color + 3 * shape + 5 * motion) % 7 == 0


@dataclass(frozen=True)
class Scene:
    """Describe one sprite, or two (the first in the upper half, the second in the lower), over a background."""

    sprites: tuple[Sprite, ...]
    background: str

    @property
    def prompt(self) -> str:
        """The sentence that describes the scene."""
        return " above ".join(sprite.phrase for sprite in self.sprites) + f" on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether a sprite is held out."""
        return any(sprite.held_out for sprite in self.sprites)

    @classmethod
    def from_prompt(cls, prompt: str) -> Scene:
        """Parse a sentence of the grammar. Raises ValueError for any other sentence."""
        words = prompt.lower().strip().rstrip(".")
        body, separator, tail = words.rpartition(" on a ")
        background = tail.removesuffix(" background")
        try:
            if not separator or background not in BACKGROUNDS:
                raise KeyError(tail)
            return cls(tuple(_parse_phrase(phrase) for phrase in body.split(" above ")), background)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"not a sentence of the moving-shapes grammar: {prompt!r}; expected something like "
                "'a small red circle moving left on a black background'"
            ) from error


def _parse_phrase(phrase: str) -> Sprite:
    """Parse the inverse of `Sprite.phrase`; raises KeyError or ValueError for anything else."""
    article, size, color, shape, motion = phrase.split(" ", 4)
    motions = {words: name for name, words in MOTIONS.items()}
    if article != "a" or size not in SIZES or color not in COLORS or shape not in SHAPES:
        raise ValueError(phrase)
    return Sprite(color, shape, motions[motion], size)


def sample_scene(rng: np.random.Generator, held_out: bool, pair_probability: float = 0.25) -> Scene:
    """Draw a random scene: with `held_out` its first sprite is a held-out triple, otherwise none of its sprites is."""
    background = str(rng.choice(list(BACKGROUNDS)))
    if rng.random() >= pair_probability:
        return Scene((_sample_sprite(rng, tuple(MOTIONS), tuple(SIZES), held_out),), background)
    first = _sample_sprite(rng, PAIR_MOTIONS, ("small",), held_out)
    while True:
        second = _sample_sprite(rng, PAIR_MOTIONS, ("small",), False)
        if second.color != first.color:
            return Scene((first, second), background)


def _sample_sprite(
    rng: np.random.Generator, motions: tuple[str, ...], sizes: tuple[str, ...], held_out: bool
) -> Sprite:
    """Draw a random sprite that is held out, or is not."""
    while True:
        choices = (rng.choice(options) for options in (list(COLORS), SHAPES, motions, sizes))
        sprite = Sprite(*(str(choice) for choice in choices))
        if sprite.held_out == held_out:
            return sprite


def held_out_prompts(count: int, seed: int = 0, pair_probability: float = 0.25) -> list[str]:
    """Draw `count` distinct prompts, each with a (color, shape, motion) triple that training never showed."""
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[sample_scene(rng, True, pair_probability).prompt] = None
    return list(prompts)


def vocabulary() -> list[str]:
    """List every word of the grammar, sorted."""
    words = itertools.chain(
        COLORS, BACKGROUNDS, SHAPES, SIZES, *(phrase.split() for phrase in MOTIONS.values()), ("a", "above", "on")
    )
    return sorted({*words, "background"})


def shape_distance(shape: str, x: Any, y: Any, radius: Any, xp: Any = np) -> Any:
    """Compute the signed distance of points `x`, `y` from a shape of `radius` at the origin: pixels, negative inside.

    Uses only functions that numpy and torch share: `xp` is either module, the arrays are its own.
    """
    if shape == "circle":
        return xp.hypot(x, y) - radius
    if shape == "square":
        return xp.maximum(abs(x), abs(y)) - 0.88 * radius
    if shape == "triangle":
        return xp.maximum(y, 0.8660254 * abs(x) - 0.5 * y) - 0.6 * radius
    if shape == "cross":
        bar = xp.maximum(abs(x) - radius, abs(y) - 0.36 * radius)
        return xp.minimum(bar, xp.maximum(abs(x) - 0.36 * radius, abs(y) - radius))
    if shape == "ring":
        return abs(xp.hypot(x, y) - 0.75 * radius) - 0.25 * radius
    raise ValueError(f"unknown shape {shape!r}; expected one of {SHAPES}")


# ---------------------------------------------------------------------------------------------------------------------
# The judge

_AREA = {"circle": np.pi, "square": 3.0976, "triangle": 1.8706, "cross": 2.3616, "ring": 0.75 * np.pi}  # / radius**2
_MIN_DISTANCE = 55.0  # RGB distance from the background that makes a pixel foreground
_MAX_COLOR_ERROR = 70.0  # RGB distance to the named color
_MIN_IOU = 0.7
_MAX_PATH_ERROR = 2.5  # pixels, root mean square
_PULSE_THRESHOLD = 0.1  # relative amplitude of the apparent radius
_MAX_SHAPE_FRAMES = 6


@dataclass(frozen=True)
class Adherence:
    """Tell which attributes of the prompt a video shows; with two sprites, an attribute must hold for both."""

    color: bool
    shape: bool
    motion: bool
    size: bool
    background: bool

    @property
    def correct(self) -> bool:
        """Whether color, shape and motion are right: the reported figure."""
        return self.color and self.shape and self.motion


def adherence(frames: np.ndarray, prompt: str, frame_range: tuple[int, int] | None = None) -> Adherence:
    """Judge a video against its prompt.

    Args:
        frames: uint8 `[frames, 64, 64, 3]`.
        prompt: a sentence of the grammar.
        frame_range: judge only `frames[start:stop]`, at least 8 frames, such as the last chunks of a long stream.

    Raises:
        ValueError: the prompt is not a sentence of the grammar, or the frames are not such an array of at least 8.
    """
    scene = Scene.from_prompt(prompt)
    frames = frames[slice(*frame_range)] if frame_range is not None else frames
    if frames.ndim != 4 or frames.shape[1:] != (FRAME_SIZE, FRAME_SIZE, 3) or frames.dtype != np.uint8:
        raise ValueError(f"expected uint8 [frames, {FRAME_SIZE}, {FRAME_SIZE}, 3], got {frames.dtype} {frames.shape}")
    if len(frames) < 8:
        raise ValueError(f"a motion cannot be judged on {len(frames)} frames, expected at least 8")
    pixels = frames.astype(np.float32)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    half = FRAME_SIZE // len(scene.sprites)
    observed = [observe(pixels[:, i * half : (i + 1) * half], background) for i in range(len(scene.sprites))]

    def matches(attribute: str) -> bool:
        pairs = zip(observed, scene.sprites, strict=True)
        return all(
            seen is not None and getattr(seen, attribute) == getattr(sprite, attribute) for seen, sprite in pairs
        )

    attributes = {name: matches(name) for name in ("color", "shape", "motion", "size")}
    return Adherence(**attributes, background=_nearest(background, BACKGROUNDS) == scene.background)


def shows_prompt(frames: np.ndarray, prompt: str) -> bool:
    """Return whether a video is right in color, shape and motion, see `adherence`: a `fidelity.Judge`."""
    return adherence(frames, prompt).correct


@dataclass(frozen=True)
class Observation:
    """Hold what the judge saw; None if nothing of the grammar fits well enough."""

    color: str | None
    shape: str | None
    motion: str | None
    size: str | None


def observe(pixels: np.ndarray, background: np.ndarray) -> Observation | None:
    """Observe the object in float frames `[frames, height, 64, 3]`; None if it is missing or too large in a frame."""
    distance = np.linalg.norm(pixels - background, axis=-1)
    inside = distance > _MIN_DISTANCE
    counts = inside.sum(axis=(1, 2))
    if counts.min() < 20 or counts.max() > 0.6 * inside[0].size:
        return None
    core = inside & (distance > 0.8 * np.percentile(distance[inside], 90))
    color = np.median(pixels[core], axis=0)
    contrast = float(np.linalg.norm(color - background))
    coverage = np.clip(distance / contrast, 0.0, 1.0)
    coverage[coverage < 0.2] = 0.0
    path = _centroids(coverage)
    shape = _best_shape(coverage, path)
    radii = np.sqrt(coverage.sum(axis=(1, 2)) / _AREA[shape or "circle"])
    size = min(SIZES, key=lambda name: abs(SIZES[name] - radii.mean()))
    return Observation(_nearest(color, COLORS), shape, _best_motion(path, radii), size if shape else None)


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    """Name the nearest color of a palette; None if it is too far."""
    name = min(palette, key=lambda key: np.linalg.norm(color - palette[key]))
    return name if np.linalg.norm(color - palette[name]) < _MAX_COLOR_ERROR else None


def _centroids(coverage: np.ndarray) -> np.ndarray:
    """Compute the centroid per frame as x + iy; coordinates that wrap around the picture are unwrapped over time."""
    parts = []
    for axis in (1, 2):
        profile = coverage.sum(axis=axis)  # axis 1 sums over rows and leaves x, axis 2 leaves y
        length = profile.shape[1]
        if length == FRAME_SIZE:
            circle = np.exp(2j * np.pi * (np.arange(length) + 0.5) / length)
            parts.append(np.unwrap(np.angle(profile @ circle)) * length / (2 * np.pi))
        else:
            parts.append(profile @ (np.arange(length) + 0.5) / profile.sum(axis=1))
    return parts[0] + 1j * parts[1]


def _best_shape(coverage: np.ndarray, path: np.ndarray) -> str | None:
    """Find the template of highest mean intersection over union, at the centroid and area of each frame."""
    height, width = coverage.shape[1:]
    rows, columns = np.mgrid[:height, :width] + 0.5
    scores = dict.fromkeys(SHAPES, 0.0)
    chosen = np.unique(np.linspace(0, len(coverage) - 1, _MAX_SHAPE_FRAMES).astype(int))
    for index, shape in itertools.product(chosen, SHAPES):
        picture = coverage[index]
        x = (columns - path[index].real + width / 2) % width - width / 2
        y = (rows - path[index].imag + height / 2) % height - height / 2
        radius = np.sqrt(picture.sum() / _AREA[shape])
        template = np.clip(0.5 - shape_distance(shape, x, y, radius), 0.0, 1.0)
        scores[shape] += np.minimum(picture, template).sum() / np.maximum(picture, template).sum() / len(chosen)
    best = max(scores, key=scores.get)
    return best if scores[best] > _MIN_IOU else None


def _best_motion(path: np.ndarray, radii: np.ndarray) -> str | None:
    """Find the motion whose model (free start and phase, fixed speed) leaves the smallest residual of the path."""
    time = np.arange(len(path))
    errors = {"still": np.sqrt(np.mean(abs(path - path.mean()) ** 2))}
    for motion, direction in _VELOCITY.items():
        rest = path - direction * time * FRAME_SIZE / TRAVEL_PERIOD
        errors[motion] = np.sqrt(np.mean(abs(rest - rest.mean()) ** 2))
    for motion, sign in _TURN.items():
        basis = np.stack([np.ones(len(path)), np.exp(sign * 2j * np.pi * time / TRAVEL_PERIOD)], axis=1)
        coefficients = np.linalg.lstsq(basis, path, rcond=None)[0]
        if 0.5 < abs(coefficients[1]) / ORBIT_RADIUS < 1.6:
            errors[motion] = np.sqrt(np.mean(abs(path - basis @ coefficients) ** 2))
    best = min(errors, key=errors.get)
    if errors[best] > _MAX_PATH_ERROR:
        return None
    if best != "still":
        return best
    angle = 2 * np.pi * time / PULSE_PERIOD
    basis = np.stack([np.ones(len(path)), np.cos(angle), np.sin(angle)], axis=1)
    mean, cosine, sine = np.linalg.lstsq(basis, radii, rcond=None)[0]
    return "pulse" if np.hypot(cosine, sine) > _PULSE_THRESHOLD * mean else "still"
