"""Stream videos from a float or quantized model into files; Ctrl-C keeps the finished part.

Under `accelerate launch -m qarvd_diffusers generate ...` (or `torchrun`) the processes share the prompts; with
`--context-parallel` all of them work on each video.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    LIVE,
    add_chunks_argument,
    add_device_arguments,
    add_model_argument,
    add_start_arguments,
    load_pipeline,
    read_prompts,
    say,
    seed,
    start_of,
    whole,
)

if TYPE_CHECKING:
    from ..calibration.processes import Processes
    from ..pipelines.pipeline_arvd import ARVDPipeline
    from ..rollout.stream import Stream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `qarvd generate`."""
    from ..kv_cache.storage import STORAGES

    add_model_argument(parser)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="what the video shows")
    text.add_argument("--prompts", metavar="FILE", help="one prompt per line, one video for each")
    text.add_argument(
        "--prompt-embeds", metavar="FILE", help="safetensors file of save_prompt_embeds; needs no text encoder"
    )
    parser.add_argument(
        "--out",
        required=True,
        help="file to write (.mp4, .mov, .mkv, .avi, .wmv, .gif, .webp); with --prompts a folder, for 000.mp4, "
        "001.mp4, ...",
    )
    add_chunks_argument(parser, "chunks to generate; 0 continues until Ctrl-C", least=0)
    parser.add_argument(
        "--seed", type=seed, default=0, help="seed of the noise; prompt i of a file gets seed + i (default: 0)"
    )
    parser.add_argument("--height", type=whole(1), help="pixels (default: the model's)")
    parser.add_argument("--width", type=whole(1), help="pixels (default: the model's)")
    add_start_arguments(parser, "; - reads lines from standard input, each from the next chunk on")
    parser.add_argument("--kv-cache", choices=tuple(STORAGES), help="dtype of the cached keys and values")
    parser.add_argument(
        "--memory", metavar="SIZE", help="GPU memory to fit into, such as 8GB, 8 or 8GiB; see `qarvd plan`"
    )
    parser.add_argument("--fps", type=whole(1), help="frames per second of the file (default: the model's, else 16)")
    parser.add_argument(
        "--context-parallel",
        action="store_true",
        help="let all processes of the job, one per GPU, work on each video together",
    )
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Generate and write the videos; of several processes, only the main one returns a result."""
    from ..calibration.processes import Processes

    _check(args)
    prompts = read_prompts(args.prompts) or (args.prompt,)
    processes = Processes.launched()  # first: it gives every process its own GPU
    _check_processes(args, processes.count)
    pipe = _load(args, processes)
    indices = range(len(prompts)) if args.context_parallel else processes.share(range(len(prompts)))
    videos = [_generate(pipe, args, index, prompts[index], processes) for index in indices]
    if not args.context_parallel:
        videos = [video for share in processes.gather(videos) for video in share]
    processes.close()
    if not processes.is_main:
        return None
    return {"out": args.out, "videos": videos} if args.prompts else videos[0]


def _check(args: argparse.Namespace) -> None:
    """Check, before anything is loaded, that the arguments make a video that can be written.

    Raises:
        ValueError, OSError: they do not.
    """
    from ..evaluation.pictures import check_video_name
    from ..memory.plan import parse_budget

    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty: describe what the video shows")
    if args.prompts and args.num_chunks == 0:
        raise ValueError("--num-chunks 0 never ends, so the second prompt would never start: give a number of chunks")
    if args.prompts and Path(args.out).is_file():
        raise FileExistsError(f"--out {args.out} is a file: with --prompts it is a folder, for 000.mp4, 001.mp4, ...")
    if not args.prompts:
        check_video_name(args.out)
    if args.memory is not None:
        parse_budget(args.memory)
    start_of(args)
    if args.controls == LIVE and args.prompts:
        raise ValueError(
            "--controls - steers one video, --prompts makes several: give a file of controls, or --prompt"
        )


def _check_processes(args: argparse.Namespace, count: int) -> None:
    """Raise ValueError if the processes of the job would have nothing to share."""
    if count == 1 and args.context_parallel:
        raise ValueError(
            "--context-parallel needs several processes: torchrun --nproc-per-node 2 -m qarvd_diffusers generate ..."
        )
    if count > 1 and not args.prompts and not args.context_parallel:
        raise ValueError(
            f"{count} processes for one video: start one process, or give several prompts with --prompts, or add "
            "--context-parallel"
        )


def _load(args: argparse.Namespace, processes: Processes) -> ARVDPipeline:
    """Load the model, within `--memory` if given, and split it over the processes for `--context-parallel`."""
    options = {}
    if args.memory:
        size = {"height": args.height, "width": args.width}
        options = {"memory": args.memory, **{name: value for name, value in size.items() if value}}
    pipe = load_pipeline(args.model, args, **options)
    if args.context_parallel:
        from diffusers import ContextParallelConfig

        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=processes.count))
    pipe.set_progress_bar_config(disable=not processes.is_main)
    return pipe


def _generate(
    pipe: ARVDPipeline, args: argparse.Namespace, index: int, prompt: str | None, processes: Processes
) -> dict[str, Any]:
    """Generate the video of one prompt, and write it unless another process does."""
    import torch

    writes = processes.is_main or not args.context_parallel
    stream = pipe.stream(
        prompt,
        prompt_embeds=args.prompt_embeds,
        num_chunks=args.num_chunks or None,
        height=args.height,
        width=args.width,
        kv_cache=args.kv_cache,
        generator=torch.Generator("cpu").manual_seed(args.seed + index),
        output_type="np" if writes else "latent",
    )
    if args.controls == LIVE:
        threading.Thread(target=_steer, args=(stream, sys.stdin), daemon=True).start()
    if not writes:
        for _ in stream:
            pass
        return {}
    out, fps = Path(args.out), args.fps or pipe.config.get("fps") or 16
    if not args.prompts:
        return {"out": str(out), "fps": fps, **_write(stream, out, fps)}
    out = out / f"{index:03d}.mp4"
    return {"prompt": prompt, "out": str(out), "fps": fps, **_write(stream, out, fps)}


def _steer(stream: Stream, lines: Iterable[str]) -> None:
    """Steer a running stream by lines of JSON; one that cannot be read is reported, and changes nothing."""
    from ..controls.recording import parse_control

    for number, text in enumerate(lines, 1):
        try:
            if text.strip():
                stream.set_controls(parse_control(text, f"standard input, line {number}")[1])
        except ValueError as error:
            say(str(error))


def _write(stream: Stream, out: Path, fps: int) -> dict[str, Any]:
    """Write a stream as one video file; after Ctrl-C, the frames so far."""
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
    """Say what was written and how fast it was generated."""
    lines = []
    for video in result.get("videos", [result]):
        speed = video["frames"] / sum(video["seconds_per_chunk"])
        lines.append(
            f"wrote {video['out']}: {video['frames']} frames at {video['fps']} fps, "
            f"generated at {speed:.1f} frames per second"
        )
    return "\n".join(lines)
