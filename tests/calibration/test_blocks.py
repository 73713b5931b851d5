"""Rounding block by block: better than nearest, the same in stages or at once, and the same after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_wan import CHUNKS, make_run, make_wan

from qarvd_diffusers.calibration import blocks
from qarvd_diffusers.calibration.calibrate import calibrate
from qarvd_diffusers.calibration.resume import ResumeFolder
from qarvd_diffusers.config import QARVDConfig
from qarvd_diffusers.quantization.install import apply


def config_of(scheme="w4a8", **options):
    return QARVDConfig(
        scheme, **{"outlier_alignment": 4, "calibration_chunks": CHUNKS, "rounding_iterations": 60, **options}
    )


def forward(model):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        x, text = torch.randn(1, 4, 3, 4, 4, generator=g), torch.randn(1, 6, 24, generator=g)
        return model(x, torch.tensor([500.0]), text).sample


def quantized_error(config):
    wan = make_wan()
    want, before = forward(wan), {name: tensor.clone() for name, tensor in wan.state_dict().items()}
    modules = dict(wan.named_modules())
    result = calibrate(wan, make_run(wan, prompts=3), config)
    assert all(module is modules[name] for name, module in wan.named_modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in wan.state_dict().items())
    apply(wan, result)
    return ((forward(wan) - want).norm() / want.norm()).item()


@pytest.mark.parametrize("scheme", ("w4a8", "w4a16"))
def test_gptq_beats_nearest(scheme):
    nearest = quantized_error(config_of(scheme, rounding="nearest"))
    assert quantized_error(config_of(scheme)) < 0.85 * nearest
    assert quantized_error(config_of(scheme, rounding_inputs="quantized")) < 0.85 * nearest


def test_adaround_beats_nearest():
    nearest = quantized_error(config_of(rounding="nearest"))
    assert quantized_error(config_of(rounding="adaround")) < nearest


def same(a, b):
    return all(
        torch.equal(tensor, b.layers[name].tensors()[key])
        for name in a.layers
        for key, tensor in a.layers[name].tensors().items()
    )


def test_stages_do_not_change_the_result(monkeypatch):
    """One block at a time, or all at once: the statistics are the same."""
    runs = []

    def counted(on_pass, wan):
        runs.append(1)
        make_run(wan)(on_pass)

    results = []
    for budget in (2**40, 0):
        monkeypatch.setattr(blocks, "CAPTURE_BYTES", budget)
        wan = make_wan()
        results.append(calibrate(wan, lambda on_pass, wan=wan: counted(on_pass, wan), config_of()))
    assert same(*results)
    assert len(runs) == (2 + 1) + (2 + 3)  # ranges, then: all at once; the text embedding and two blocks


def test_callers_in_inference_mode():
    with torch.inference_mode():
        wan = make_wan()
        got = [
            calibrate(wan, make_run(wan), config_of(rounding=rounding, rounding_iterations=3))
            for rounding in ("gptq", "adaround")
        ]
    wan = make_wan()
    want = calibrate(wan, make_run(wan), config_of())
    assert same(got[0], want) and not same(got[1], want)


def test_skipped_layers_are_rounded_to_nearest():
    def results(**options):
        wan = make_wan()
        return calibrate(wan, make_run(wan), config_of(**options)).layers

    nearest = results(rounding="nearest")
    for layers in (
        results(rounding_skips=("attn2", "text_embedder")),
        results(reference_compat=True, tie_inputs=False),
    ):
        assert not torch.equal(
            layers["blocks.0.attn1.to_q"].weight_packed, nearest["blocks.0.attn1.to_q"].weight_packed
        )
    skipped = results(rounding_skips=("attn2", "text_embedder"))
    for name, layer in skipped.items():
        if "attn2" in name or "text_embedder" in name:
            assert torch.equal(layer.weight_packed, nearest[name].weight_packed)


def test_progress_shows_the_loss():
    wan, seen = make_wan(), []
    config = config_of(
        rounding="adaround", rounding_iterations=5, modules_to_not_convert=("blocks.1", "text_embedder")
    )
    calibrate(wan, make_run(wan), config, lambda *step: seen.append(step))
    rounding = [step for step in seen if step[0].startswith("rounding blocks.0.attn1.to_q, loss ")]
    assert [step[1:] for step in rounding] == [(i, 5) for i in range(1, 6)]


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
from tiny_wan import CHUNKS, make_run, make_wan
from qarvd_diffusers.calibration.calibrate import calibrate
from qarvd_diffusers.calibration.resume import ResumeFolder
from qarvd_diffusers.config import QARVDConfig
torch.set_num_threads(1)
config = QARVDConfig(
    "w4a8", outlier_alignment=4, calibration_chunks=CHUNKS, rounding="adaround", rounding_iterations=4
)
wan = make_wan(layers=1)
slow = lambda *step: time.sleep(float(sys.argv[4]))
calibrate(wan, make_run(wan), config, slow, ResumeFolder(sys.argv[2], "one")).save(sys.argv[3])
"""


