"""Stream a video from a float or quantized model into an mp4; Ctrl-C keeps what is finished."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .common import add_device_arguments, load_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder or Hub id; `bundled` names the model that ships with the package")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt")
    text.add_argument(
        "--prompt-embeds", metavar="FILE", help="safetensors file of save_prompt_embeds: no text encoder works"
    )
    parser.add_argument("--out", required=True, help="mp4 file to write")
    parser.add_argument(
        "--chunks", type=int, default=7, help="chunks to generate; 0 goes on until Ctrl-C (default: 7)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--image", metavar="FILE", help="picture that the video starts with")
    parser.add_argument(
        "--kv-cache", choices=("auto", "bf16", "int8", "fp8"), help="dtype of the cached keys and values"
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="fit into this much GPU memory, such as 8GB; see `qarvd plan`"
    )
    parser.add_argument("--fps", type=int, help="frames per second of the file (default: the model's, else 16)")
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    import imageio.v2 as imageio
    import torch
    from PIL import Image

    from ..evaluation.fidelity import to_uint8
    from ..serialization import atomic_file

    size = {name: getattr(args, name) for name in ("height", "width") if getattr(args, name)}
    pipe = load_pipeline(args.model, args, **({"memory": args.memory, **size} if args.memory else {}))
    start = {"image": Image.open(args.image).convert("RGB")} if args.image else {}
    fps = args.fps or pipe.config.get("fps") or 16
    stream = pipe.stream(
        args.prompt,
        prompt_embeds=args.prompt_embeds,
        num_chunks=args.chunks or None,
        height=args.height,
        width=args.width,
        kv_cache=args.kv_cache,
        generator=torch.Generator("cpu").manual_seed(args.seed),
        output_type="np",
        **start,
    )
    frames, seconds = 0, []
    with (
        atomic_file(args.out) as temporary,
        imageio.get_writer(temporary, fps=fps, codec="libx264", quality=9, macro_block_size=2) as writer,
    ):
        try:
            for chunk in stream:
                for frame in to_uint8(chunk.frames[0]):
                    writer.append_data(frame)
                frames += len(chunk.frames[0])
                seconds.append(chunk.seconds)
                print(f"chunk {chunk.index}: {len(chunk.frames[0])} frames in {chunk.seconds:.2f} s", file=sys.stderr)
        except KeyboardInterrupt:
            if not frames:
                raise
            stream.close()
    return {"out": args.out, "frames": frames, "fps": fps, "seconds_per_chunk": seconds}


def render(result: dict[str, Any]) -> str:
    speed = result["frames"] / sum(result["seconds_per_chunk"])
    return f"wrote {result['out']}: {result['frames']} frames at {result['fps']} fps, made at {speed:.1f} frames per second"
