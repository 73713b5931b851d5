"""Generate a video chunk by chunk, and show each chunk when it is done."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy_api.latest import io

from ..compat import FAMILY, NodeError, output, schema, widget, work
from ..handles import LorasType, PipelineHandle, PipelineType, StateType, StreamState
from ..latents import denormalize
from ..loras import Lora, applied
from ..planning import NO_LIMIT, SIZES
from ..preview import video
from ..prompts import PromptAt
from ..runs import Run, workflow_id
from ..steering import later_controls, recorded
from ..tensors import digest
from ..watch import Take, Takes, Watch
from .stream_inputs import check_choice, check_size, fitted, prompts_of, start_of, working_bytes

logger = logging.getLogger(__name__)

PREVIEWS = ["video", "frames", "off"]
OFFLOADS = ["off", "blocks"]
ON_STOP = ["discard", "keep"]
STATE_OUTPUT = 3  # index of the output

_takes = Takes()


class QARVDStreamGenerate(io.ComfyNode):
    """Stream a video from a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDStreamGenerate",
            display_name="Q-ARVD Stream Generate",
            description="Generates a video chunk by chunk with a rolling K/V cache. Each finished chunk plays in this "
            "node while the next one is computed. Connect state to another Stream Generate to continue the video, "
            "with the same prompt or another.",
            search_aliases=["sampler", *FAMILY, "autoregressive", "streaming video", "text to video", "rollout"],
            is_output_node=True,  # it shows the video
            inputs=[
                PipelineType.Input("pipeline", tooltip="A float or quantized pipeline."),
                io.Conditioning.Input(
                    "positive", tooltip="From Q-ARVD Encode Prompt, or CLIP Text Encode with Wan's umt5 encoder."
                ),
                widget(
                    io.Int,
                    "num_chunks",
                    default=7,
                    min=1,
                    max=340,
                    tooltip="Chunks to generate. The family is trained on 7 chunks of 3 latent frames, which are 81 "
                    "frames.",
                ),
                widget(
                    io.Int,
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Seed of the noise; not used with a state, which has its own noise generator.",
                ),
                widget(
                    io.Int,
                    "width",
                    default=0,
                    min=0,
                    max=8192,
                    step=16,
                    optional=True,
                    tooltip="Width in pixels; 0 takes the model's own.",
                ),
                widget(
                    io.Int,
                    "height",
                    default=0,
                    min=0,
                    max=8192,
                    step=16,
                    optional=True,
                    tooltip="Height in pixels; 0 takes the model's own.",
                ),
                widget(
                    io.Combo,
                    "preview",
                    options=PREVIEWS,
                    default="video",
                    optional=True,
                    tooltip="video: chunks play in this node. frames: one picture per chunk, in every client. off: "
                    "none.",
                ),
                widget(
                    io.Float,
                    "fps",
                    default=0.0,
                    min=0.0,
                    max=240.0,
                    optional=True,
                    advanced=True,
                    tooltip="Frames per second of previews and of the video output; 0 takes the model's own.",
                ),
                widget(
                    io.String,
                    "timesteps",
                    display_name="denoising_timesteps",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Denoising timesteps, such as 1000, 750, 500, 250; empty takes the model's own.",
                ),
                widget(
                    io.Int,
                    "kv_window",
                    display_name="local_attention_frames",
                    default=0,
                    min=-1,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Latent frames that a chunk can see, sink and the chunk itself included. Fewer frames "
                    "take less memory and give less context. 0 takes the model's own, -1 keeps all.",
                ),
                widget(
                    io.Int,
                    "sink",
                    display_name="sink_frames",
                    default=-1,
                    min=-1,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="First latent frames, which are never evicted from the window; -1 takes the model's own.",
                ),
                widget(
                    io.Combo,
                    "kv_cache",
                    options=["auto", "bf16", "int8", "fp8"],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Type of the stored keys and values: auto as computed, int8 and fp8 for half the memory.",
                ),
                io.Image.Input(
                    "start_image",
                    optional=True,
                    tooltip="Picture or clip that the video starts with (image to video). A single picture is held "
                    "for one chunk.",
                ),
                io.Latent.Input(
                    "start_latent",
                    optional=True,
                    tooltip="Start of the video as latents, in the VAE's own (raw) space.",
                ),
                StateType.Input("state", optional=True, tooltip="Continue the video of another Stream Generate."),
                io.String.Input(
                    "controls",
                    optional=True,
                    force_input=True,  # a text field would take room in every node
                    tooltip="For a world model: a text of JSON lines, what is done chunk by chunk, such as "
                    '{"chunk": 2, "keys": "w arrowleft"}, or key poses of a camera. While it runs, click the video '
                    "and use the keys W A S D Q E and the arrows.",
                ),
                LorasType.Input("loras", optional=True, tooltip="From Q-ARVD LoRA."),
                widget(
                    io.Combo,
                    "memory",
                    options=SIZES,
                    default=NO_LIMIT,
                    optional=True,
                    advanced=True,
                    tooltip="GPU memory that the stream may take. Where kv_cache is auto and local_attention_frames "
                    "is 0, an 8-bit K/V cache and then a smaller window are chosen to fit.",
                ),
                widget(
                    io.Combo,
                    "offload",
                    options=OFFLOADS,
                    default=OFFLOADS[0],
                    optional=True,
                    advanced=True,
                    tooltip="off: the transformer is on the GPU as a whole. blocks: each block only while it runs, "
                    "which takes little memory and is slower.",
                ),
                widget(
                    io.Combo,
                    "on_stop",
                    options=ON_STOP,
                    default=ON_STOP[0],
                    optional=True,
                    advanced=True,
                    tooltip="What ComfyUI's Stop does with finished chunks. discard: nothing runs any more. keep: the "
                    "chunk in progress is dropped, finished ones go to the connected nodes.",
                ),
            ],
            outputs=[
                output(io.Image, "images", "All frames; with a state, the new ones."),
                output(io.Latent, "latent", "Latents of the frames, in the VAE's own (raw) space."),
                output(io.Video, "video", "The frames as a video, for Save Video."),
                output(StateType, "state", "For another Stream Generate, which continues the video."),
                output(io.String, "stats", "Frames per second, and the seconds of each chunk."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.dynprompt],
        )

    @classmethod
    @work
    def execute(
        cls,
        pipeline: PipelineHandle,
        positive: list,
        num_chunks: int,
        seed: int,
        width: int = 0,
        height: int = 0,
        preview: str = "video",
        fps: float = 0.0,
        timesteps: str = "",
        kv_window: int = 0,
        sink: int = -1,
        kv_cache: str = "auto",
        controls: str = "",
        loras: tuple[Lora, ...] = (),
        memory: str = NO_LIMIT,
        offload: str = OFFLOADS[0],
        on_stop: str = ON_STOP[0],
        **start: Any,
    ) -> io.NodeOutput:
        """Generate, or show again what was generated from the same inputs."""
        check_choice(preview=(preview, PREVIEWS), offload=(offload, OFFLOADS), on_stop=(on_stop, ON_STOP))
        size = check_size(pipeline, width, height)
        kv_window, kv_cache = fitted(pipeline, memory, size, kv_window, kv_cache)
        pipe = _streaming_pipeline(pipeline, timesteps, kv_window, sink)
        recording = recorded(controls)
        fps = fps or float(pipe.config.fps)
        run = Run(cls.hidden.unique_id, workflow_id(cls.hidden.extra_pnginfo), num_chunks)
        watch = Watch(run, pipe, fps, preview, keep_on_stop=on_stop == "keep")
        inputs = digest(
            [positive, num_chunks, seed, size, timesteps, kv_window, sink, kv_cache, loras, offload, start, controls]
        )
        with run.going_on():
            take = _takes.find(run.node_id, pipeline, inputs)
            if take is not None:
                watch.replay(take)
            else:
                prompts = prompts_of(pipeline, positive, num_chunks)
                settings = (num_chunks, seed, size, kv_cache, recording)
                with _ready(pipeline, pipe, size, _frames(pipe, num_chunks, start), loras, offload):
                    take = cls._generate(watch, pipeline, pipe, prompts, settings, start)
                _takes.keep(run.node_id, pipeline, inputs, take)
        return io.NodeOutput(
            take.images,
            {"samples": denormalize(pipe.vae, take.latents)},
            video(take.images, fps),
            take.state,
            take.stats(num_chunks, fps),
            ui={"qarvd_chunks": run.chunks, "qarvd_stream": [run.status()]},
        )

    @classmethod
    def _generate(
        cls,
        watch: Watch,
        pipeline: PipelineHandle,
        pipe: Any,
        prompts: list[PromptAt],
        settings: tuple,
        start: dict[str, Any],
    ) -> Take:
        """Run the model; `settings` are num_chunks, seed, size in pixels, kv_cache and controls."""
        num_chunks, seed, size, kv_cache, recording = settings
        before: StreamState | None = start.get("state")
        beginning = start_of(pipeline, size, **start)
        generator = torch.Generator("cpu").manual_seed(seed % 2**63)
        hooks = {"on_pass": watch.on_pass, "callback_on_step_end": watch.on_step, "generator": generator}
        first = prompts[0].embeds
        digested = digest([first, size, kv_cache])
        steered = {} if recording is None else {"controls": recording}
        stream = None if before is None else _restored(pipe, before, digested, num_chunks, {**hooks, **steered})
        if stream is None:
            if before is not None:
                generator.set_state(before.generator)
            try:
                stream = pipe.stream(
                    prompt_embeds=first,
                    num_chunks=num_chunks,
                    width=size[0],
                    height=size[1],
                    output_type="pt",
                    kv_cache=kv_cache,
                    **hooks,
                    **beginning,
                    **steered,
                )
            except ValueError as error:
                raise NodeError(f"{error}.", "Change what starts the video, or the node's settings.") from error
        if "control_dim" in pipe.transformer.config:
            watch.steered_by(stream.set_controls)

        def state(latents: torch.Tensor, saved: Any, made: int) -> StreamState:
            latest = [prompt.embeds for prompt in prompts if prompt.chunk <= made][-1]
            return StreamState(pipeline.name, latents, generator.get_state(), digest([latest, size, kv_cache]), saved)

        return watch.collect(stream, before, state, cls._is_state_connected(), prompts[1:])

    @classmethod
    def _is_state_connected(cls) -> bool:
        """Whether a node of the graph takes the output `state`; nodes that others add while the graph runs count."""
        graph, link = cls.hidden.dynprompt, [cls.hidden.unique_id, STATE_OUTPUT]
        nodes = () if graph is None else map(graph.get_node, graph.all_node_ids())
        return any(value == link for node in nodes for value in node["inputs"].values())


