"""Two processes that make one stream (gloo on the CPU) get the latents that one process gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ContextParallelConfig
from tiny_wan import make_wan

from qarvd_diffusers.calibration.calibrate import calibrate
from qarvd_diffusers.config import QARVDConfig
from qarvd_diffusers.models import CausalWanTransformer3DModel, KVCache
from qarvd_diffusers.quantization.install import apply

TESTS = Path(__file__).parent.parent

# Passes: (scheme, fused kernels, size of a frame, timesteps, arguments of the cache). A frame of 4 x 4 has 4 tokens,
# so that two processes share the middle one of 3; 6 x 6 makes 27 tokens, which two processes cannot share evenly.
ROLL_OUTS = {
    "float": (None, False, 4, (700.0, 0.0), {}),
    "uneven": (None, False, 6, (700.0, 0.0), {}),
    "compiled": (None, False, 6, (700.0, 0.0), {}),
    "timesteps per frame": (None, False, 6, ((700.0, 500.0, 20.0),), {}),
    "window": (None, False, 4, (700.0, 0.0), {"local_attention_frames": 6, "sink_frames": 3}),
    "window positions": (
        None,
        False,
        4,
        (700.0, 0.0),
        {"local_attention_frames": 6, "sink_frames": 3, "rope_mode": "window", "sink_ema": 0.99},
    ),
    "int8 cache": (None, False, 4, (700.0, 0.0), {"storage": "int8"}),
    "w8a8": ("w8a8", False, 4, (700.0, 0.0), {}),
    "w4a16": ("w4a16", False, 6, (700.0, 0.0), {}),
    "w8a8_dynamic": ("w8a8_dynamic", False, 6, (700.0, 0.0), {}),
    "w8a8 fused": ("w8a8", True, 6, (700.0, 0.0), {}),
    "w8a8 fused, timesteps per frame": ("w8a8", True, 6, ((700.0, 500.0, 20.0),), {}),
    "w8a8 fused, window": ("w8a8", True, 4, (700.0, 0.0), {"local_attention_frames": 6, "sink_frames": 3}),
    "w8a8 fused, fp8 cache": ("w8a8", True, 4, (700.0, 0.0), {"storage": "fp8"}),
    "world": ("world", False, 6, (700.0, 0.0), {}),
    "world, w8a8 fused, int8 cache": ("world w8a8", True, 6, (700.0, 0.0), {"storage": "int8"}),
    "w8a8 fused, int8 cache": ("w8a8", True, 4, (700.0, 0.0), {"storage": "int8"}),
}


def build(scheme):
    if scheme is not None and scheme.startswith("world"):
        from test_world import quantized, world

        return quantized(scheme.removeprefix("world ")) if scheme != "world" else world()
    model = CausalWanTransformer3DModel.from_transformer(make_wan())
    if scheme is not None:
        config = QARVDConfig(scheme, calibration_chunks=1, rounding="nearest", outlier_alignment=4)

        def run(on_pass):
            from tiny_wan import make_run

            make_run(model)(on_pass)

        apply(model, calibrate(model, run, config))
    return model


@torch.no_grad()
def roll_out(model, fused, size, timesteps, cache, batch=2):
    """Flows of every pass over three chunks."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(batch, model.config.in_channels, 9, size, size, generator=generator)
    text = torch.randn(batch, 6, 24, generator=generator)
    controls = torch.randn(1, 384, 9, size, size, generator=generator)
    model.fused_pass = fused
    kv_cache, flows = KVCache(len(model.blocks), **cache), []
    for offset in (0, 3, 6):
        for timestep in timesteps:
            t = torch.as_tensor(timestep)
            t = t.expand(batch) if t.ndim == 0 else t.expand(batch, 3)
            piece = latents[:, :, offset : offset + 3]
            steer = {"controls": controls[:, :, offset : offset + 3]} if "control_dim" in model.config else {}
            flows.append(model(piece, t, text, kv_cache=kv_cache, frame_offset=offset, return_dict=False, **steer)[0])
    return torch.stack(flows), kv_cache


