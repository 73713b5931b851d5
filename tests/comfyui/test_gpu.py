"""The node pack on a real ComfyUI server on a GPU; see `gpu_trial`, which runs the same steps without pytest.

Where there is no GPU, a part of the steps runs on the CPU; with QARVD_COMFYUI_TRIAL=1 all of them do.
"""

from __future__ import annotations

import os

import comfy_server
import gpu_trial
import pytest

FLAGS = {"default flags": (), "--disable-cuda-malloc": ("--disable-cuda-malloc",), "--cpu": ("--cpu",)}
EVERYTHING = bool(os.environ.get("QARVD_COMFYUI_TRIAL"))
SERVERS = [
    pytest.param(name, marks=pytest.mark.slow if name == "--cpu" else (pytest.mark.gpu, pytest.mark.slow))
    for name in FLAGS
]


@pytest.fixture(scope="module", params=SERVERS)
def trial(comfy_tree, tmp_path_factory, request):
    """A server with these flags, on which a quantized model was made: by the examples, or quickly."""
    on_cpu = request.param == "--cpu"
    if not on_cpu and not comfy_server.has_gpu():
        pytest.skip("needs a GPU that torch sees in the Python of ComfyUI (COMFYUI_PYTHON names another)")
    server = comfy_server.Server(comfy_tree, tmp_path_factory.mktemp("comfyui"), flags=FLAGS[request.param])
    server.start()
    steps = gpu_trial.Trial(server)
    try:
        if on_cpu and not EVERYTHING:
            steps.quick_model()
        else:
            steps.examples()
        yield steps
    finally:
        server.stop()
    assert not server.failed_imports()


@pytest.mark.parametrize("step", [step for step in gpu_trial.STEPS if step != "examples"])
def test_step(trial, step):
    reason = gpu_trial.refusal(step, trial.server)
    if reason is not None:
        pytest.skip(reason)
    getattr(trial, step)()
