"""Pictures and clips of every form as the start of a video."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.video_processor import VideoProcessor

from qarvd_diffusers.pipelines.video_start import read_picture, start_pixels

SIZE = (32, 48)
PROMPT = "a red circle moves left"


def coloured(height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 `[H, W, 3]` whose corners differ, so that turning it shows."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 255 // (height - 1), columns * 255 // (width - 1), (rows * columns) % 256], -1).astype(
        np.uint8
    )


def grey(height: int = 32, width: int = 48) -> np.ndarray:
    return coloured(height, width)[..., 2]


def start(image=None, video=None, size=SIZE) -> torch.Tensor:
    return start_pixels(image, video, VideoProcessor(vae_scale_factor=8), size)


def truth(picture: np.ndarray) -> torch.Tensor:
    """`[1, 3, 1, H, W]` in [-1, 1] of a uint8 picture of the right size."""
    return torch.tensor(picture).permute(2, 0, 1)[None, :, None].double().div(127.5).sub(1).float()


def turned(picture: np.ndarray, path):
    """A file that stores the picture on its side and says so in its EXIF orientation."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # shown: turned by 90 degrees clockwise
    PIL.Image.fromarray(np.ascontiguousarray(np.rot90(picture))).save(path, exif=exif)
    return path


RGB = coloured()
OPAQUE = np.full((32, 48, 1), 255, np.uint8)
COLOURED = {
    "PIL RGB": PIL.Image.fromarray(RGB),
    "PIL RGBA": PIL.Image.fromarray(np.concatenate([RGB, OPAQUE], -1)),
    "PIL RGBX": PIL.Image.fromarray(RGB).convert("RGBX"),
    "array uint8": RGB,
    "array uint8 with alpha": np.concatenate([RGB, OPAQUE], -1),
    "array channels first": np.ascontiguousarray(RGB.transpose(2, 0, 1)),
    "array uint16": RGB.astype(np.uint16) * 257,
    "array big-endian uint16": (RGB.astype(np.uint16) * 257).astype(">u2"),
    "array float32": (RGB / 255).astype(np.float32),
    "array float64": RGB / 255,
    "array in [-1, 1]": RGB / 127.5 - 1,
    "mirrored view of an array": np.ascontiguousarray(RGB[:, ::-1])[:, ::-1],
    "tensor uint8": torch.tensor(RGB).permute(2, 0, 1),
    "tensor uint8 with alpha": torch.tensor(np.concatenate([RGB, OPAQUE], -1)).permute(2, 0, 1),
    "tensor uint16": torch.tensor(RGB.astype(np.uint16) * 257).permute(2, 0, 1),
    "tensor float": torch.tensor(RGB).permute(2, 0, 1).double() / 255,
    "tensor channels last": torch.tensor(RGB) / 255,
    "tensor that requires a gradient": (torch.tensor(RGB).permute(2, 0, 1) / 255).requires_grad_(),
    "list of one": [RGB],
    "batch of one": torch.tensor(RGB).permute(2, 0, 1)[None],
}
GREY = {
    "PIL L": PIL.Image.fromarray(grey()),
    "PIL LA": PIL.Image.fromarray(grey()).convert("LA"),
    "PIL P": PIL.Image.fromarray(grey()).convert("P"),
    "PIL PA": PIL.Image.fromarray(grey()).convert("PA"),
    "PIL I;16": PIL.Image.fromarray(grey().astype(np.uint16) * 257),
    "PIL I": PIL.Image.fromarray(grey().astype(np.int32) * 257),
    "array [H, W]": grey(),
    "array [H, W, 1]": grey()[..., None],
    "array [H, W, 2]": np.stack([grey(), OPAQUE[..., 0]], -1),
    "tensor [1, H, W]": torch.tensor(grey())[None],
    "tensor [2, H, W]": torch.tensor(np.stack([grey(), OPAQUE[..., 0]])),
    "tensor [H, W], float": torch.tensor(grey()) / 255,
}


