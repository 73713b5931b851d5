"""Run the node pack on a real ComfyUI server on a GPU, step by step; `test_gpu` runs the same steps.

COMFYUI_PATH=... [COMFYUI_ARGS="--front-end-root EMPTY_FOLDER"] \\
    python tests/comfyui/gpu_trial.py [--cpu | --any-flag-of-the-server]

No browser, network or front-end package is needed. One line per step shows the memory in use on the GPU and by the
process.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import comfy_server
import torch
import workflows
from comfy_server import Run, Server
from graphs import node, stream_graph
from safetensors.torch import load_file, save_file

EXAMPLES = ("quantize", "stream", "compare", "image_to_video")
KV_CACHES = ("int8", "fp8", "bf16", "auto")
STREAMS, MEASURED = 10, 5
LORA = "trial.safetensors"


class Failure(AssertionError):
    """A step did not do what it should."""


def expect(right: bool, what: str) -> None:
    if not right:
        raise Failure(what)


class Trial:
    """Steps on one running server; each raises `Failure`, or returns nothing.

    Attributes:
        server: a started one.
        source: the node that loads the quantized model; set by the step that makes it.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.source: dict[str, Any] = {}

    def say(self, step: str) -> None:
        gpu, resident = self.server.gpu_bytes / 1e6, self.server.resident_bytes / 1e6
        print(f"{step:<52} GPU {gpu:9.1f} MB   process {resident:9.1f} MB", flush=True)

    def run(self, step: str, graph: dict[str, Any]) -> Run:
        run = self.server.run(graph, timeout=1800)
        self.say(step)
        expect(run.status == "success", f"{step}: {run.error if run.of('execution_error') else run.history['status']}")
        return run

    def stream(self, step: str, seed: int, chunks: int = 3, **options: Any) -> Run:
        run = self.run(step, stream_graph(self.source, chunks=chunks, seed=seed, **options))
        expect(len(run.of("qarvd.chunk")) == chunks, f"{step}: {len(run.of('qarvd.chunk'))} of {chunks} chunks shown")
        return run

    # the steps

    def examples(self) -> None:
        """Every shipped workflow; the first one saves the quantized model that the others take."""
        nodes = self.server.get("/object_info")
        for name in EXAMPLES:
            self.run(f"example {name}", workflows.to_prompt(workflows.load(name), nodes))
        self.source = node("QARVDLoadQuantized", checkpoint="tiny-w4a8")

    def quick_model(self) -> None:
        """A quantized model without calibration, where the examples are not run."""
        graph = {
            "1": node("QARVDLoadPipeline", model="bundled: moving shapes, 64x64"),
            "2": node("QARVDQuantize", pipeline=["1", 0], scheme="w8a16"),
            "3": node("QARVDSaveQuantized", pipeline=["2", 0], name="tiny-w8a16"),
        }
        self.run("quantize without calibration", graph)
        self.source = node("QARVDLoadQuantized", checkpoint="tiny-w8a16")

    def changed_settings(self) -> None:
        """The loaded model again: another seed, another cache, another rollout."""
        self.stream("stream", 1)
        self.stream("stream, another seed", 2)
        for storage in KV_CACHES:
            self.stream(f"stream, kv_cache {storage}", 2, kv_cache=storage)
        self.stream("stream, two steps and a window", 2, timesteps="1000, 500", kv_window=6)

    def lora(self) -> None:
        """Sampler AR Video with a LoRA over quantized layers, without it, and with it again."""
        folder = self.server.base / "models" / "loras"
        folder.mkdir(exist_ok=True)
        g, key = torch.Generator().manual_seed(0), "diffusion_model.blocks.2.ffn.0"
        factors = {"lora_A": 0.3 * torch.randn(4, 256, generator=g), "lora_B": 0.3 * torch.randn(576, 4, generator=g)}
        save_file({f"{key}.{name}.weight": tensor for name, tensor in factors.items()}, folder / LORA)
        found = [self._sampled(with_lora, index) for index, with_lora in enumerate((False, True, False, True))]
        plain, changed, off, again = found
        scale = float((changed - plain).abs().mean())
        expect(scale > 0.05, f"the LoRA changes the latents by {scale:.2g} on average")
        for name, one, other in (("off", plain, off), ("on again", changed, again)):
            drift = float((one - other).abs().mean())
            expect(drift < 0.05 * scale, f"LoRA {name}: latents drift by {drift:.2g}, it changes them by {scale:.2g}")

    def _sampled(self, with_lora: bool, index: int) -> torch.Tensor:
        graph = {
            "1": self.source,
            "2": node("QARVDToModel", pipeline=["1", 0]),
            "3": node("LoraLoaderModelOnly", model=["2", 0], lora_name=LORA, strength_model=1.0),
            "4": node("QARVDEncodePrompt", pipeline=["1", 0], text="a large red circle moving left"),
        }
        model = ["3" if with_lora else "2", 0]
        graph |= {
            "5": node("BasicScheduler", model=model, scheduler="simple", steps=4, denoise=1.0),
            "6": node("CFGGuider", model=model, positive=["4", 0], negative=["4", 0], cfg=1.0),
            "7": node("EmptyARVideoLatent", width=64, height=64, length=33, batch_size=1),
            "8": node("SamplerARVideo", num_frame_per_block=3),
            "9": node("RandomNoise", noise_seed=7),
            "10": node(
                "SamplerCustomAdvanced",
                noise=["9", 0],
                guider=["6", 0],
                sampler=["8", 0],
                sigmas=["5", 0],
                latent_image=["7", 0],
            ),
            "11": node("SaveLatent", samples=["10", 0], filename_prefix=f"latents/lora{index}"),
        }
        run = self.run(f"To Model, Sampler AR Video{', LoRA' if with_lora else ''} ({index})", graph)
        entry = run.history["outputs"]["11"]["latents"][0]
        return load_file(self.server.base / "output" / entry["subfolder"] / entry["filename"])["latent_tensor"].float()

    def freed(self) -> None:
        """Unloaded models leave the GPU, and the next run loads them again."""
        self.stream("stream before /free", 11)
        loaded = self.server.gpu_bytes
        self.server.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(3)
        self.say("after /free")
        expect(self.server.gpu_bytes <= loaded, "the GPU holds more after /free than before")
        self.stream("stream after /free", 12)  # 0.3.75 keeps results, and would give the first again

    def interrupted(self) -> None:
        """The stop button in a long stream; the next run works."""
        run = self.server.submit(stream_graph(self.source, chunks=300, seed=21))
        end = time.monotonic() + 120
        while not run.of("qarvd.chunk"):
            expect(time.monotonic() < end and not run.of("execution_error"), "no chunk came within two minutes")
            time.sleep(0.05)
        self.server.post("/interrupt", {})
        self.server.wait(run)
        self.say("interrupted")
        expect(bool(run.of("execution_interrupted")), "the run was not interrupted")
        self.stream("stream after an interruption", 22)

    def flat_memory(self) -> None:
        """Ten streams; in the last five neither the GPU's memory nor the process's moves by more than 2 %.

        On a CPU, malloc takes and gives back arenas of its own accord. There the least that the process holds in the
        last five streams may not be more than in the first five: a leak raises that, too.
        """
        gpu, process = [], []
        for index in range(STREAMS):
            self.stream(f"stream {index + 1} of {STREAMS}", 100 + index)
            gpu.append(self.server.gpu_bytes)
            process.append(self.server.resident_bytes)
        if any(gpu):
            ranges = {"the GPU": gpu[-MEASURED:], "the process": process[-MEASURED:]}
        else:
            before, after = min(process[:-MEASURED]), min(process[-MEASURED:])
            ranges = {"the process": [min(before, after), after]}  # to fall is not to grow
        for name, values in ranges.items():
            low, high = min(values), max(values)
            moved = f"memory of {name} moves between {low / 1e6:.1f} and {high / 1e6:.1f} MB"
            expect(high - low <= 0.02 * high, moved)


