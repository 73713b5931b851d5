"""Damaged files of every kind: the same result, what an unsealed file says, or an error that names the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz_files.py"
NEVER = ("raw", "silent", "hang", "memory")


@pytest.mark.slow
def test_no_damaged_file_is_taken_for_another(tmp_path):
    """500 of them, `--seed` and number of a bad one repeat it."""
    out = tmp_path / "outcomes.json"
    command = [sys.executable, SCRIPT, "--count", "500", "--seed", "17", "--jobs", "2", "--out", out]
    subprocess.run(command, check=False, capture_output=True)
    outcomes = json.loads(out.read_text(encoding="utf-8"))
    assert sum(sum(counts.values()) for counts in outcomes["counts"].values()) == 500
    assert not [each for each in outcomes["bad"] if each["outcome"] in NEVER]
