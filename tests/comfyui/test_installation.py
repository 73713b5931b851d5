"""The whole repository cloned into `custom_nodes/`, and a library that cannot be imported."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path

import comfy_server
import pytest
from graphs import BUNDLED, node

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server(comfy_tree, tmp_path_factory):
    """A server with the repository as its custom node, and a library in which something is missing."""
    broken = tmp_path_factory.mktemp("broken") / "qarvd_diffusers"
    broken.mkdir()
    (broken / "__init__.py").write_text("import a_package_that_is_not_there\n")
    path = os.pathsep.join([str(broken.parent), os.environ.get("PYTHONPATH", "")])
    running = comfy_server.Server(comfy_tree, tmp_path_factory.mktemp("comfyui"), {"PYTHONPATH": path}, pack=ROOT)
    running.start()
    yield running
    running.stop()


def test_the_cloned_repository_is_a_node_pack(server):
    assert not server.failed_imports()
    assert "QARVDStreamGenerate" in server.get("/object_info")
    for path in ("qarvd.js", "docs/QARVDStreamGenerate.md"):
        with urllib.request.urlopen(f"{server.url}/extensions/qarvd/{path}") as response:
            assert response.status == 200


def test_every_node_has_a_help_page(server):
    pages = {path.stem for path in (ROOT / "comfyui_nodes" / "web" / "docs").glob("*.md")}
    assert pages == {name for name in server.get("/object_info") if name.startswith("QARVD")}


def test_a_missing_library_is_an_error_of_two_lines_when_a_node_runs(server):
    graph = {"1": node("QARVDLoadPipeline", model=BUNDLED), "2": node("QARVDInfo", pipeline=["1", 0])}
    for _ in range(2):  # the server stays up
        lines = server.run(graph).error.strip().splitlines()
        assert len(lines) == 2, lines
        assert "cannot be imported: No module named 'a_package_that_is_not_there'" in lines[0]
        assert "pip install" in lines[1]


def test_torch_is_in_no_requirements_of_the_pack():
    text = (ROOT / "comfyui_nodes" / "requirements.txt").read_text()
    assert not [line for line in text.splitlines() if line.startswith("torch")]
