"""Encode prompts, one or several that follow one another."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..compat import NodeError, ordinary, output, schema, widget, work
from ..handles import PipelineHandle, PipelineType
from ..prompts import CHUNK, OVER, SWITCH, parse_schedule

AS_MODEL = "the model's own"
SWITCHES = [AS_MODEL, "keep", "recache", "new_text_only", "cut"]
_SCHEDULE = (
    "1: a large red circle moving left on a navy background\n4: a large red circle pulsing on a navy background"
)


class QARVDEncodePrompt(io.ComfyNode):
    """Encode a prompt with the pipeline's own text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDEncodePrompt",
            display_name="Q-ARVD Encode Prompt",
            description="Encodes a prompt with the pipeline's own text encoder. For a model with Wan's text encoder, "
            "ComfyUI's CLIP Text Encode gives the same and can be used instead.",
            search_aliases=["prompt", "text", "conditioning", "umt5"],
            inputs=[
                PipelineType.Input("pipeline", tooltip="The pipeline whose text encoder encodes the prompt."),
                widget(
                    io.String,
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="a large red circle moving left on a navy background",
                    tooltip="What the video shows.",
                ),
            ],
            outputs=[output(io.Conditioning, "positive", "The encoded prompt, for Q-ARVD Stream Generate.")],
        )

    @classmethod
    @work
    def execute(cls, pipeline: PipelineHandle, text: str) -> io.NodeOutput:
        """Return the CONDITIONING."""
        return io.NodeOutput([[_encode(pipeline, text), {}]])


def _encode(pipeline: PipelineHandle, text: str) -> torch.Tensor:
    """Return float32 embeddings `[1, tokens, text_dim]` of a prompt, by the pipeline's text encoder."""
    if pipeline.pipe.text_encoder is None:
        raise NodeError(
            f"{pipeline.name} has no text encoder.",
            "Use ComfyUI's CLIP Text Encode with Wan's umt5 text encoder instead; for Q-ARVD Prompt Schedule, connect "
            "Load CLIP to clip.",
        )
    pipeline.load("text_encoder")
    return pipeline.pipe.encode_prompt(text, device=pipeline.device).float().cpu()


class QARVDPromptSchedule(io.ComfyNode):
    """Encode prompts that follow one another in one video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDPromptSchedule",
            display_name="Q-ARVD Prompt Schedule",
            description="Encodes prompts that follow one another in one video of Q-ARVD Stream Generate, each from a "
            "chunk on.",
            search_aliases=["prompt travel", "prompt list", "prompt schedule", "multi prompt", "story"],
            inputs=[
                PipelineType.Input("pipeline", tooltip="The pipeline that streams; its text encoder encodes."),
                widget(
                    io.String,
                    "text",
                    multiline=True,
                    default=_SCHEDULE,
                    tooltip="One prompt per line. A number and a colon before it say from which chunk on it holds, "
                    "counted from 1; lines that start with # are ignored.",
                ),
                widget(
                    io.Int,
                    "chunks_per_prompt",
                    default=3,
                    min=1,
                    max=340,
                    tooltip="Chunks from one line to the next one, if that has no number.",
                ),
                widget(
                    io.Combo,
                    "on_prompt_switch",
                    options=SWITCHES,
                    default=AS_MODEL,
                    optional=True,
                    advanced=True,
                    tooltip="What happens to the cached frames when the prompt changes. keep: nothing. recache: they "
                    "are computed again with the new prompt. new_text_only: they are dropped. cut: a new shot begins.",
                ),
                widget(
                    io.Int,
                    "over_chunks",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Chunks over which one prompt changes to the next one; with keep and recache only.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="Encodes instead of the pipeline: Load CLIP with Wan's umt5."
                ),
            ],
            outputs=[output(io.Conditioning, "positive", "The encoded prompts, for Q-ARVD Stream Generate.")],
        )

    @classmethod
    @work
    def execute(
        cls,
        pipeline: PipelineHandle,
        text: str,
        chunks_per_prompt: int = 3,
        on_prompt_switch: str = AS_MODEL,
        over_chunks: int = 1,
        clip: Any = None,
    ) -> io.NodeOutput:
        """Return a CONDITIONING with an entry for each prompt."""
        fields = pipeline.pipe.rollout_config
        switch = fields.on_prompt_switch if on_prompt_switch == AS_MODEL else on_prompt_switch
        entries = []
        for chunk, prompt in parse_schedule(text, chunks_per_prompt):
            if switch == "cut" and chunk > 1 and not prompt.startswith(fields.shot_prefix):
                prompt = fields.shot_prefix + prompt
            if clip is None:
                embeds = _encode(pipeline, prompt)
            else:
                embeds = ordinary(clip.encode_from_tokens(clip.tokenize(prompt))).float().cpu()
            entries.append([embeds, {CHUNK: chunk, SWITCH: switch, OVER: over_chunks if chunk > 1 else 1}])
        return io.NodeOutput(entries)