@pytest.mark.parametrize("form", COLOURED)
def test_a_coloured_picture_in_any_form(form):
    torch.testing.assert_close(start(COLOURED[form]), truth(RGB), atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", GREY)
def test_a_grey_picture_in_any_form(form):
    expected = truth(grey()[..., None].repeat(3, -1))
    torch.testing.assert_close(start(GREY[form]), expected, atol=1e-6, rtol=0)


def test_two_levels():
    expected = truth((grey() > 127)[..., None].repeat(3, -1).astype(np.uint8) * 255)
    for form in (PIL.Image.fromarray(grey() > 127), grey() > 127, torch.tensor(grey() > 127)):
        torch.testing.assert_close(start(form), expected, atol=1e-6, rtol=0)


def test_what_is_transparent_is_white():
    alpha = np.zeros((32, 48, 1), np.uint8)
    alpha[:, 24:] = 51  # a fifth
    expected = np.full((32, 48, 3), 255.0)
    expected[:, 24:] = RGB[:, 24:] / 5 + 255 * 4 / 5
    palette = PIL.Image.fromarray(np.zeros((32, 48), np.uint8), "P")
    palette.info["transparency"] = 0
    for form in (PIL.Image.fromarray(np.concatenate([RGB, alpha], -1)), np.concatenate([RGB, alpha], -1) / 255):
        torch.testing.assert_close(start(form), truth(expected), atol=1e-6, rtol=0)
    assert torch.equal(start(palette), torch.ones(1, 3, 1, 32, 48))


def test_files_are_read_and_shown_upright(tmp_path):
    path = turned(RGB, tmp_path / "phone.png")
    assert PIL.Image.open(path).size == (32, 48)
    for form in (path, str(path), PIL.Image.open(path), read_picture(path)):
        torch.testing.assert_close(start(form), truth(RGB), atol=1e-6, rtol=0)
    torch.testing.assert_close(start(video=[path, RGB])[:, :, 0], truth(RGB)[:, :, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(64, 96), (16, 24), (32, 32), (48, 16)])
def test_all_forms_agree_at_every_size(size):
    """Enlarged, made smaller, and cut: one way for all forms, and within [-1, 1]."""
    expected = start(COLOURED["PIL RGB"], size=size)
    assert expected.shape == (1, 3, 1, *size)
    assert expected.min() >= -1 and expected.max() <= 1
    for form, picture in COLOURED.items():
        torch.testing.assert_close(start(picture, size=size), expected, atol=1e-6, rtol=0, msg=form)


@pytest.mark.parametrize(("height", "width"), [(64, 256), (256, 64), (97, 130)])
def test_a_circle_stays_a_circle(height, width):
    rows, columns = np.mgrid[:height, :width]
    radius = min(height, width) * 0.4
    circle = (rows - (height - 1) / 2) ** 2 + (columns - (width - 1) / 2) ** 2 < radius**2
    seen = start(circle, size=(64, 64))[0, 0, 0] > 0
    extents = [int(seen.any(dim=axis).sum()) for axis in (0, 1)]
    assert abs(extents[0] - extents[1]) <= 1
    assert abs(extents[0] - 2 * 0.4 * 64) <= 2


def test_the_middle_is_kept():
    wide = np.zeros((32, 128, 3), np.uint8)
    wide[:, 40:88] = RGB
    torch.testing.assert_close(start(wide), truth(RGB), atol=1e-6, rtol=0)
    tall = np.zeros((90, 48, 3), np.uint8)
    tall[29:61] = RGB
    torch.testing.assert_close(start(tall), truth(RGB), atol=1e-6, rtol=0)


def test_a_clip_in_any_form():
    frames = np.stack([RGB, 255 - RGB, np.full_like(RGB, 250)])
    expected = torch.cat([truth(frame) for frame in frames], dim=2)
    tensor = torch.tensor(frames).permute(0, 3, 1, 2)
    forms = {
        "array": frames,
        "tensor": tensor,
        "floats": tensor / 255,
        # The last frame alone would pass for one in [0, 1].
        "floats in [-1, 1]": tensor / 127.5 - 1,
        "list": list(frames),
        "list of tensors": list(tensor),
        "list of lists": [list(frames)],
        "list of arrays": [frames],
        "list of PIL": [PIL.Image.fromarray(frame) for frame in frames],
        "five dimensions": tensor[None],
    }
    for form, video in forms.items():
        torch.testing.assert_close(start(video=video), expected, atol=1e-6, rtol=0, msg=form)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": RGB.astype(np.float32)}, "values from 0 to 255, expected 0 to 1: divide"),
        ({"image": torch.tensor(RGB).permute(2, 0, 1).float() * 2 - 255}, "values from -255 to 255"),
        ({"image": RGB / 255 - 0.05}, "values from -0.05 to 0.95"),
        ({"video": [RGB / 255, RGB / 100]}, "values from 0 to 2.55"),
        ({"image": np.full((32, 48, 3), np.nan)}, "not finite"),
        ({"image": RGB.astype(np.int64)}, "dtype int64, expected uint8"),
        ({"image": np.zeros((32, 48, 5), np.uint8)}, r"shape \(32, 48, 5\) and so 5 channels"),
        ({"image": torch.zeros(16, 32, 48)}, r"shape \(16, 32, 48\) and so 16 channels"),
        ({"image": np.zeros((0, 48, 3))}, r"shape \(0, 48, 3\)"),
        ({"image": torch.zeros(1, 1, 3, 32, 48)}, "a frame of the start has shape"),
        ({"image": 3}, "a frame of the start is a int"),
        ({"image": PIL.Image.new("F", (48, 32))}, "mode F"),
        ({"image": PIL.Image.new("I", (48, 32), 70000)}, "mode I has values from 70000"),
        ({"image": PIL.Image.fromarray(grey().astype(np.int32))}, "mode I has values from 0 to 255, expected 16 bits"),
        ({"image": "https://example.com/x.png"}, "diffusers.utils.load_image"),
        ({"video": "clip.mp4"}, r"video is a path \(clip.mp4\): read it with diffusers.utils.load_video"),
        ({"video": RGB}, r"video has shape \(32, 48, 3\), expected \[F, H, W, 3\]"),
        ({"video": PIL.Image.new("RGB", (48, 32))}, "video is a Image"),
        ({"video": [[RGB, RGB], [RGB]]}, r"have \[2, 1\] frames"),
        ({"image": []}, "has no frames"),
    ],
)
def test_what_cannot_be_read_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        start(**given)


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"x\.png: is no picture"):
        start(tmp_path / "x.png")
    PIL.Image.new("F", (48, 32), 0.5).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="mode F"):
        start(tmp_path / "x.tiff")
    with pytest.raises(FileNotFoundError, match=r"nosuch\.png"):
        start(str(tmp_path / "nosuch.png"))


def test_a_picture_for_every_sample(tiny_pipeline):
    pictures = [PIL.Image.fromarray(RGB), 255 - RGB]
    alone = [tiny_pipeline.encode_start(image=picture) for picture in pictures]
    both = tiny_pipeline.encode_start(image=pictures, batch=2)
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=0)
    stream = tiny_pipeline.stream([PROMPT, PROMPT], image=pictures, num_chunks=1, output_type="latent")
    torch.testing.assert_close(next(stream).latents, both, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="2 starts for a batch of 3"):
        tiny_pipeline.stream([PROMPT] * 3, image=pictures, num_chunks=1)


@pytest.mark.parametrize("noise", [np.zeros((1, 3, 1, 4, 3, 4, 6)), [np.zeros((3, 1, 4, 3, 4, 6))]])
def test_noise_that_is_no_tensor_is_refused_by_name(tiny_pipeline, noise):
    with pytest.raises(ValueError, match=r"renoise_latents is a ndarray, expected a torch\.Tensor"):
        tiny_pipeline.stream(PROMPT, num_chunks=1, renoise_latents=noise)
