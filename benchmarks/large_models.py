"""Measure models larger than memory: host memory of converting, quantizing and loading; group offload on a GPU.

    python benchmarks/large_models.py host FOLDER --shape 14b --layers 12 --blocks-per-shard 4
    python benchmarks/large_models.py offload FOLDER --shape 14b --layers 40 --scheme w8a8

Weights are random. `host`: every step runs in its own process. Its peak is VmHWM of /proc/self/status, less what the
process held before the step (Python, torch, diffusers). Mapped file pages are included, although the kernel can
reclaim them at any time. Models are loaded onto the GPU if there is one; otherwise the loaded model is part of the
peak. `offload`: times a pass with all weights on the GPU, and with diffusers' group offload of single blocks on a
second CUDA stream.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights

from qarvd_diffusers.bench.shapes import SHAPES, Shape, random_transformer
from qarvd_diffusers.bench.timing import median_ms
from qarvd_diffusers.bench.transformer import PassRunner, quantized
from qarvd_diffusers.config import QARVDConfig
from qarvd_diffusers.conversion import convert_checkpoint, quantize_folder, to_original_keys
from qarvd_diffusers.files.safetensors import TensorSpec, write_tensors
from qarvd_diffusers.models import CausalWanTransformer3DModel
from qarvd_diffusers.quantizer import attach

STEPS = ("convert", "quantize", "load")


def write_checkpoint(folder: Path, shape: Shape, blocks_per_shard: int) -> None:
    """Write a random bfloat16 checkpoint under original names, in shards."""
    with init_empty_weights():
        model = CausalWanTransformer3DModel(
            num_attention_heads=shape.heads, ffn_dim=shape.ffn, num_layers=shape.layers
        )
    names = to_original_keys({name: name for name in model.state_dict()})
    specs = {key: TensorSpec(tuple(model.state_dict()[name].shape), torch.bfloat16) for key, name in names.items()}
    bank = 0.02 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()

    def fetch(key: str) -> torch.Tensor:
        """Return the values of a tensor."""
        count = specs[key].nbytes // 2
        return bank.repeat(-(-count // len(bank)))[:count].view(specs[key].shape)

    groups: dict[int, dict[str, TensorSpec]] = {}
    for key, spec in specs.items():
        block = int(key.split("blocks.")[1].split(".")[0]) if "blocks." in key else 0
        groups.setdefault(block // blocks_per_shard, {})[key] = spec
    folder.mkdir(parents=True)
    for index, group in groups.items():
        write_tensors(folder / f"model-{index:05d}.safetensors", group, fetch)


def memory() -> dict[str, int]:
    """Read bytes from /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        line[0][:-1]: 1024 * int(line[1]) for line in lines if line[0] in ("VmHWM:", "VmRSS:", "RssAnon:", "RssFile:")
    }


