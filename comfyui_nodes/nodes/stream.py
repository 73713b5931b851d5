"""Generate a video chunk by chunk, and show each chunk when it is done."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.latest import io

from ..compat import FAMILY, NodeError, output, schema, widget, work
from ..handles import PipelineHandle, PipelineType, StateType, StreamState, working_bytes
from ..latents import denormalize, normalize, one_video
from ..preview import video
from ..runs import Run, workflow_id
from ..steering import later_controls, recorded
from ..tensors import digest
from ..watch import Take, Takes, Watch

logger = logging.getLogger(__name__)

PREVIEWS = ["video", "frames", "off"]
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
            search_aliases=[
                "sampler",
                *FAMILY,
                "autoregressive",
                "streaming video",
                "text to video",
                "rollout",
            ],
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
                widget(
                    io.String,
                    "controls",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="For a world model: JSON lines of what is done chunk by chunk, such as "
                    '{"chunk": 2, "keys": "w arrowleft"}, or key poses of a camera. While it runs, click the video '
                    "and use the keys W A S D Q E and the arrows.",
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
        **start: Any,
    ) -> io.NodeOutput:
        """Generate, or show again what was generated from the same inputs."""
        if preview not in PREVIEWS:
            raise NodeError(f"preview is {preview!r}.", f"Choose one of: {', '.join(PREVIEWS)}.")
        pipe = _streaming_pipeline(pipeline, timesteps, kv_window, sink)
        size = _check_size(pipeline, width, height)
        recording = recorded(controls)
        fps = fps or float(pipe.config.fps)
        run = Run(cls.hidden.unique_id, workflow_id(cls.hidden.extra_pnginfo), num_chunks)
        watch = Watch(run, pipe, fps, preview)
        inputs = digest([positive, num_chunks, seed, size, timesteps, kv_window, sink, kv_cache, start, controls])
        with run.going_on():
            take = _takes.find(run.node_id, pipeline, inputs)
            if take is not None:
                watch.replay(take)
            else:
                take = cls._generate(
                    watch, pipeline, pipe, positive, (num_chunks, seed, size, kv_cache, recording), start
                )
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
        cls, watch: Watch, pipeline: PipelineHandle, pipe: Any, positive: list, settings: tuple, start: dict[str, Any]
    ) -> Take:
        """Run the model; `settings` are num_chunks, seed, size in pixels, kv_cache and controls."""
        num_chunks, seed, size, kv_cache, recording = settings
        embeds = _prompt_embeds(pipeline, positive)
        before: StreamState | None = start.get("state")
        frames = pipe.rollout_config.num_frames_per_chunk * (num_chunks + 1)
        frames += 0 if before is None else before.latents.shape[2]
        pipeline.load("transformer", "vae", memory=working_bytes(pipe, size, frames))
        beginning = _start(pipeline, size, **start)
        generator = torch.Generator("cpu").manual_seed(seed % 2**63)
        hooks = {"on_pass": watch.on_pass, "callback_on_step_end": watch.on_step, "generator": generator}
        digested = digest([embeds, size, kv_cache])
        steered = {} if recording is None else {"controls": recording}
        stream = None if before is None else _restored(pipe, before, digested, num_chunks, {**hooks, **steered})
        if stream is None:
            if before is not None:
                generator.set_state(before.generator)
            try:
                stream = pipe.stream(
                    prompt_embeds=embeds,
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

        def state(latents: torch.Tensor, saved: Any) -> StreamState:
            return StreamState(pipeline.name, latents, generator.get_state(), digested, saved)

        return watch.collect(stream, before, state, cls._is_state_connected())

    @classmethod
    def _is_state_connected(cls) -> bool:
        """Whether a node of the graph takes the output `state`; nodes that others add while the graph runs count."""
        graph, link = cls.hidden.dynprompt, [cls.hidden.unique_id, STATE_OUTPUT]
        nodes = () if graph is None else map(graph.get_node, graph.all_node_ids())
        return any(value == link for node in nodes for value in node["inputs"].values())


def _restored(pipe: Any, before: StreamState, settings: str, num_chunks: int, hooks: dict[str, Any]) -> Any | None:
    """Continue a stream exactly for `num_chunks` more; None, and a reason in the log, where that is impossible."""
    if before.saved is None:
        reason = "nothing was connected to the state output of the node that made it"
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


# Used, or without effect: embeddings of Wan's text encoder are zero where its mask is.
_OF_EVERY_PROMPT = ("pooled_output", "attention_mask")
_OF_EVERY_LATENT = ("samples", "batch_index", "downscale_ratio_spacial", "downscale_ratio_temporal")


def _prompt_embeds(pipeline: PipelineHandle, positive: list) -> torch.Tensor:
    """Return the embeddings `[1, tokens, text_dim]` of the one prompt in a CONDITIONING."""
    if len(positive) != 1:
        raise NodeError(
            f"positive holds {len(positive)} prompts, expected one.",
            "Connect one prompt instead of Conditioning (Combine). To follow one prompt after the other, connect "
            "state to another Stream Generate with the next prompt.",
        )
    (embeds, options), expected = positive[0], pipeline.pipe.transformer.config.text_dim
    _warn_of_unused("positive", options, _OF_EVERY_PROMPT)
    if embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[-1] != expected:
        raise NodeError(
            f"The conditioning has shape {list(embeds.shape)}, expected [1, tokens, {expected}] for {pipeline.name}.",
            "Encode the prompt with Q-ARVD Encode Prompt and this pipeline.",
        )
    return embeds


def _warn_of_unused(name: str, entries: dict[str, Any], used: tuple[str, ...]) -> None:
    """Log which entries of an input are not used."""
    unused = sorted(key for key, value in entries.items() if value is not None and key not in used)
    if unused:
        logger.warning("Q-ARVD Stream Generate does not use these entries of %s: %s", name, ", ".join(unused))


def _check_size(pipeline: PipelineHandle, width: int, height: int) -> tuple[int, int]:
    """Return width and height in pixels, checked."""
    pipe = pipeline.pipe
    patch = pipe.transformer.config.patch_size
    size = (width or pipe.config.width, height or pipe.config.height)
    for name, value, cells in (("width", size[0], patch[2]), ("height", size[1], patch[1])):
        multiple = pipe.vae_scale_factor_spatial * cells
        if value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise NodeError(
                f"{name} is {value}, expected a multiple of {multiple} for {pipeline.name}.",
                f"Set {name} to {nearest}, or to 0 for the model's own.",
            )
    return size


def _start(pipeline: PipelineHandle, size: tuple[int, int], **starts: Any) -> dict[str, torch.Tensor]:
    """Return what the video starts with, as an argument of `stream`."""
    named = [name for name, value in starts.items() if value is not None]
    if not named:
        return {}
    if len(named) > 1:
        raise NodeError(
            f"{' and '.join(named)} are both connected.", "Connect only one of them: a video has one start."
        )
    value, pipe = starts[named[0]], pipeline.pipe
    if named[0] == "start_image":
        pictures = value.permute(0, 3, 1, 2).clamp(0, 1)  # resampling in ComfyUI overshoots
        return {"image": pictures[0]} if len(pictures) == 1 else {"video": pictures}
    samples = value.latents if named[0] == "state" else value["samples"]
    latents = one_video(named[0], samples, pipe.vae.config.z_dim, pipeline.name)
    if named[0] == "start_latent":
        _warn_of_unused(named[0], value, _OF_EVERY_LATENT)
        latents = normalize(pipe.vae, latents.float())
    elif value.model != pipeline.name:
        logger.warning("the state was made with %s, %s continues from it", value.model, pipeline.name)
    try:
        pipe.rollout_config.context_pieces(latents.shape[2])
    except ValueError as error:
        raise NodeError(
            f"{named[0]} has {latents.shape[2]} latent frames, which is not a whole number of chunks.",
            f"Connect a multiple of {pipe.rollout_config.num_frames_per_chunk} latent frames.",
        ) from error
    expected = (size[1] // pipe.vae_scale_factor_spatial, size[0] // pipe.vae_scale_factor_spatial)
    if tuple(latents.shape[-2:]) != expected:
        got = [side * pipe.vae_scale_factor_spatial for side in latents.shape[-2:]]
        raise NodeError(
            f"{named[0]} is {got[1]} x {got[0]} pixels, but the video is {size[0]} x {size[1]}.",
            f"Set width to {got[1]} and height to {got[0]}.",
        )
    return {"initial_latents": latents}
