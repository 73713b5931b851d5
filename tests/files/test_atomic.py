"""A write that fails leaves nothing behind, and says which file failed and what to do."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qarvd_diffusers.files import atomic
from qarvd_diffusers.files.atomic import atomic_directory, atomic_file, write_json


def test_a_failed_write_names_file_and_remedy(tmp_path):
    for write in (
        lambda path: save_file({"x": torch.zeros(1)}, path / "not a folder" / "x"),  # SafetensorError
        lambda path: (path / "x").write_text("x"),  # NotADirectoryError
    ):
        named = pytest.raises(OSError, match=r"out\.json could not be written \(.+\): ask the administrator$")
        with named, atomic_file(tmp_path / "out.json", "ask the administrator") as temporary:
            temporary.write_text("half")
            write(temporary)
    with pytest.raises(FileNotFoundError, match=r"^[^(]*input"), atomic_file(tmp_path / "out.json"):
        (tmp_path / "input").read_text()  # without a remedy the block's own errors stay
    assert list(tmp_path.iterdir()) == []


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = write_json({"a": 1.5}, tmp_path / "new folder" / "x.json")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json({"a": float("nan")}, path)
    assert json.loads(path.read_text()) == {"a": 1.5} and len(list(path.parent.iterdir())) == 1


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


SHARDED = {
    "transformer/m-00001-of-00002.safetensors": "old",
    "transformer/m-00002-of-00002.safetensors": "old",
    "transformer/m.safetensors.index.json": "old",
    "transformer/m.fp16.safetensors": "another variant",
    "transformer/m.safetensors.index.fp16.json": "another variant",
    "transformer/notes.txt": "the user's",
    "vae/m.safetensors": "old",
    "videos/cat.mp4": "the user's",
    "fidelity.json": "of the old weights",
    "README.md": "old",
}
SINGLE = {"transformer/m.safetensors": "new", "README.md": "new"}
MERGED = {name: text for name, text in SHARDED.items() if "old" not in text or name.startswith("vae")} | SINGLE


@pytest.mark.parametrize("how", ("exchange", "two renames", "working directory"))
def test_a_folder_is_replaced_but_for_what_others_wrote(how, tmp_path, monkeypatch):
    """Old shards and their index would be loaded in place of a new single file."""
    if how == "two renames":
        monkeypatch.setattr("qarvd_diffusers.files.exchange._exchange", lambda *_: False)
    place = tmp_path / "model"
    write(place, SHARDED)
    if how == "working directory":
        monkeypatch.chdir(place)
    with atomic_directory(place, owned=["fidelity.json"]) as folder:
        write(folder, SINGLE)
        assert content(place) == SHARDED
    assert content(place) == MERGED and list(tmp_path.iterdir()) == [place]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    write(tmp_path / "disk" / "model", SHARDED)
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    with atomic_directory(tmp_path / "model", owned=["fidelity.json"]) as folder:
        write(folder, SINGLE)
    assert (tmp_path / "model").is_symlink() and content(tmp_path / "disk" / "model") == MERGED
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


def test_a_failed_block_changes_nothing(tmp_path):
    write(tmp_path / "model", SHARDED)
    with pytest.raises(KeyError), atomic_directory(tmp_path / "model") as folder:
        write(folder, SINGLE)
        raise KeyError
    assert content(tmp_path / "model") == SHARDED and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileExistsError, match=r"README\.md is a file"), atomic_directory(tmp_path / "model/README.md"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="permissions of a umask are those of POSIX systems")
@pytest.mark.parametrize(("umask", "file", "folder"), ((0o022, 0o644, 0o755), (0o007, 0o660, 0o770)))
def test_permissions_follow_the_umask(umask, file, folder, tmp_path):
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "model") as new:
            save_file({"x": torch.zeros(1)}, new / "m.safetensors")
            (new / "m.safetensors").chmod(0o600)  # as some versions of safetensors do
        with atomic_file(tmp_path / "one.safetensors") as new:
            save_file({"x": torch.zeros(1)}, new)
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "model", tmp_path / "model" / "m.safetensors")]
    assert modes == [folder, file] and (tmp_path / "one.safetensors").stat().st_mode & 0o777 == file
    (tmp_path / "model").chmod(0o700)
    with atomic_directory(tmp_path / "model"):
        pass
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o700, "a folder that its owner closed"


def test_what_a_dead_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    place = tmp_path / "model"
    mine, theirs = (f"{atomic._prefix(place)}{process}-0123" for process in (os.getpid(), dead.pid))
    for name in (mine, theirs, theirs + "4.safetensors"):
        write(tmp_path / name, {"half": "written"})
    with atomic_directory(place):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((mine, "model"))
    os.rename(place, tmp_path / (theirs + ".old"))  # killed between the two renames
    with pytest.raises(KeyError), atomic_directory(place):
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((mine, "model"))


SAVER = """
import sys
from pathlib import Path
from qarvd_diffusers.files.atomic import atomic_directory
for i in range(10**6):
    with atomic_directory(sys.argv[1]) as folder:
        for part in range(5):
            (folder / f"{part}-{i % 2}").write_text(str(i % 2))
            (folder / f"{part}.safetensors").write_text(str(i % 2))
    print(i, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a system that exchanges two folders at once: Linux")
def test_killed_at_any_moment_the_folder_is_old_or_new(tmp_path):
    rng = random.Random(0)
    for _ in range(3):
        saver = subprocess.Popen([sys.executable, "-c", SAVER, tmp_path / "model"], stdout=subprocess.PIPE)
        saver.stdout.readline()
        time.sleep(rng.random() * 0.1)
        saver.send_signal(signal.SIGKILL)
        saver.communicate()
        got = content(tmp_path / "model")
        assert len({got[f"{part}.safetensors"] for part in range(5)}) == 1 and len(got) in (10, 15)
    with atomic_directory(tmp_path / "model"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


DISK = """
import resource, sys
from qarvd_diffusers.files.atomic import atomic_directory, atomic_file
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import torch; from safetensors.torch import save_file
what, path = sys.argv[1:]
with (atomic_directory if what == "folder" else atomic_file)(path) as new:
    save_file({"x": torch.zeros(10**4)}, new / "m.safetensors" if what == "folder" else new)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX resource limits")
@pytest.mark.parametrize("what", ("folder", "file"))
def test_a_full_disk_names_path_and_remedy(what, tmp_path):
    place = tmp_path / "out"
    write(place, SHARDED) if what == "folder" else place.write_text("old")
    result = subprocess.run([sys.executable, "-c", DISK, what, place], capture_output=True, text=True, check=False)
    assert f"OSError: {place} could not be written" in result.stderr and atomic.REMEDY in result.stderr
    assert content(place) == SHARDED if what == "folder" else place.read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]
