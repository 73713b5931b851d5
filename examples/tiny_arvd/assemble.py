"""Put the trained parts into one folder that `ARVDPipeline.from_pretrained` loads (weights in bfloat16).

The text encoder, 0.3 MB, stays in float32: transformers loads a model in the type it is stored in.

    python assemble.py --vae runs/tiny_arvd/vae --transformer runs/tiny_arvd/transformer --out tiny_arvd
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from causal import CHUNK_FRAMES, DENOISING_TIMESTEPS, LOCAL_ATTENTION_FRAMES, SINK_FRAMES, TIMESTEP_SHIFT
from diffusers import AutoencoderKLWan
from text import MAX_SEQUENCE_LENGTH, build_tokenizer
from train_transformer import CONFIG, Generator, load_tensors

from qarvd_diffusers import ARVDPipeline
from qarvd_diffusers.evaluation.moving_shapes import FRAME_SIZE


def load_generator(folder: Path) -> Generator:
    """The averaged weights of a training checkpoint, float32."""
    tensors = load_tensors(folder)
    model = Generator(CONFIG, len(build_tokenizer()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors["ema." + name])
    return model.eval().requires_grad_(False)


def assemble(vae_folder: Path, transformer_folder: Path) -> ARVDPipeline:
    model = load_generator(transformer_folder)
    model.transformer.patch_embedding._forward_hooks.clear()  # training only
    return ARVDPipeline(
        transformer=model.transformer,
        tokenizer=build_tokenizer(),
        text_encoder=model.text_encoder,
        vae=AutoencoderKLWan.from_pretrained(vae_folder),
        num_frames_per_chunk=CHUNK_FRAMES,
        denoising_timesteps=list(DENOISING_TIMESTEPS),
        warp_timesteps=True,
        timestep_shift=TIMESTEP_SHIFT,
        context_noise=0,
        local_attention_frames=LOCAL_ATTENTION_FRAMES,
        sink_frames=SINK_FRAMES,
        height=FRAME_SIZE,
        width=FRAME_SIZE,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        fps=16,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--transformer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {args.out} exists; name a new folder")
    temporary = args.out.with_name(args.out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline = assemble(args.vae, args.transformer)
    pipeline.transformer.to(torch.bfloat16)
    pipeline.vae.to(torch.bfloat16)
    pipeline.save_pretrained(temporary)
    temporary.rename(args.out)
    size = sum(path.stat().st_size for path in args.out.rglob("*.safetensors"))
    print(f"{args.out}: {size / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
