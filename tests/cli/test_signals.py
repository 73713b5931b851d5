"""SIGTERM ends a command as ctrl-C does: no traceback, nothing half-written, and the next run continues."""

import os
import signal
import subprocess
import sys
import time

import pytest

from qarvd_diffusers import bundled_model_path


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGTERM that a process can handle")
@pytest.mark.parametrize(("number", "code"), ((signal.SIGTERM, 143), (signal.SIGINT, 130)))
def test_a_signal_ends_a_command_cleanly(number, code, tmp_path):
    command = [sys.executable, "-m", "qarvd_diffusers", "quantize", bundled_model_path(), tmp_path / "out"]
    environment = {**os.environ, "QARVD_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen([*command, "--scheme", "w8a8"], stderr=subprocess.PIPE, env=environment)
    unfinished = tmp_path / "cache" / "unfinished"
    deadline = time.monotonic() + 120
    while not unfinished.is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code and b"Traceback" not in errors, errors[-2000:]
    assert not (tmp_path / "out").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
