"""Publish to a Hub and load back, with the real client against a Hub on loopback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from fake_hub import FakeHub

from qarvd_diffusers import ARVDPipeline, QARVDConfig

PUSH = """
import sys, torch
from qarvd_diffusers import ARVDPipeline
pipe = ARVDPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
pipe.push_to_hub("user/tiny-w8a16", private=True)
"""
PULL = """
import sys, torch
import qarvd_diffusers
from diffusers import DiffusionPipeline, WanTransformer3DModel
def frames(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red circle", num_chunks=1, generator=torch.Generator().manual_seed(5), output_type="latent").frames
ours = qarvd_diffusers.ARVDPipeline.from_pretrained("user/tiny-w8a16", dtype=torch.float32)
generic = DiffusionPipeline.from_pretrained(
    "user/tiny-w8a16", custom_pipeline="user/tiny-w8a16", trust_remote_code=True, dtype=torch.float32
)
assert torch.equal(frames(ours), frames(generic))
WanTransformer3DModel.from_pretrained("user/tiny-w8a16", subfolder="transformer")
torch.save(frames(ours), sys.argv[1])
"""


def run(code: str, argument: str, environment: dict[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code, argument],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_push_and_load_back(tiny_pipeline, tmp_path):
    tiny_pipeline.quantize(QARVDConfig("w8a16"))
    tiny_pipeline.save_pretrained(tmp_path / "local")
    local = ARVDPipeline.from_pretrained(tmp_path / "local", dtype=torch.float32)
    local.set_progress_bar_config(disable=True)
    expected = local(
        "a red circle", num_chunks=1, generator=torch.Generator().manual_seed(5), output_type="latent"
    ).frames
    with FakeHub() as hub:
        environment = {**hub.environment, "HF_HOME": str(tmp_path / "home")}
        run(PUSH, str(tmp_path / "local"), environment)
        files = hub.files["user/tiny-w8a16"]
        assert {"README.md", "model_index.json", "pipeline.py", "transformer/config.json"} <= files.keys()
        card = files["README.md"].decode()
        assert 'from_pretrained("user/tiny-w8a16")' in card and "w8a16" in card and "import qarvd_diffusers" in card
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".ckpt"))]
        run(PULL, str(tmp_path / "frames.pt"), environment)
    assert torch.equal(torch.load(tmp_path / "frames.pt", weights_only=True), expected)