@contextmanager
def _ready(
    pipeline: PipelineHandle, pipe: Any, size: tuple[int, int], frames: int, loras: tuple[Lora, ...], offload: str
) -> Iterator[None]:
    """Load the parts that stream, with room for `frames` latent frames, and add LoRAs in the `with` block."""
    memory = working_bytes(pipe, size, frames)
    if offload == "blocks":
        with applied(pipe, loras), pipeline.block_by_block(memory):
            yield
    else:
        pipeline.load("transformer", "vae", memory=memory)
        with applied(pipe, loras):
            yield


def _frames(pipe: Any, num_chunks: int, start: dict[str, Any]) -> int:
    """Return the latent frames that a stream has at most, those that it starts with included."""
    before = start.get("state")
    own = pipe.rollout_config.num_frames_per_chunk * (num_chunks + 1)
    return own + (0 if before is None else before.latents.shape[2])


def _restored(pipe: Any, before: StreamState, settings: str, num_chunks: int, hooks: dict[str, Any]) -> Any | None:
    """Continue a stream exactly for `num_chunks` more; None, and a reason in the log, where that is impossible."""
    if before.saved is None:
        reason = "nothing was connected to the state output of the node that made it, or Stop ended it"
    elif before.settings != settings:
        reason = "prompt, size or kv_cache differs"
    else:
        try:
            if "control_dim" in pipe.transformer.config:
                hooks["controls"] = later_controls(pipe, hooks.get("controls"), before.saved.num_chunks, num_chunks)
            return pipe.restore_stream(before.saved, num_chunks=before.saved.num_chunks + num_chunks, **hooks)
        except ValueError as error:
            reason = str(error)
    logger.info("Q-ARVD Stream Generate encodes the frames of the state again: %s", reason)
    return None


def _streaming_pipeline(pipeline: PipelineHandle, timesteps: str, kv_window: int, sink: int) -> Any:
    """Return the pipeline with the node's settings in place of the model's own."""
    if pipeline.pipe.vae is None:
        raise NodeError(f"{pipeline.name} has no VAE.", "Convert or save the model together with its VAE.")
    fields: dict[str, Any] = {}
    try:
        if timesteps.strip():
            fields["denoising_timesteps"] = [float(step) for step in timesteps.replace(",", " ").split()]
        if kv_window:
            fields["local_attention_frames"] = kv_window
        if sink >= 0:
            fields["sink_frames"] = sink
        return pipeline.for_streaming(**fields)
    except ValueError as error:
        raise NodeError(
            f"{error}.",
            "Correct denoising_timesteps (timesteps), local_attention_frames (kv_window) or sink_frames (sink); "
            "empty, 0 and -1 take the model's own.",
        ) from error