def measured(step: Callable[[], object]) -> dict[str, float]:
    """Measure seconds and peak memory of a step; the parts are sampled, and peak at different times."""
    before, peaks, done = memory(), {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def sample() -> None:
        """Keep the peaks until the step is done."""
        while not done.wait(0.005):
            now = memory()
            for part in peaks:
                peaks[part] = max(peaks[part], now[part] - before[part])

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    return {"seconds": seconds, "peak": memory()["VmHWM"] - before["VmRSS"], "before": before["VmRSS"], **peaks}


def run_step(name: str, folder: Path, scheme: str) -> dict[str, float]:
    """Run one step in this process."""
    source, model, out = folder / "original", folder / "float", folder / scheme
    if name == "convert":
        return measured(lambda: convert_checkpoint(source, model, "self-forcing"))
    if name == "quantize":
        # One candidate range instead of three takes a third of the time and the same memory.
        config = QARVDConfig(scheme, rounding="nearest", percentiles=(0.9999,))
        return measured(lambda: quantize_folder(model, out, config))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.zeros(1, device=device)
    kept = []

    def load() -> None:
        """Load the quantized model."""
        kept.append(CausalWanTransformer3DModel.from_pretrained(out / "transformer", device_map=device))

    result = measured(load)
    return result | {"device": device, "model": sum(p.nbytes for p in kept[0].parameters())}


def host(args: argparse.Namespace, shape: Shape) -> None:
    """Run every step in its own process, and print a JSON line for each."""
    folder = Path(args.folder)
    write_checkpoint(folder / "original", shape, args.blocks_per_shard)
    per_block = 2 * (8 * shape.dim**2 + 2 * shape.dim * shape.ffn)
    places = {"convert": "original", "quantize": "float/transformer", "load": f"{args.scheme}/transformer"}
    for name in STEPS:
        command = [sys.executable, __file__, "step", str(folder), "--step", name, "--scheme", args.scheme]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        result = json.loads(done.stdout.splitlines()[-1])
        shards = [file.stat().st_size for file in (folder / places[name]).glob("*.safetensors")]
        target = 1.2 * max(shards) + per_block
        figures = {"step": name, "largest_shard": max(shards), "block": per_block, "target": target} | result
        print(json.dumps(figures), flush=True)


def save_quantized(model: CausalWanTransformer3DModel, folder: Path, scheme: str) -> None:
    """Save a quantized transformer in shards of 2 GB."""
    attach(model, QARVDConfig(scheme, rounding="nearest"))
    model.save_pretrained(folder, max_shard_size="2GB")


@torch.no_grad()
def offload(args: argparse.Namespace, shape: Shape) -> None:
    """Time a pass with and without group offload, and print a JSON line for each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_transformer(shape, device, torch.bfloat16)
    if args.scheme != "bf16":
        model = quantized(model, shape, args.scheme)

    runner = PassRunner(model, shape)  # before the weights move: it creates its inputs on their device

    def measure(name: str, repeats: int = 3) -> torch.Tensor:
        """Time the pass of the third chunk; return its flow."""
        runner.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for chunk in range(3):
            flow = runner(chunk)
        result = {"name": name, "pass_ms": median_ms(lambda: runner(2), repeats, 1), "cache": runner._cache.nbytes}
        if device.type == "cuda":
            result |= {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        print(json.dumps(result), flush=True)
        return flow.float()

    fused = measure("on the GPU")
    model.fused_pass = False
    layers = measure("on the GPU, layer by layer")
    if args.scheme != "bf16":
        save_quantized(model, Path(args.folder) / args.scheme / "transformer", args.scheme)
    model.fused_pass = None
    if device.type == "cuda":
        model.to("cpu")
        model.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
            record_stream=True,
        )
        offloaded = measure("group offload on a stream")
        error = {
            "equal_to_layer_by_layer": torch.equal(offloaded, layers),
            "relative_error_to_fused": float((offloaded - fused).norm() / fused.norm()),
        }
        print(json.dumps(error), flush=True)
    if args.scheme != "bf16":
        load_quantized(args)


def load_quantized(args: argparse.Namespace) -> None:
    """Load what `save_quantized` wrote in another process, and print its peak memory."""
    command = [sys.executable, __file__, "step", args.folder, "--step", "load", "--scheme", args.scheme]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    folder = Path(args.folder) / args.scheme / "transformer"
    largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(json.dumps({"largest_shard": largest}), done.stdout.strip() or done.stderr, flush=True)


def main() -> None:
    """Run the chosen part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("host", "offload", "step"))
    parser.add_argument("folder", help="folder to work in; `host` needs three times the model's bytes on its disk")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="14b")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--blocks-per-shard", type=int, default=4)
    parser.add_argument("--scheme", default="w8a8_dynamic")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    shape = shape.with_layers(args.layers)
    if args.part == "step":
        print(json.dumps(run_step(args.step, Path(args.folder), args.scheme)))
    elif args.part == "host":
        host(args, shape)
    else:
        offload(args, shape)


if __name__ == "__main__":
    main()
