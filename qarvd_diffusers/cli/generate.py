"""Stream a video from a float or quantized model into an mp4; Ctrl-C keeps what is finished."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .common import add_device_arguments, load_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder or Hub id; `bundled` names the model that ships with the package")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out", required=True, help="mp4 file to write")
    parser.add_argument(
        "--chunks", type=int, default=7, help="chunks to generate; 0 goes on until Ctrl-C (default: 7)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--fps", type=int, help="frames per second of the file (default: the model's, else 16)")
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    import imageio.v2 as imageio
    import torch

    from ..evaluation.fidelity import to_uint8
    from ..serialization import atomic_file

    pipe = load_pipeline(args.model, args)
    fps = args.fps or pipe.config.get("fps") or 16
    stream = pipe.stream(
        args.prompt,
        num_chunks=args.chunks or None,
        height=args.height,
        width=args.width,
        generator=torch.Generator("cpu").manual_seed(args.seed),
        output_type="np",
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
