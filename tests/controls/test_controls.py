"""Controls: poses, cameras, keys and files, against the maths and against what LingBot-World's public code makes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from qarvd_diffusers.controls.camera import Intrinsics, action_tensor, as_intrinsics, camera_tensor
from qarvd_diffusers.controls.control import KEYS, TURN, Control, camera_path, parse_keys
from qarvd_diffusers.controls.poses import as_poses, interpolate, motions, turned
from qarvd_diffusers.controls.recording import read_controls, write_controls

STRICT = 2e-6  # float32 against float64


def pose(yaw=0.0, pitch=0.0, at=(0.0, 0.0, 0.0)):
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3], matrix[:3, 3] = turned(yaw, pitch), torch.tensor(at, dtype=torch.float64)
    return matrix


def test_golden_cameras(golden_family):
    """From poses to tensors, for a steady, a turning and a still camera, and for keys."""
    stored = golden_family("lingbot_world").stored("inputs.safetensors")
    camera = as_intrinsics(stored["intrinsics"][0])
    height, width = (8 * size for size in stored["noise"].shape[-2:])
    for path, name in (
        ("const", "plucker_constant"), ("change", "plucker_turn"), ("static", "plucker_static_one_frame"),
    ):  # fmt: skip
        moves = motions(as_poses(stored[f"camera_poses_{path}"], "poses")[::4])
        expected = stored[name].expand(-1, -1, len(moves), -1, -1)
        torch.testing.assert_close(camera_tensor(moves, camera, height, width), expected, atol=STRICT, rtol=0)
    flags = stored["wasd_action"][::4]
    fits = [
        (action_tensor(motions(as_poses(stored[f"camera_poses_{path}"], "")[::4]), flags, camera, height, width)
         - stored["plucker_rays_and_wasd"]).abs().max()
        for path in ("const", "change", "static")
    ]  # fmt: skip
    assert min(fits) < STRICT


def test_motions():
    """What the frame before sees; the longest is 1, or a fixed length is."""
    path = torch.stack([pose(at=(0, 0, 0)), pose(90, at=(0, 0, 2)), pose(90, at=(1, 0, 2))])
    moves = motions(path)
    assert torch.equal(moves[0], torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(moves[1], pose(90, at=(0, 0, 1)))
    torch.testing.assert_close(moves[2], pose(0, at=(0, 0, 0.5)))  # facing right, one to the right is forward
    torch.testing.assert_close(motions(path, 4.0)[:, :3, 3], moves[:, :3, 3] / 2)
    still = motions(pose(30, 10, (5, 1, 2)).expand(4, -1, -1))
    torch.testing.assert_close(still, torch.eye(4, dtype=torch.float64).expand(4, -1, -1))


def test_interpolation():
    keys = [(0, pose(-20, 10, (0, 0, 0))), (8, pose(60, 10, (4, 0, 0))), (10, pose(60, 10, (4, 2, 0)))]
    between = interpolate([keys[1], keys[0], keys[2]], [0, 2, 8, 9, 20])
    for got, expected in zip(between[[0, 2, 4]], [keys[0][1], keys[1][1], keys[2][1]], strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(between[1:, :3, 3], torch.tensor([[1, 0, 0], [4, 0, 0], [4, 1, 0], [4, 2, 0]]).double())
    # A quarter of the way is a quarter of the angle, about the same axis.
    whole, part = keys[0][1].T @ keys[1][1], keys[0][1].T @ between[1]
    angles = [math.acos((float(m[:3, :3].trace()) - 1) / 2) for m in (whole, part)]
    assert angles[1] == pytest.approx(angles[0] / 4)
    for turn in (179.0, 180.0):  # no sign or axis is lost at half a turn
        half = interpolate([(0, pose()), (2, pose(turn))], [1])[0]
        assert abs(float(half[0, 2])) == pytest.approx(math.sin(math.radians(turn / 2)))
    with pytest.raises(ValueError, match="each at a time of its own"):
        interpolate([(1, pose()), (1, pose())], [0])


def faulty(change):
    poses = torch.eye(4).repeat(3, 1, 1)
    change(poses)
    return poses


@pytest.mark.parametrize(
    ("poses", "message"),
    [
        (torch.eye(4), r"has shape \[4, 4\], expected \[N, 4, 4\]"),
        (torch.eye(3).expand(2, 3, 3), r"has shape \[2, 3, 3\]"),
        ([["a"]], "is not an array of numbers"),
        (faulty(lambda p: p[1].mul_(2)), "pose 1 is no rigid transform, it has another last row"),
        (faulty(lambda p: p[2, :3, :3].mul_(1.01)), "pose 2 is no rigid transform, it scales or shears"),
        (faulty(lambda p: p[1, 0, 0].neg_()), "pose 1 is no rigid transform, it mirrors"),
        (faulty(lambda p: p[0, 0, 3].fill_(math.nan)), "pose 0 .* not finite"),
    ],
)
def test_poses_that_are_none(poses, message):
    with pytest.raises(ValueError, match=f"^path.* ?{message}"):
        as_poses(poses, "path")
    if isinstance(poses, torch.Tensor):
        with pytest.raises(ValueError, match=message):
            Control(motions=poses)


def test_intrinsics_of_another_size():
    Intrinsics.default().check()
    as_intrinsics([900, 900, 640, 360], (720, 1280))
    with pytest.raises(ValueError, match=r"not of a picture of 480 x 832 pixels \(rather of about 720 x 1280\)"):
        as_intrinsics([900, 900, 640, 360])
    for values in ([0, 500, 416, 240], [500, 500, math.nan, 240]):
        with pytest.raises(ValueError, match="give the size"):
            as_intrinsics(values)
    with pytest.raises(ValueError, match="expected fx, fy, cx, cy"):
        as_intrinsics([500, 416, 240])
    # Scaled to the picture: the ray through the principal point looks straight ahead.
    tensor = camera_tensor(pose()[None], Intrinsics(500, 500, 416, 240), 32, 48)
    assert tensor.shape == (1, 384, 1, 4, 6)
    pixels = (
        tensor.unflatten(1, (6, 8, 8))[0, :, :, :, 0].permute(0, 3, 1, 4, 2).reshape(6, 32, 48)
    )  # control, row, column
    straight = pixels[3:, 15:17, 23:25].mean((1, 2))
    torch.testing.assert_close(straight / straight.norm(), torch.tensor([0.0, 0.0, 1.0]), atol=1e-6, rtol=0)
    assert (pixels[:3] == 0).all() and (pixels[3, :, 0] < 0).all() and (pixels[4, 0] < 0).all()


def test_keys():
    assert parse_keys("WD arrowleft") == {"w", "d", "arrowleft"} and parse_keys("") == frozenset()
    with pytest.raises(ValueError, match=r"keys are 'wx': \['x'\] do nothing, expected some of w, s"):
        Control("wx")
    ahead = Control("w").frame_motions(3, first=True)
    torch.testing.assert_close(ahead[:, :3, 3], torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 1]]).double())
    aside = Control("wd", speed=0.5).frame_motions(2)[:, :3, 3]
    torch.testing.assert_close(aside.norm(dim=1), torch.full((2,), 0.5).double())
    assert (aside[:, [0, 2]] > 0).all()
    turned_left = Control("arrowleft", mouse=(0, 6)).frame_motions(3)
    torch.testing.assert_close(turned_left[1, :3, :3], turned(-TURN / 3, 2))
    assert float(Control("arrowright").frame_motions(1)[0, 0, 2]) > 0  # what is ahead comes to the right
    assert float(Control("arrowup").frame_motions(1)[0, 1, 2]) < 0  # and up is -y
    assert Control(["w", "", "sd"]).flags(3).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert set("wasd") < KEYS.keys()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "controls is a int, expected a Control, a text of keys such as 'w', or a mapping"),
        ({"key": "w"}, r"controls has \['key'\]"),
        ({"event": ""}, "event is '', expected a text"),
        ({"mouse": (1, math.inf)}, "mouse is"),
        ({"speed": -1}, "speed -1, expected degrees"),
    ],
)
def test_values_that_are_no_control(value, message):
    with pytest.raises(ValueError, match=message):
        Control.of(value)


def test_a_recorded_path():
    path = torch.stack([pose(yaw=frame, at=(0, 0, frame / 4)) for frame in range(9)])
    controls = camera_path(path, [1, 2], keys=["w"] * 5 + ["d"] * 4)
    assert [len(control.motions) for control in controls] == [1, 2]
    moves = torch.cat([c.frame_motions(len(c.motions), first=i == 0) for i, c in enumerate(controls)])
    torch.testing.assert_close(moves, motions(path[::4]))
    assert torch.cat([c.flags(len(c.motions)) for c in controls]).argmax(1).tolist() == [0, 0, 3]
    with pytest.raises(ValueError, match=r"poses are for 9 frames, the video has 13 \(4 latent frames\)"):
        camera_path(path, [4])
    with pytest.raises(ValueError, match="keys are for 8 frames"):
        camera_path(path, [3], keys=["w"] * 8)


def written(tmp_path, *lines):
    file = tmp_path / "controls.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def test_file_of_chunks(tmp_path):
    header = {"intrinsics": [900, 900, 640, 360], "size": [720, 1280]}
    lines = (header, {"keys": "w", "event": "a forest"}, "", {"chunk": 3, "keys": "a", "mouse": [3, 0]})
    recording = read_controls(written(tmp_path, *lines))
    controls = recording.controls([3] * 5)
    assert [control.keys for control in controls] == ["w", "w", "w", "a", "a"]
    assert [control.event for control in controls] == ["a forest", None, None, None, None]
    assert [control.mouse for control in controls] == [(0, 0)] * 3 + [(3, 0), (0, 0)]
    assert all(control.intrinsics == Intrinsics(900, 900, 640, 360, 720, 1280) for control in controls)
    assert recording.control(1000).keys == "a"
    with pytest.raises(ValueError, match="has controls for chunk 3, the video has 3 chunks"):
        recording.controls([3] * 3)
    write_controls(tmp_path / "again.jsonl", controls)
    again = read_controls(tmp_path / "again.jsonl").controls([3] * 5)
    assert [vars(control) for control in again] == [vars(control) for control in controls]


def test_file_of_poses(tmp_path):
    lines = [
        {"fps": 16, "translation_scale": 0.5},
        {"frame": 0, "pose": pose().tolist(), "keys": "w"},
        {"frame": 10, "pose": pose(40, at=(0, 0, 5)).tolist(), "event": "rain"},
        {"frame": 20, "pose": pose(80, at=(0, 0, 5)).tolist()},
    ]
    recording = read_controls(written(tmp_path, *lines))
    controls = recording.controls([3, 3], fps=16)
    path = interpolate([(0, pose()), (10, pose(40, at=(0, 0, 5))), (20, pose(80, at=(0, 0, 5)))], range(0, 21, 4))
    torch.testing.assert_close(torch.cat([c.motions for c in controls]), motions(path, 0.5))
    assert [control.event for control in controls] == [None, "rain"]
    assert controls[0].keys == ["w", "w", "w"] and controls[1].keys == ["", "", ""]
    with pytest.raises(ValueError, match="was recorded at 16 frames per second, the model makes 24"):
        recording.controls([3, 3], fps=24)
    with pytest.raises(
        ValueError, match=r"poses for the frames 0 to 20, the video has the frames 0 to 80 \(7 chunks\)"
    ):
        recording.controls([3] * 7)
    with pytest.raises(ValueError, match="is a path, which ends"):
        recording.control(0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], "has no controls"),
        (["nonsense"], "line 1: not valid JSON"),
        ([{"keys": "w"}, {"keyz": "w"}], "line 2.*keyz"),
        ([{"keys": "w"}, {"keys": "x"}], r"line 2: keys are 'x'"),
        ([{"chunk": 2}, {"chunk": 1}], "line 2: chunk 1 does not come after chunk 2"),
        ([{"frame": 4, "pose": torch.eye(4).tolist()}] * 2, "line 2: frame 4 does not come after frame 4"),
        ([{"frame": 0, "pose": torch.eye(3).tolist()}], r"line 1: pose has shape \[1, 3, 3\]"),
        ([{"frame": 0, "pose": (2 * torch.eye(4)).tolist()}], "line 1: pose.*no rigid transform"),
        ([{"frame": 0, "pose": torch.eye(4).tolist()}, {"keys": "w"}], "line 2.*frame"),
        ([{"fps": "fast"}, {"keys": "w"}], "line 1.*fps"),
    ],
)
def test_damaged_files(tmp_path, lines, message):
    file = written(tmp_path, *lines)
    with pytest.raises(ValueError, match=f"controls.jsonl.*{message}"):
        read_controls(file)
