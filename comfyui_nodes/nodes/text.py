"""Encode prompts."""

from __future__ import annotations

from comfy_api.latest import io

from ..compat import NodeError, output, schema, widget, work
from ..handles import PipelineHandle, PipelineType


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
        if pipeline.pipe.text_encoder is None:
            raise NodeError(
                f"{pipeline.name} has no text encoder.",
                "Use ComfyUI's CLIP Text Encode with Wan's umt5 text encoder instead.",
            )
        pipeline.load("text_encoder")
        embeds = pipeline.pipe.encode_prompt(text, device=pipeline.device)
        return io.NodeOutput([[embeds.float().cpu(), {}]])
