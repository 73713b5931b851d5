"""What users type: sizes, names of models, numbers, and files, refused before any work where they make no sense."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import pytest

from qarvd_diffusers import QARVDConfig
from qarvd_diffusers.bundled import bundled_prompts
from qarvd_diffusers.calibration.pipeline import calibration_prompts
from qarvd_diffusers.cli import build_parser, main
from qarvd_diffusers.memory.plan import parse_budget


@pytest.fixture
def model(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("QARVD_CACHE", str(tmp_path / "cache"))
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def refused(capsys, *arguments: str) -> str:
    """What a command that fails prints; nothing of it goes to stdout."""
    try:
        assert main(arguments) == 1
    except SystemExit as exit:
        assert exit.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def test_sizes_of_memory():
    for text in ("8GB", "8", 8, "8gb", " 8 GB ", "8.0", "8000MB", "8G"):
        assert parse_budget(text) == 8_000_000_000, text
    assert parse_budget("8GiB") == 8 * 2**30 == parse_budget("8192MiB") and parse_budget("0.5gib") == 2**29
    for text in ("8TB", "lots", "", "-8", 8_000_000_000, "8GBGB", "nan"):
        with pytest.raises(ValueError, match="expected a size such as '8GB'"):
            parse_budget(text)


@pytest.mark.parametrize("size", ("8", "8GB", "8000MB"))
def test_the_same_size_means_the_same_to_plan_and_generate(model, tmp_path, capsys, size):
    assert main(["plan", model, "--memory", size, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vram_bytes"] == 8_000_000_000
    video = str(tmp_path / "x.mkv")
    arguments = ["generate", model, "--prompt", "a red circle", "--num-chunks", "1", "--out", video, "--memory", size]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["frames"] == 9 == len(imageio.mimread(video))
    assert "Loading" not in captured.err, "no bars of other libraries"


def test_bundled_is_a_model_for_every_command(tmp_path, capsys):
    original, out = str(tmp_path / "x.safetensors"), tmp_path / "out"
    assert main(["convert", "bundled", original]) == 0
    assert main(["convert", original, str(out), "--base", "bundled"]) == 0
    assert (out / "vae" / "config.json").is_file()
    arguments = ["--from-disk", "--scheme", "w8a8_dynamic"]
    assert main(["quantize", "bundled", str(tmp_path / "quantized"), *arguments]) == 0
    assert main(["inspect", str(tmp_path / "quantized")]) == 0
    assert main(["plan", "bundled"]) == 0


def test_a_name_that_is_no_model(model, tmp_path, capsys):
    (tmp_path / "file.pt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    commands = (
        ("inspect", "{}"),
        ("plan", "{}"),
        ("generate", "{}", "--prompt", "a", "--out", str(tmp_path / "x.mp4")),
        ("quantize", "{}", str(tmp_path / "q")),
    )
    for command in commands:
        for name, said in (
            ("./nosuch", "./nosuch: there is no such folder"),
            ("nosuch", "nosuch: there is no such folder"),
            (f"{tmp_path}/a/b/c", "/a/b/c: there is no such folder"),
            (f"{tmp_path}/file.pt", "qarvd convert"),
            (f"{tmp_path}/empty", "has no model_index.json"),
        ):
            error = refused(capsys, *(part.format(name) for part in command))
            assert said in error and "UserWarning" not in error and "Repo id" not in error


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", "99999999999999999999"),
        ("--seed", "1.5"),
        ("--fps", "0"),
        ("--fps", "-1"),
        ("--num-chunks", "-1"),
        ("--height", "0"),
        ("--prompt", ""),
        ("--prompt", " \t"),
        ("--memory", "8TB"),
    ],
)
def test_values_that_make_no_video_are_refused_before_anything_is_loaded(tmp_path, capsys, option, value):
    arguments = {"--prompt": "a", "--out": str(tmp_path / "x.mp4")} | {option: value}
    error = refused(capsys, "generate", "bundled", *(part for pair in arguments.items() for part in pair))
    assert (option in error or "memory is" in error) and "loading" not in error and not list(tmp_path.iterdir())


def test_the_largest_seed_works(model, tmp_path, capsys):
    video = str(tmp_path / "x.mp4")
    arguments = ["--prompt", "a red circle", "--num-chunks", "1", "--seed", str(2**63 - 1)]
    assert main(["generate", model, "--out", video, *arguments]) == 0
    assert f"wrote {video}: 9 frames" in capsys.readouterr().out


@pytest.mark.parametrize("name", ("x.webm", "x.m4v", "x", "x.mp4.part"))
def test_a_format_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path, capsys, name):
    error = refused(capsys, "generate", "bundled", "--prompt", "a", "--out", str(tmp_path / name))
    assert ".mp4, .mov, .mkv, .avi, .wmv, .gif or .webp" in error and name in error and "loading" not in error
    assert not list(tmp_path.iterdir())


def test_out_of_the_wrong_kind(tmp_path, capsys):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "prompts.txt").write_text("a\n")
    error = refused(capsys, "generate", "bundled", "--prompt", "a", "--out", str(tmp_path / "folder.mp4"))
    assert "is a folder" in error and "loading" not in error
    prompts = ("--prompts", str(tmp_path / "prompts.txt"))
    error = refused(capsys, "generate", "bundled", *prompts, "--out", str(tmp_path / "file"))
    assert "is a file" in error and "loading" not in error


def test_an_existing_folder_needs_overwrite(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "x.pt").write_bytes(b"not a checkpoint")
    there = str(tmp_path / "there")
    for command in (
        ("quantize", "bundled", there),
        ("quantize", "bundled", there, "--from-disk", "--scheme", "w8a8_dynamic"),
        ("convert", str(tmp_path / "x.pt"), there),
    ):
        error = refused(capsys, *command)
        assert f"{there} exists; give a new folder, or replace this one with --overwrite" in error
        assert "loading" not in error
    assert not list((tmp_path / "there").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_overwrite_replaces_the_whole_folder(model, tmp_path, capsys):
    """Nothing of the old model is left: an index of its shards would be read instead of the new weights."""
    stale = "diffusion_pytorch_model.safetensors.index.json"
    single = str(tmp_path / "x.safetensors")
    assert main(["convert", model, single]) == 0
    common = ["--calibration-chunks", "1", "--calibration-prompts", str(tmp_path / "prompts.txt"), "--evaluate", "0"]
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    for name, command in {
        "quantized": ["quantize", model, "{}", "--scheme", "w8a8_dynamic", *common],
        "from-disk": ["quantize", model, "{}", "--scheme", "w8a8_dynamic", "--from-disk"],
        "converted": ["convert", single, "{}", "--base", model],
    }.items():
        fresh, replaced = tmp_path / f"{name}-fresh", tmp_path / name
        assert main([part.format(fresh) for part in command]) == 0
        shutil.copytree(model, replaced)
        (replaced / "transformer" / stale).write_text("{}")
        assert main([*(part.format(replaced) for part in command), "--overwrite"]) == 0
        assert contents(replaced) == contents(fresh) and str(replaced) in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


def test_overwrite_keeps_what_it_must_not_remove(model, tmp_path, capsys):
    other, before = tmp_path / "other", contents(Path(model))
    other.mkdir()
    (other / "notes.txt").write_text("x")
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    shutil.copy(tmp_path / "broken.pt", tmp_path / "model" / "original.pt")
    for command, said in (
        (("quantize", model, str(other)), "is not a model folder, which --overwrite never removes"),
        (("quantize", model, model), "the model that is read"),
        (("convert", f"{model}/original.pt", model), "the model that is read"),
        (("convert", str(tmp_path / "broken.pt"), model), "broken.pt"),
    ):
        error = refused(capsys, *command, "--overwrite")
        assert said in error and "loading" not in error
    (tmp_path / "model" / "original.pt").unlink()
    assert contents(Path(model)) == before and [file.name for file in other.iterdir()] == ["notes.txt"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("command", "old", "new", "value"),
    [
        ("plan", "--vram", "--memory", "8GB"),
        ("generate", "--chunks", "--num-chunks", 2),
        ("demo", "--chunks", "--num-chunks", 2),
        ("evaluate", "--chunks", "--num-chunks", 2),
        ("sensitivity", "--chunks", "--num-chunks", 2),
        ("quantize", "--chunks", "--calibration-chunks", 2),
        ("quantize", "--seed", "--calibration-seed", 2),
        ("quantize", "--prompts", "--calibration-prompts", "file"),
        ("quantize", "--mixed", "--mixed-precision", 0.5),
        ("bench", "--chunks", "--at-chunks", [1, 4]),
    ],
)
def test_old_option_names_work_and_name_the_new_one(command, old, new, value, capsys):
    required = {
        "plan": ["m"],
        "generate": ["m", "--prompt", "a", "--out", "x.mp4"],
        "evaluate": ["m", "q", "--prompts", "p", "--out", "o"],
        "sensitivity": ["m", "--prompts", "p", "--out", "o"],
        "quantize": ["m", "q"],
    }.get(command, [])
    given = [str(part) for part in (value if isinstance(value, list) else [value])]
    parsed = []
    for option in (old, new):
        parsed.append(vars(build_parser().parse_args([command, *required, option, *given])))
        notice = capsys.readouterr().err
        assert (notice.count(f"{old} is deprecated") == 1 and f"use {new}" in notice) == (option == old)
    assert parsed[0] == parsed[1] and parsed[0][new[2:].replace("-", "_")] == value
    assert vars(build_parser().parse_args([command, *required])).keys() == parsed[0].keys()
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--help"])
    assert not re.search(rf"{old}\b(?!-)", capsys.readouterr().out)


def test_quantize_refuses_before_it_generates(tiny_pipeline, model, tmp_path, capsys):
    out = str(tmp_path / "out")
    error = refused(capsys, "quantize", model, out, "--evaluate", "99")
    assert f"--evaluate is 99, but there are {len(bundled_prompts())} calibration prompts" in error
    error = refused(capsys, "quantize", model, out, "--scheme", "w8a8", "--mixed-precision", "0.1")
    assert "starts from 4-bit weights" in error
    tiny_pipeline.quantize(QARVDConfig("w8a8_dynamic"))
    tiny_pipeline.save_pretrained(tmp_path / "quantized")
    error = refused(capsys, "quantize", str(tmp_path / "quantized"), out)
    assert "quantized is quantized already (w8a8_dynamic): quantize the float model" in error
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()


def test_prompt_files_of_editors(model, tiny_pipeline, tmp_path, capsys):
    """A byte order mark makes no prompt of a comment; another encoding is named with the file."""
    for path in (tmp_path / "prompts.txt", tmp_path / "model" / "calibration_prompts.txt"):
        path.write_bytes("# comment\r\na red circle\r\na blue square\r\n".encode("utf-8-sig"))
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--num-chunks", "1", "--out", str(tmp_path / "videos")]
    assert main(["generate", model, *arguments, "--json"]) == 0
    videos = json.loads(capsys.readouterr().out)["videos"]
    assert [video["prompt"] for video in videos] == ["a red circle", "a blue square"]
    tiny_pipeline.source = model
    assert calibration_prompts(tiny_pipeline, QARVDConfig()) == ("a red circle", "a blue square")
    (tmp_path / "prompts.txt").write_text("a red circle\n", encoding="utf-16")
    assert "prompts.txt is UTF-16, expected UTF-8" in refused(capsys, "generate", model, *arguments)
    (tmp_path / "s.json").write_text("{}", encoding="utf-16")
    error = refused(capsys, "quantize", model, str(tmp_path / "q"), "--sensitivity", str(tmp_path / "s.json"))
    assert "s.json is UTF-16, expected UTF-8" in error


def test_a_report_without_matplotlib(model, tiny_pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    tiny_pipeline.quantize(QARVDConfig("w8a8_dynamic"))
    tiny_pipeline.save_pretrained(tmp_path / "quantized")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--num-chunks", "1", "--out", str(tmp_path / "report")]
    assert main(["evaluate", model, str(tmp_path / "quantized"), *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("No plots: they need matplotlib") == 1 and "report.html" in captured.out
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.html", "report.json"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "No plots: they need matplotlib" in page and "<video" in page and "PSNR (dB)" in page
    error = refused(capsys, "sensitivity", model, *arguments[:2], "--out", "x.json", "--plot", "x.png")
    assert "plots need matplotlib" in error and "loading" not in error


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP runtime")
@pytest.mark.parametrize(("set_by_user", "spins"), [(None, 0), ("active", 30_000_000_000)])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(tmp_path, set_by_user, spins):
    """How often its threads look before they sleep, by the OpenMP runtime itself; by default 300000 times."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    if set_by_user:
        environment["OMP_WAIT_POLICY"] = set_by_user
    command = [sys.executable, "-m", "qarvd_diffusers", "generate", "bundled", "--prompt", "a", "--out", "x.webm"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "x.webm: expected a file name" in done.stderr
    assert int(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)[-1]) == spins
