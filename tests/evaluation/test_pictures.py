"""Video files: every format that is promised holds all frames, and what cannot be written is said."""

import subprocess
import sys

import imageio.v2 as imageio
import numpy as np
import pytest

from qarvd_diffusers.evaluation.pictures import check_video_name, write_video


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (7, 32, 48, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", (".mp4", ".MP4", ".mov", ".mkv", ".avi", ".wmv", ".gif", ".webp"))
def test_all_frames_are_in_the_file(frames, tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write_video(frames, path, fps=8)
    assert len(imageio.mimread(path)) == 7
    still = np.repeat(frames[:1], 5, axis=0)  # moving pictures join equal frames, and show them as long
    write_video(still, path, fps=8)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ("x.webm", "x.m4v", "x", "x.png"))
def test_other_formats_are_refused(frames, tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: expected a file name that ends in \.mp4, .* or \.webp"):
        write_video(frames, tmp_path / name, fps=8)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_refused(tmp_path):
    (tmp_path / "x.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_video_name(tmp_path / "x.mp4")


FULL_DISK = """
import resource, sys
import numpy as np
from qarvd_diffusers.evaluation.pictures import write_video

frames = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # no file may grow larger
try:
    write_video(frames, sys.argv[1], 8)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has no limit on the size of files: run it on Linux or macOS"
)
@pytest.mark.parametrize("name", ("x.avi", "x.mp4", "x.gif"))
def test_a_file_that_lost_frames_is_no_result(tmp_path, name):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    assert f"{name} could not be written: " in done.stdout and done.stdout.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())
