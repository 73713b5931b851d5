"""CUDA graphs of the fused pass in whole streams, under every allocator of torch: each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

ALLOCATORS = ("backend:native", "expandable_segments:True", "backend:cudaMallocAsync")

WORKER = """
import json, sys
import torch
from qarvd_diffusers import ARVDPipeline, QARVDConfig, bundled_model_path

scheme, storage = sys.argv[1:]
pipe = ARVDPipeline.from_pretrained(bundled_model_path(), dtype=torch.bfloat16).to("cuda")
pipe.set_progress_bar_config(disable=True)
prompts = ("a large red circle moving left on a navy background",)
pipe.quantize(QARVDConfig(scheme, calibration_prompts=prompts, calibration_chunks=2, rounding="nearest"))
sizes = ((64, 64), (96, 64))

def stream(size, chunks):
    generator = torch.Generator().manual_seed(1)
    return pipe.stream(prompts[0], num_chunks=chunks, width=size[0], height=size[1], generator=generator,
                       output_type="pt", kv_cache=storage)

def graphs(allowed):
    pipe.transformer._fused_pass.cuda_graphs = allowed

next(s := stream(sizes[0], 1))
s.close()
graphs(False)
expected = [[chunk.frames for chunk in stream(size, 4)] for size in sizes]
graphs(True)
equal = []
for _ in range(3):  # two shapes in turn
    running = [stream(size, 4) for size in sizes]
    for number in range(4):
        for index, one in enumerate(running):
            equal.append(torch.equal(next(one).frames, expected[index][number]))
for stop in (1, 2):  # closed in the middle, then begun again
    for index, size in enumerate(sizes):
        one = stream(size, 4)
        equal += [torch.equal(next(one).frames, expected[index][number]) for number in range(stop)]
        one.close()
free, finite = [], []
for number, chunk in enumerate(stream(sizes[0], 300)):
    finite.append(bool(torch.isfinite(chunk.frames).all()))
    if number in (50, 299):
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
captured = [one for one in pipe.transformer._fused_pass._graphs._captured.values() if one is not None]
print(json.dumps({"backend": torch.cuda.get_allocator_backend(), "equal": equal, "finite": all(finite),
                  "chunks": len(finite), "grown": free[0] - free[1], "kinds": len(captured)}))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize(("scheme", "storage"), [("w8a8", "auto"), ("w8a8", "fp8"), ("w4a8", "int8")])
def test_streams_equal_those_without_graphs(allocator, scheme, storage):
    environment = {**os.environ, "PYTORCH_ALLOC_CONF": allocator}
    command = [sys.executable, "-c", WORKER, scheme, storage]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    facts = json.loads(result.stdout.splitlines()[-1])
    assert facts["backend"] == ("cudaMallocAsync" if "Async" in allocator else "native")
    assert all(facts["equal"]) and len(facts["equal"]) == 30
    assert facts["chunks"] == 300 and facts["finite"] and facts["kinds"] == 2
    assert facts["grown"] <= 2**22
