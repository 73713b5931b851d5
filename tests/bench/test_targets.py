"""The project's performance targets, checked on the JSON that `qarvd bench --out` writes."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "targets.py"
RESULT = {
    "shape": "1.3b",
    "layers": 30,
    "frames_per_chunk": 3,
    "gemm": [{"N": 4608, "K": 1536, "us": {"fp8 tensorwise": 57.0, "dual-scale int8": 60.0}}],
    "passes": [
        {"name": "bf16-compiled", "mean_ms": 60.0},
        {"name": "w8a8", "mean_ms": 40.0},
        {"name": "w4a8", "mean_ms": 44.0},
        {"name": "torchao-fp8", "error": "not done within 45 s"},
    ],
}


def test_only_what_was_measured_is_compared():
    rows = runpy.run_path(str(SCRIPT))["check_targets"](RESULT)
    assert {row["name"]: (round(row["ratio"], 3), row["verdict"]) for row in rows} == {
        "product 4608 x 1536, of fp8 tensorwise": (0.95, "minimum"),
        "pass, w8a8, of compiled bf16": (1.5, "goal"),
        "pass, w4a8, of w8a8": (0.909, "missed"),
    }


def test_script(tmp_path):
    file = tmp_path / "bench.json"
    for layers, code, said in (
        (30, 0, "| pass, w8a8, of compiled bf16 | 1.500 | 1.150 | 1.300 | goal |"),
        (2, 2, "1.3b"),
    ):
        file.write_text(json.dumps(RESULT | {"layers": layers}))
        done = subprocess.run([sys.executable, SCRIPT, file], capture_output=True, text=True, check=False)
        assert done.returncode == code and said in done.stdout + done.stderr
