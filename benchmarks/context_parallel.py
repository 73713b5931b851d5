"""Compare one stream on one GPU and on all GPUs of a job: time of a chunk, and difference of the latents.

    torchrun --nproc-per-node 2 benchmarks/context_parallel.py --shape 14b:20 1.3b --variants bf16 w8a8 w8a8-fp8 \\
        --out runs/context_parallel.json

Weights are random and the same in every process; videos have 832 x 480 pixels and chunks of 3 latent frames. A chunk
is 4 denoising passes and a refresh pass, timed at the last of 7 chunks, whose cache holds 21 latent frames. `--equal`
compares the latents of two chunks of a stream in float32 with few layers. A variant is a scheme and the storage of the
K/V cache (`w8a8-fp8`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

from qarvd_diffusers.bench.breakdown import breakdown
from qarvd_diffusers.bench.shapes import SHAPES, Shape, random_inputs, random_transformer
from qarvd_diffusers.bench.transformer import PassRunner, quantized
from qarvd_diffusers.models import CausalWanTransformer3DModel
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline

CHUNKS, PASSES = 7, 4


def on_all(model: CausalWanTransformer3DModel) -> CausalWanTransformer3DModel:
    """Split the model's tokens over all processes."""
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
    return model


def share_weights(model: CausalWanTransformer3DModel) -> None:
    """Copy the first process's weights to all."""
    for tensor in model.parameters():
        dist.broadcast(tensor.data.view(torch.uint8), 0)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU and for the other processes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def time_chunk(model: CausalWanTransformer3DModel, shape: Shape, storage: str, repeats: int) -> dict:
    """Time the last chunk and one of its passes: medians in milliseconds, by the slowest process."""
    device = next(model.parameters()).device
    runner = PassRunner(model, shape, storage)
    for chunk in range(CHUNKS):
        runner(chunk)
    timed: dict[str, list[float]] = {"chunk_ms": [], "pass_ms": []}
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(PASSES):
            runner(CHUNKS - 1)
        runner(CHUNKS - 1, cache_only=True)
        synchronize(device)
        timed["chunk_ms"].append(1000 * (time.perf_counter() - start))
        start = time.perf_counter()
        runner(CHUNKS - 1)
        synchronize(device)
        timed["pass_ms"].append(1000 * (time.perf_counter() - start))
    result = {name: statistics.median(times) for name, times in timed.items()}
    result["flow"] = runner(CHUNKS - 1).float()
    result["cache_bytes"] = runner._cache.nbytes
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
        rows = breakdown(lambda: runner(CHUNKS - 1), shape, CHUNKS - 1, storage == "fp8")
        # `floor_ms` is left out: it is that of one GPU.
        result["operations"] = [{key: row[key] for key in ("operation", "calls", "ms")} for row in rows]
    return result


def compare_times(model: CausalWanTransformer3DModel, name: str, shape: Shape, repeats: int) -> dict:
    """Compare every process alone, at the same time on its own GPU, with all together."""
    scheme, _, storage = name.partition("-")
    if scheme == "bf16":
        if model.device.type == "cuda":
            model.set_attention_backend("_native_cudnn")
    else:
        model = quantized(model, shape, scheme)
        share_weights(model)
    one = time_chunk(model, shape, storage or "auto", repeats)
    together = time_chunk(on_all(model), shape, storage or "auto", repeats)
    model.context_parallel = model._parallel_config = None  # the next variant starts from this model
    flow, other = one.pop("flow"), together.pop("flow")
    error = float((flow - other).norm() / flow.norm())
    return {"variant": name, "one": one, "together": together, "relative_error": error} | {
        "speedup": one["chunk_ms"] / together["chunk_ms"]
    }


@torch.no_grad()
def compare_latents(shape: Shape, scheme: str, device: torch.device, layers: int = 2) -> dict:
    """Compute the largest difference of the latents of two chunks in float32, all processes against one."""
    small = shape.with_layers(layers)
    model = random_transformer(small, device, torch.float32)
    if scheme != "float":
        model = quantized(model.to(torch.bfloat16), small, scheme)
        share_weights(model)
        model = model.float()
    if device.type == "cuda":
        model.set_attention_backend("native")  # a variant sets the backend of the whole process
    latents, text = random_inputs(small, device, torch.float32)

    def stream() -> torch.Tensor:
        """Generate two chunks."""
        pipe = ARVDPipeline(transformer=model)
        pipe.set_progress_bar_config(disable=True)
        noise = {
            "latents": torch.cat([latents, latents.flip(2)], dim=2),
            "generator": torch.Generator().manual_seed(2),
        }
        chunks = pipe.stream(prompt_embeds=text, output_type="latent", **noise)
        return torch.cat([chunk.latents for chunk in chunks], dim=2)

    alone = stream()
    on_all(model)
    together = stream()
    error = (together - alone).abs().max()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return {"scheme": scheme, "layers": layers, "largest_difference": float(error), "std": float(alone.std())}


def time_exchange(shape: Shape, device: torch.device) -> dict:
    """Time the two exchanges of a block alone, in microseconds."""
    parallel = dist.get_world_size()
    rows = 4680 // parallel
    times = {}
    for name, width in (("to_heads", 3 * shape.dim), ("to_tokens", shape.dim)):
        sent = torch.randn(parallel * rows, width // parallel, device=device).to(torch.bfloat16)
        got = torch.empty_like(sent)
        for repeats in (5, 50):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats):
                dist.all_to_all_single(got, sent)
            synchronize(device)
            times[name] = 1e6 * (time.perf_counter() - start) / repeats
    return times


def main() -> None:
    """Measure every shape and variant; the first process prints a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", nargs="+", default=["14b"], help="names of shapes; 14b:20 has 20 blocks instead of 40"
    )
    parser.add_argument("--variants", nargs="*", default=["bf16", "w8a8", "w8a8-fp8"])
    parser.add_argument("--equal", nargs="*", default=["float", "w8a8"], help="schemes whose latents are compared")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=120))
    results: list[dict] = []

    def report(result: dict) -> None:
        """Print a result without its details, and write all results."""
        results.append(result)
        if dist.get_rank() == 0:
            shown = {key: value for key, value in result.items() if key not in ("one", "together")}
            shown |= {
                key: {name: value for name, value in result[key].items() if name != "kernels"}
                for key in ("one", "together")
                if key in result
            }
            print(json.dumps(shown), flush=True)
            if args.out:
                with open(args.out, "w", encoding="utf-8") as file:
                    json.dump(results, file, indent=1)

    for wanted in args.shape:
        name, _, layers = wanted.partition(":")
        shape = SHAPES[name]
        shape = shape.with_layers(int(layers or shape.layers))
        report({"shape": name, "exchange_us": time_exchange(shape, device)})
        model = random_transformer(shape, device, torch.bfloat16) if args.variants else None
        work = [partial(compare_times, model, variant, shape, args.repeats) for variant in args.variants]
        for step in [*work, *(partial(compare_latents, shape, scheme, device) for scheme in args.equal)]:
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                report({"shape": name, "layers": shape.layers} | step())
            except (RuntimeError, ValueError) as error:
                report({"shape": name, "failed": str(step.args[1:]), "error": repr(error)})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
