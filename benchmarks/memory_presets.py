"""Check a memory preset by limiting the allocator to it: from loading to the last chunk, with a change of prompt.

    python benchmarks/memory_presets.py make FOLDER
    python benchmarks/memory_presets.py measure FOLDER --memory 8GB --chunks 7

`make` writes a pipeline of real sizes: the 1.3B shape with random weights, quantized without data, Wan's VAE, and a
text encoder of the shape of umt5-xxl. Only the first rows of the encoder's tensors are random; the rest of the file is
sparse. `measure` loads a folder under a preset, on a GPU whose allocator is limited to what the preset leaves it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from qarvd_diffusers import ARVDPipeline, QARVDConfig, bundled_model_path
from qarvd_diffusers.bench.shapes import SHAPES, random_transformer
from qarvd_diffusers.bench.vae import random_vae
from qarvd_diffusers.memory.plan import RESERVE, choose, parse_budget
from qarvd_diffusers.memory.shapes import ModelShapes

ENCODER = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
RANDOM_BYTES = 1 << 20


def write_text_encoder(folder: Path, **sizes: int) -> None:
    """Write config and bfloat16 weights of a UMT5 encoder."""
    config = UMT5Config(feed_forward_proj="gated-gelu", architectures=["UMT5EncoderModel"], **sizes)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = {
            k: v for k, v in UMT5EncoderModel(config).state_dict().items() if k != "encoder.embed_tokens.weight"
        }
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = offset + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + offset)
        for name, tensor in tensors.items():
            count = min(tensor.numel(), RANDOM_BYTES // 2)
            values = torch.ones(count) if tensor.ndim == 1 else torch.randn(count) * 0.02
            file.seek(start + header[name]["data_offsets"][0])
            file.write(values.bfloat16().view(torch.uint8).numpy().tobytes())


def make(folder: Path, shape_name: str) -> None:
    """Write the pipeline."""
    shape, device = SHAPES[shape_name], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    large = shape.heads > 1
    pipe = ARVDPipeline(
        transformer=random_transformer(shape, device, torch.bfloat16),
        vae=random_vae(shape, device, torch.bfloat16),
        tokenizer=AutoTokenizer.from_pretrained(Path(bundled_model_path()) / "tokenizer"),
        height=480 if large else 32,
        width=832 if large else 48,
        local_attention_frames=21,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.quantize(QARVDConfig("w8a8_dynamic"))
    pipe.save_pretrained(folder)
    encoder = folder / "text_encoder"
    encoder.mkdir(exist_ok=True)
    small = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 256384}
    write_text_encoder(encoder, **(ENCODER if large else small))
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["text_encoder"] = ["transformers", "UMT5EncoderModel"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def peaks(cuda: bool) -> dict[str, int]:
    """Read the peak memory of the allocator, and the memory that is used on the device."""
    if not cuda:
        return {"allocated": 0, "reserved": 0, "device": 0}
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "device": total - free,  # now, of all processes, including the memory of CUDA itself
    }


def measure(folder: Path, memory: str, chunks: int) -> dict[str, Any]:
    """Load and stream under a preset; return the plan and the measured peaks."""
    cuda, budget = torch.cuda.is_available(), parse_budget(memory)
    plan = choose(ModelShapes.read(folder), memory)
    result: dict[str, Any] = {"memory": memory, "choice": str(plan.choice), "planned": dict(plan.phases)}
    if cuda and budget is not None:
        torch.cuda.set_per_process_memory_fraction((budget - RESERVE) / torch.cuda.mem_get_info()[1])
    start = time.perf_counter()
    pipe = ARVDPipeline.from_pretrained(folder, memory=memory, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    result["loading"] = {"seconds": time.perf_counter() - start, **peaks(cuda)}
    seconds = []
    with pipe.stream("a red circle moves left", num_chunks=chunks, output_type="pt") as stream:
        for chunk in stream:
            seconds.append(round(chunk.seconds, 3))
            result["first chunk" if chunk.index == 0 else "stream"] = peaks(cuda)
            if chunk.index == chunks - 2:
                result["before the change of prompt"] = peaks(cuda)
                stream.set_prompt("a blue square moves right")
    result["chunk_seconds"] = seconds
    if cuda:
        result["planned / allocated"] = plan.allocated / torch.cuda.max_memory_allocated()
    return result


def main() -> None:
    """Make a pipeline, or measure one and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("make", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="1.3b")
    parser.add_argument("--memory", default="8GB")
    parser.add_argument("--chunks", type=int, default=7)
    args = parser.parse_args()
    if args.step == "make":
        shutil.rmtree(args.folder, ignore_errors=True)
        make(args.folder, args.shape)
    else:
        print(json.dumps(measure(args.folder, args.memory, args.chunks), indent=2))


if __name__ == "__main__":
    main()