def all_roll_outs(prepare=lambda model: None):
    flows = {}
    for name, (scheme, *rest) in ROLL_OUTS.items():
        model = build(scheme)
        prepare(model)
        if name == "compiled":  # the exchanges do not break the graph of a block
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
        flows[name], cache = roll_out(model, *rest)
        flows[f"{name}/key"] = cache.visible(1)[0]
    return flows


WORKER = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
torch.set_num_threads(1)
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/models"]
import test_context_parallel as tests
dist.init_process_group("gloo")
rank, out = dist.get_rank(), Path(sys.argv[2])
config = lambda degree=2: ContextParallelConfig(ulysses_degree=degree)
torch.save(tests.all_roll_outs(lambda model: model.enable_parallelism(config=config())), out / f"flows.{rank}.pt")

def message(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)

def other(what):
    model = tests.build(None)
    model.enable_parallelism(config=config())
    torch.manual_seed(rank if what == "latents" else 0)
    latents = torch.randn(1, 4, 3, 4, 4)
    torch.manual_seed(rank if what == "text" else 0)
    with torch.no_grad():
        model(latents, torch.zeros(1), torch.randn(1, 6, 24), kv_cache=tests.KVCache(2))

model = tests.build(None)
model.enable_parallelism(config=config())
errors = {
    "latents": message(lambda: other("latents")),
    "text": message(lambda: other("text")),
    "degree": message(lambda: tests.build(None).enable_parallelism(config=config(4))),
    "ring": message(lambda: tests.build(None).enable_parallelism(config=ContextParallelConfig(ring_degree=2))),
    "twice": message(lambda: model.enable_parallelism(config=config())),
    "no cache": message(lambda: model(torch.randn(1, 4, 3, 4, 4), torch.zeros(1), torch.randn(1, 6, 24))),
}
(out / f"errors.{rank}.json").write_text(json.dumps(errors))
dist.destroy_process_group()
"""


def run_together(script, *arguments, processes=2):
    """Start `script` as `torchrun` does, without a GPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "worker.py").write_text(WORKER)
    run_together(folder / "worker.py", TESTS, folder)
    return folder


@pytest.fixture(scope="module")
def alone():
    return all_roll_outs()


@pytest.mark.slow
@pytest.mark.parametrize("name", ROLL_OUTS)
def test_two_processes_get_what_one_gets(together, alone, name):
    """Rounding aside: sums over tokens and heads run in another order nowhere, matrix products over fewer rows may."""
    for rank in range(2):
        flows = torch.load(together / f"flows.{rank}.pt", weights_only=True)
        torch.testing.assert_close(flows[name], alone[name], rtol=0, atol=1e-4)
        assert alone[name].std() > 0.1, "the tolerance means something"
        heads = alone[f"{name}/key"].tensor_split(2, dim=2)
        torch.testing.assert_close(flows[f"{name}/key"], heads[rank], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_errors_name_what_is_wrong(together):
    for rank in range(2):
        errors = json.loads((together / f"errors.{rank}.json").read_text())
        assert "differ in their latents:" in errors["latents"] and "same seed" in errors["latents"]
        assert "differ in their prompt embeddings:" in errors["text"]
        assert "2 attention heads" in errors["degree"] and "ulysses_degree of 2" in errors["degree"]
        assert "ring_degree is 2" in errors["ring"]
        assert "called before" in errors["twice"]
        assert "kv_cache" in errors["no cache"]


def test_one_process_is_told_to_start_several():
    with pytest.raises(RuntimeError, match="torchrun --nproc-per-node 2"):
        build(None).enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


def test_heads_must_be_divisible():
    with pytest.raises(ValueError, match="2 attention heads cannot be divided among 3 processes"):
        build(None).enable_parallelism(config=ContextParallelConfig(ulysses_degree=3))
