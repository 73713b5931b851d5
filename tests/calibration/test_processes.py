"""Several processes under `accelerate launch` (gloo on the CPU): what one process finds, and an end that says why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qarvd_diffusers import ARVDPipeline, QARVDConfig
from qarvd_diffusers.calibration.processes import SINGLE_PROCESS, Processes

PROMPTS = ("a red circle", "a blue square moves left", "a green circle stays")
CALIBRATION = {
    "calibration_prompts": ("a green triangle", "a red square moves up", "a blue circle"),
    "calibration_chunks": 2,
}
SCHEMES = {
    "gptq": QARVDConfig("w4a8", outlier_alignment=8, **CALIBRATION),
    "sequential": QARVDConfig("w4a8", outlier_alignment=8, rounding_inputs="quantized", **CALIBRATION),
    "adaround": QARVDConfig("w4a8", outlier_alignment=8, rounding="adaround", rounding_iterations=3, **CALIBRATION),
    "reference": QARVDConfig("w4a8", reference_compat=True, rounding_iterations=3, **CALIBRATION),
    "static": QARVDConfig("w8a8", **CALIBRATION),
}

WORKER = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_processes import PROMPTS, SCHEMES
from qarvd_diffusers import ARVDPipeline
from qarvd_diffusers.calibration.processes import Processes
processes = Processes.launched()
pipe = ARVDPipeline.from_pretrained(sys.argv[2], dtype=torch.float32)
out = Path(sys.argv[3])
if sys.argv[4] == "die":
    run_pass, passes = pipe.run_pass, []
    def failing(*args, **kwargs):
        passes.append(1)
        if processes.index == 1 and len(passes) == 70:  # 40 of calibration, 25 of the first prompt
            os._exit(7) if sys.argv[5] == "exit" else sys.exit("the second process is out of memory")
        return run_pass(*args, **kwargs)
    pipe.run_pass = failing
    pipe.measure_sensitivity(SCHEMES["static"], (*PROMPTS, "a red square"), num_chunks=2, path=out / "died.json")
for name, config in SCHEMES.items():
    pipe.calibrate(config, use_cache=False, resume=out / "parts" / name).save(out / f"{name}.{processes.index}")
    if processes.is_main:
        print(sorted(path.name for path in (out / "parts" / name).iterdir()))
pipe.measure_sensitivity(SCHEMES["static"], PROMPTS, num_chunks=2, path=out / "together.json")
processes.close()
"""


def launch(folder, *arguments):
    script = folder / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(script), str(Path(__file__).parent), str(folder / "model"), str(folder), *arguments]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "QARVD_CACHE": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.fixture
def model(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("QARVD_CACHE", str(tmp_path / "cache"))
    tiny_pipeline.save_pretrained(tmp_path / "model")
    pipe = ARVDPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    return pipe


@pytest.mark.slow
def test_two_processes_find_what_one_finds(model, tmp_path):
    """To the last bit: shares are put together in the order of prompts, and every layer is rounded in one place."""
    done = launch(tmp_path, "work")
    assert done.returncode == 0, done.stderr
    for name, config in SCHEMES.items():
        want = model.calibrate(config, use_cache=False).save(tmp_path / "want").read_bytes()
        for index in range(2):
            assert (tmp_path / f"{name}.{index}").read_bytes() == want, name
    model.measure_sensitivity(SCHEMES["static"], PROMPTS, num_chunks=2, path=tmp_path / "alone.json")
    assert (tmp_path / "together.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert done.stderr.count("measuring sensitivity:   0%") == 1, "one progress bar"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exit", "error"])
def test_a_process_that_dies_ends_the_job(model, tmp_path, how):
    done = launch(tmp_path, "die", how)
    assert done.returncode != 0
    assert "rank      : 1" in done.stderr and ("exitcode  : 7" if how == "exit" else "out of memory") in done.stderr
    assert json.loads((tmp_path / "died.json").read_text())["complete"] is False, "what was measured is kept"


def test_a_lost_process_is_named():
    with (
        pytest.raises(RuntimeError, match="process 0 of 2 lost another process of this job"),
        Processes(2, 0)._together(),
    ):
        raise RuntimeError("Connection closed by peer")


def test_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Processes.launched() is SINGLE_PROCESS and SINGLE_PROCESS.is_main
    assert (
        SINGLE_PROCESS.share([1, 2]) == [1, 2] and SINGLE_PROCESS.gather(3) == [3] and SINGLE_PROCESS.from_main(4) == 4
    )
    SINGLE_PROCESS.require_same(5, "anything")
    SINGLE_PROCESS.close()


def test_shares_are_consecutive_and_whole():
    for count in (1, 2, 3, 5):
        for items in ([], [1], [1, 2, 3, 4, 5, 6, 7]):
            shares = [Processes(count, index).share(items) for index in range(count)]
            assert [item for share in shares for item in share] == items
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
