"""Stream videos from a float or quantized model into mp4 files; Ctrl-C keeps what is finished.

Under `accelerate launch -m qarvd_diffusers generate ...` (or `torchrun`) the processes share the prompts; with
`--context-parallel` they make each video together.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import add_device_arguments, load_pipeline, read_prompts, seed, whole

if TYPE_CHECKING:
    from ..calibration.processes import Processes
    from ..pipelines.pipeline_arvd import ARVDPipeline
    from ..pipelines.stream import Stream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder or Hub id; `bundled` names the model that ships with the package")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt")
    text.add_argument("--prompts", metavar="FILE", help="one prompt per line, one video for each")
    text.add_argument(
        "--prompt-embeds", metavar="FILE", help="safetensors file of save_prompt_embeds: no text encoder works"
    )
    parser.add_argument(
        "--out",
        required=True,
        help="file to write (.mp4, .mov, .mkv, .avi, .wmv, .gif, .webp); with --prompts a folder, for 000.mp4, 001.mp4, ...",
    )
    parser.add_argument(
        "--chunks", type=whole(0), default=7, help="chunks to generate; 0 goes on until Ctrl-C (default: 7)"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="of the first prompt, one more for each other (default: 0)"
    )
    parser.add_argument("--height", type=whole(1))
    parser.add_argument("--width", type=whole(1))
    parser.add_argument("--image", metavar="FILE", help="picture that the video starts with")
    parser.add_argument(
        "--kv-cache", choices=("auto", "bf16", "int8", "fp8"), help="dtype of the cached keys and values"
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="fit into this much GPU memory, such as 8GB or 8 or 8GiB; see `qarvd plan`"
    )
    parser.add_argument("--fps", type=whole(1), help="frames per second of the file (default: the model's, else 16)")
    parser.add_argument(
        "--context-parallel",
        action="store_true",
        help="all processes of the job, one per GPU, make each video together",
    )
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    from ..calibration.processes import Processes

    _check(args)
    prompts = read_prompts(args.prompts) or (args.prompt,)
    processes = Processes.launched()  # first, since it gives every process a GPU of its own
    if processes.count == 1 and args.context_parallel:
        raise ValueError(
            "--context-parallel needs processes: torchrun --nproc-per-node 2 -m qarvd_diffusers generate ..."
        )
    if processes.count > 1 and not args.prompts and not args.context_parallel:
        raise ValueError(
            f"{processes.count} processes for one video: start one, give several --prompts, or --context-parallel"
        )
    if args.image:
        from ..pipelines.video_start import read_picture

        read_picture(args.image)  # refused before the model is loaded
    size = {name: getattr(args, name) for name in ("height", "width") if getattr(args, name)}
    pipe = load_pipeline(args.model, args, **({"memory": args.memory, **size} if args.memory else {}))
    mine = range(len(prompts))
    if args.context_parallel:
        from diffusers import ContextParallelConfig

        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=processes.count))
    else:
        mine = processes.share(mine)
    pipe.set_progress_bar_config(disable=not processes.is_main)
    videos = [_make(pipe, args, index, prompts[index], processes) for index in mine]
    if not args.context_parallel:
        videos = [video for share in processes.gather(videos) for video in share]
    processes.close()
    if not processes.is_main:
        return None
    return {"out": args.out, "videos": videos} if args.prompts else videos[0]


def _check(args: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, what could not be done or written."""
    from ..evaluation.pictures import check_video_name
    from ..pipelines.memory import parse_budget

    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty: say what the video shows")
    if args.prompts and args.chunks == 0:
        raise ValueError("--chunks 0 goes on without end, and would never come to the second prompt")
    if args.prompts and Path(args.out).is_file():
        raise FileExistsError(f"--out {args.out} is a file: with --prompts it is a folder, for 000.mp4, 001.mp4, ...")
    if not args.prompts:
        check_video_name(args.out)
    if args.memory is not None:
        parse_budget(args.memory)


def _make(
    pipe: ARVDPipeline, args: argparse.Namespace, index: int, prompt: str | None, processes: Processes
) -> dict[str, Any]:
    """Make the video of one prompt, and write it unless another process does."""
    import torch

    writes = processes.is_main or not args.context_parallel
    start = {"image": args.image} if args.image else {}
    stream = pipe.stream(
        prompt,
        prompt_embeds=args.prompt_embeds,
        num_chunks=args.chunks or None,
        height=args.height,
        width=args.width,
        kv_cache=args.kv_cache,
        generator=torch.Generator("cpu").manual_seed(args.seed + index),
        output_type="np" if writes else "latent",
        **start,
    )
    if not writes:
        for _ in stream:
            pass
        return {}
    out = Path(args.out)
    if args.prompts:
        out.mkdir(parents=True, exist_ok=True)
        out = out / f"{index:03d}.mp4"
    video = {"out": str(out), "fps": args.fps or pipe.config.get("fps") or 16}
    return ({"prompt": prompt} if args.prompts else {}) | video | _write(stream, out, video["fps"])


def _write(stream: Stream, out: Path, fps: int) -> dict[str, Any]:
    from tqdm.auto import tqdm

    from ..evaluation.fidelity import to_uint8
    from ..evaluation.pictures import video_writer

    frames, seconds = 0, []
    with video_writer(out, fps) as append:
        try:
            for chunk in stream:
                for frame in to_uint8(chunk.frames[0]):
                    append(frame)
                frames += len(chunk.frames[0])
                seconds.append(chunk.seconds)
                line = f"chunk {chunk.index}: {len(chunk.frames[0])} frames in {chunk.seconds:.2f} s"
                tqdm.write(line, file=sys.stderr)  # above the bar, not into it
        except KeyboardInterrupt:
            if not frames:
                raise
            stream.close()
    return {"frames": frames, "seconds_per_chunk": seconds}


def render(result: dict[str, Any]) -> str:
    lines = []
    for video in result.get("videos", [result]):
        speed = video["frames"] / sum(video["seconds_per_chunk"])
        lines.append(
            f"wrote {video['out']}: {video['frames']} frames at {video['fps']} fps, made at {speed:.1f} frames per second"
        )
    return "\n".join(lines)
