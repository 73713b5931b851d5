"""The server fixtures: one ComfyUI per test module, skipped with the reason where it cannot run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import comfy_server
import pytest


def _cache(config: pytest.Config) -> Path:
    """Return where ComfyUI is kept between runs: pytest's cache, or without it a temporary folder of this user."""
    if cache := getattr(config, "cache", None):
        return cache.mkdir("comfyui")
    folder = Path(tempfile.gettempdir()) / f"qarvd-comfyui-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def comfy_tree(request):
    if os.environ.get("QARVD_SKIP_COMFYUI"):
        pytest.skip("QARVD_SKIP_COMFYUI is set: unset it")
    if missing := comfy_server.missing_modules():
        pytest.skip(f"ComfyUI needs {', '.join(missing)}: pip install -e '.[comfyui-test]'")
    try:
        return comfy_server.find_tree(_cache(request.config))
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def server(comfy_tree, tmp_path_factory):
    running = comfy_server.Server(comfy_tree, tmp_path_factory.mktemp("comfyui"))
    running.start()
    yield running
    running.stop()
    assert not running.failed_imports()


@pytest.fixture(scope="module")
def nodes(server):
    return server.get("/object_info")


@pytest.fixture(autouse=True)
def needs_gpu():
    """Do nothing: whether there is a GPU is for the Python of ComfyUI to say, see `test_gpu`."""
