"""ComfyUI's own model patchers around our layers: LoRAs, what is counted, kept and moved, and what does not fit."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import comfy_server
import pytest

pytestmark = pytest.mark.slow

KINDS = ("static", "dynamic")


@pytest.fixture(scope="module")
def report(comfy_tree):
    """What `patcher_trial.py` found inside ComfyUI."""
    script = Path(__file__).with_name("patcher_trial.py")
    run = subprocess.run(
        [comfy_server.python(), str(script), str(comfy_tree)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    if "ModuleNotFoundError" in run.stderr and str(comfy_tree) in run.stderr:
        pytest.skip(
            f"this ComfyUI needs more: {run.stderr.strip().splitlines()[-1]}; pip install -r its requirements.txt"
        )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def current(report):
    """The report of a ComfyUI that has both patchers and a causal Wan model."""
    if report["missing"]:
        pytest.skip(f"this ComfyUI has no {', '.join(report['missing'])}; COMFYUI_PATH may name one of 0.33 or later")
    return report


@pytest.fixture
def patched(current, request):
    return current[request.param]


both = pytest.mark.parametrize("patched", KINDS, indirect=True)


@both
def test_patches_change_what_they_change_in_the_dequantized_weight(patched):
    """LoRAs of any strength, one or several, with and without rescaling, biases, merges; on, off and on again."""
    assert set(patched["effects"]) >= {"one", "negative", "several", "scaled", "dora", "bias", "merged", "one again"}
    for name, (error, change) in patched["effects"].items():
        assert error < 1e-5 < 1e-3 < change, name


@both
def test_no_float_copy_of_a_weight_is_kept_and_packed_bytes_count(patched):
    assert patched["float backups"] == []
    assert patched["bytes"] == patched["own bytes"]
    assert patched["left after unloading"] == 0


@both
def test_core_savers_are_refused_with_the_node_to_use(patched):
    assert "Q-ARVD Save Quantized" in patched["save"].splitlines()[1]
    assert patched["saved"] == []


def test_the_right_patcher_was_asked(current):
    assert [current[kind]["class"] for kind in KINDS] == ["ModelPatcher", "ModelPatcherDynamic"]


def test_a_whole_model_with_loras_is_the_dequantized_one_with_them(current):
    assert current["whole model"] < 1e-5


def test_layers_that_were_left_elsewhere_compute_where_their_input_is(current):
    part = current["part"]
    assert part["on the device"] and part["elsewhere"]
    assert part["computed"] == ["meta", "cpu"] and part["then"] == ["cpu"]


def test_a_component_is_loaded_whole_under_the_name_of_its_pipeline(report):
    """With half the room it takes, by whichever patcher this ComfyUI prefers."""
    assert report["whole"] == {
        "name": "vae of tiny w8a16",
        "dynamic": False,
        "loaded": ["meta"],
        "inference tensors": 0,
        "given back in part": 0,
        "still loaded": ["meta"],
    }


def test_what_does_not_fit_is_refused_in_two_lines(report):
    small, out_of_memory = (text.splitlines() for text in report["refused"])
    assert (
        small[0].startswith("transformer (0.00767 GB) and vae (") and "only 0.001 GB can be made available" in small[0]
    )
    assert small[1].startswith("Quantize it to w4a8")
    assert out_of_memory[0].startswith("vae (") and out_of_memory[1].startswith("Free memory")
    assert len(small) == len(out_of_memory) == 2


def test_a_text_encoder_without_room_works_layer_by_layer(report):
    assert report["text encoder"] == {"offload": "stream", "difference": 0.0}
