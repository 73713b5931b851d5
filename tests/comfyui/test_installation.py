"""The pack as it is published, in `custom_nodes/`, and a library that cannot be imported."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import comfy_server
import pytest
import workflows
from graphs import BUNDLED, node
from make_examples import EXAMPLES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("comfyui_nodes", "qarvd_diffusers", "kernels", "docs", "examples")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """What `comfy node pack` takes: the files git knows without those of `.comfyignore`; links are not followed."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: clone the repository with git")
    ignored = [line.strip() for line in (ROOT / ".comfyignore").read_text().splitlines() if line.strip()]
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")[:-1]
    folder = tmp_path_factory.mktemp("packed")
    for name in names:
        if not any(name.startswith(line) or fnmatch.fnmatch(name, line) for line in ignored):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def server(comfy_tree, packed, tmp_path_factory):
    """A server with the pack, a second link to its nodes, an incomplete library, and a package that is too old."""
    broken = tmp_path_factory.mktemp("broken") / "qarvd_diffusers"
    broken.mkdir()
    (broken / "__init__.py").write_text("import a_package_that_is_not_there\n")
    old = broken.parent / "optimum_quanto-0.0.1.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: optimum-quanto\nVersion: 0.0.1\n")
    path = os.pathsep.join([str(broken.parent), os.environ.get("PYTHONPATH", "")])
    running = comfy_server.Server(comfy_tree, tmp_path_factory.mktemp("comfyui"), {"PYTHONPATH": path}, pack=packed)
    (running.base / "custom_nodes" / "again").symlink_to(ROOT / "comfyui_nodes", target_is_directory=True)
    running.start()
    yield running
    running.stop()


def test_the_published_pack_loads_also_twice(server):
    assert not server.failed_imports()
    assert "QARVDStreamGenerate" in server.get("/object_info")
    for pack in ("qarvd", "again"):
        for path in ("qarvd.js", "docs/QARVDStreamGenerate.md"):
            with urllib.request.urlopen(f"{server.url}/extensions/{pack}/{path}") as response:
                assert response.status == 200


def test_every_template_is_a_file_where_comfyui_looks(server, packed):
    """In the published pack, whose links are empty, and in a clone on Windows, where a link is a file."""
    names = {path.stem for path in (packed / "example_workflows").glob("*.json")}
    assert names == set(EXAMPLES) == set(server.get("/workflow_templates")["qarvd"])
    for name in names:
        assert (packed / "example_workflows" / f"{name}.jpg").stat().st_size > 10_000
        assert json.dumps(server.get(f"/api/workflow_templates/qarvd/{name}.json")) == json.dumps(workflows.load(name))
    assert not [path for path in packed.rglob("*") if path.is_symlink()]


def test_pictures_of_the_readme_are_published(packed):
    for readme in (packed / "README.md", packed / "comfyui_nodes" / "README.md"):
        pictures = re.findall(r"!\[[^\]]*\]\(([^)#]+)\)", readme.read_text(encoding="utf-8"))
        assert pictures and all((readme.parent / picture).is_file() for picture in pictures), readme


def test_every_node_has_a_help_page(server):
    pages = {path.stem for path in (ROOT / "comfyui_nodes" / "web" / "docs").glob("*.md")}
    assert pages == {name for name in server.get("/object_info") if name.startswith("QARVD")}


def test_a_missing_library_is_an_error_of_two_lines_when_a_node_runs(server):
    graph = {"1": node("QARVDLoadPipeline", model=BUNDLED), "2": node("QARVDInfo", pipeline=["1", 0])}
    for _ in range(2):  # the server stays up
        lines = server.run(graph).error.strip().splitlines()
        assert len(lines) == 2, lines
        assert "cannot be imported: No module named 'a_package_that_is_not_there'" in lines[0]
        assert tells_the_remedy(lines[1])


def tells_the_remedy(line: str) -> bool:
    """Whether a line has the command that installs what is missing, for the server's Python, from an existing file."""
    found = re.search(rf"{re.escape(comfy_server.python())} -m pip install -r (\S+), then restart ComfyUI", line)
    return found is not None and Path(found[1]).is_file()


def test_what_is_missing_is_said_in_the_log_at_the_start(server):
    lines = [line for line in server.log.read_text().splitlines() if "Q-ARVD needs " in line]
    assert lines
    for line in lines:
        assert "optimum-quanto>=0.2.7 (not 0.0.1)" in line and tells_the_remedy(line)


def test_no_package_is_named_that_anyone_could_claim():
    """The library is not on PyPI, and advice to install it from there would install whatever someone puts there."""
    for path in [*ROOT.glob("*.md"), *(p for room in ROOMS for p in (ROOT / room).rglob("*"))]:
        if path.suffix in (".py", ".md", ".txt", ".js"):
            assert not re.search(r"pip install ['\"]?qarvd[-_]diffusers", path.read_text(encoding="utf-8")), path


def test_torch_is_in_no_requirements_of_the_pack():
    text = (ROOT / "comfyui_nodes" / "requirements.txt").read_text()
    assert not [line for line in text.splitlines() if line.startswith("torch")]