STEPS = ("examples", "changed_settings", "lora", "freed", "interrupted", "flat_memory")


def refusal(step: str, server: Server) -> str | None:
    """Why this ComfyUI cannot do a step."""
    if step == "lora" and server.version < (0, 27):
        version = ".".join(map(str, server.version))
        return f"ComfyUI {version} has no causal Wan model; set COMFYUI_PATH to one of 0.27 or later"
    return None


def attempt(trial: Trial, step: str) -> bool:
    """One step, with a line on how it ended; a server that died is told of, and started again."""
    reason = refusal(step, trial.server)
    if reason is not None:
        print(f"SKIPPED {step}: {reason}", flush=True)
        return True
    try:
        getattr(trial, step)()
    except (AssertionError, OSError) as error:
        log = trial.server.log.read_text(encoding="utf-8", errors="replace")
        print(f"FAILED {step}: {error}\n{log[-3000:]}", flush=True)
        if not trial.server.is_running:
            trial.server.start()
        return False
    print(f"passed {step}", flush=True)
    return True


def main(flags: list[str]) -> int:
    """All steps one after the other; returns how many failed."""
    with tempfile.TemporaryDirectory() as base:
        server = Server(comfy_server.find_tree(Path(base)), Path(base) / "server", flags=flags)
        server.start()
        trial = Trial(server)
        try:
            trial.say(f"ComfyUI {'.'.join(map(str, server.version))} {' '.join(flags)} is up")
            return sum(not attempt(trial, step) for step in STEPS)
        finally:
            server.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