def start(folder, result, pause):
    arguments = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent.parent), str(folder), str(result), str(pause)]
    return subprocess.Popen(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_killed_and_resumed_is_byte_identical(tmp_path):
    assert start(tmp_path / "whole", tmp_path / "want", 0).wait(120) == 0
    for parts in (3,):  # killed somewhere inside the next part
        process = start(tmp_path / "killed", tmp_path / "got", 0.02)
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "killed").glob("*.safetensors"))) < parts and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (tmp_path / "got").exists()
    assert start(tmp_path / "killed", tmp_path / "got", 0).wait(120) == 0
    assert (tmp_path / "got").read_bytes() == (tmp_path / "want").read_bytes()


def test_a_folder_of_another_calibration_is_refused_and_stays(tmp_path):
    wan = make_wan()
    result = calibrate(wan, make_run(wan), config_of(), folder=ResumeFolder(tmp_path / "a", "one"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(ValueError, match="holds a calibration of another model, config or prompts"):
        ResumeFolder(tmp_path / "a", "two")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == files

    def never(on_pass):
        raise AssertionError("everything is there already")

    assert same(calibrate(make_wan(), never, config_of(), folder=ResumeFolder(tmp_path / "a", "one")), result)
    (tmp_path / "a" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is not the manifest"):
        ResumeFolder(tmp_path / "a", "one")


def test_an_error_leaves_the_folder_usable(tmp_path):
    wan = make_wan()

    def broken(on_pass):
        if (tmp_path / "a" / "ranges.safetensors").exists():
            wan.blocks[1].norm2.bias.data[0] = torch.nan
        make_run(wan)(on_pass)

    with pytest.raises(ValueError, match=r"input of blocks.1.attn2.to_q holds NaN"):
        calibrate(wan, broken, config_of(rounding_inputs="quantized"), folder=ResumeFolder(tmp_path / "a", "one"))
    assert (tmp_path / "a" / "blocks.0.attn1.to_q.safetensors").exists()
    wan = make_wan()
    config = config_of(rounding_inputs="quantized")
    got = calibrate(wan, make_run(wan), config, folder=ResumeFolder(tmp_path / "a", "one"))
    wan = make_wan()
    assert same(got, calibrate(wan, make_run(wan), config))


def test_a_full_disk_is_named_and_leaves_the_folder_usable(tmp_path):
    resource = pytest.importorskip(
        "resource", reason="run it on Linux or macOS"
    )  # a limit on file sizes stands in for the full disk
    config = config_of(modules_to_not_convert=("blocks.1", "text_embedder"))
    wan, before = make_wan(), resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = ResumeFolder(tmp_path / "a", "one")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"ranges.safetensors could not be written"):
            calibrate(wan, make_run(wan), config, folder=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in folder.path.iterdir()] == ["manifest.json"]
    assert same(calibrate(wan, make_run(wan), config, folder=folder), calibrate(wan, make_run(wan), config))
