"""Describe pipelines, and compare videos."""

from __future__ import annotations

import itertools

import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw, ImageFont

from ..compat import NodeError, output, schema, widget, work
from ..handles import PipelineHandle, PipelineType
from ..library import library
from ..report import describe

TILE = 256  # pixels; smaller videos are enlarged to make errors visible
BANNER = 28  # pixels


class QARVDCompare(io.ComfyNode):
    """Compare two videos of the same noise, side by side and in numbers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDCompare",
            display_name="Q-ARVD Compare",
            description="Compares two videos of the same prompt and seed, such as those of a float and a quantized "
            "model: PSNR and SSIM of every chunk, and both videos side by side with their difference.",
            search_aliases=["psnr", "ssim", "fidelity", "quality", "side by side"],
            inputs=[
                io.Image.Input("images_a", tooltip="The reference, such as the float model's video."),
                io.Image.Input("images_b", tooltip="The other video, of the same length and size."),
                widget(io.String, "label_a", default="float", optional=True, tooltip="Written above the first video."),
                widget(
                    io.String, "label_b", default="quantized", optional=True, tooltip="Written above the second video."
                ),
                widget(
                    io.Int,
                    "latent_frames_per_chunk",
                    default=3,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Length of a chunk: 3 for Self-Forcing, 1 for frame-wise models.",
                ),
            ],
            outputs=[
                output(io.Image, "images", "Both videos and their difference, amplified four times."),
                output(io.String, "metrics", "PSNR and SSIM of each chunk and of the whole video."),
            ],
            is_output_node=True,
        )

    @classmethod
    @work
    def execute(
        cls,
        images_a: torch.Tensor,
        images_b: torch.Tensor,
        label_a: str = "float",
        label_b: str = "quantized",
        latent_frames_per_chunk: int = 3,
    ) -> io.NodeOutput:
        """Return the videos side by side, and a table of PSNR and SSIM."""
        if images_a.shape != images_b.shape:
            raise NodeError(
                f"The videos have the shapes {list(images_a.shape)} and {list(images_b.shape)}.",
                "Make both with the same num_chunks, width and height.",
            )
        metrics = _metrics(images_a, images_b, latent_frames_per_chunk)
        pictures = _side_by_side(images_a, images_b, (label_a, label_b))
        return io.NodeOutput(pictures, metrics, ui=ui.PreviewText(metrics))


def _metrics(a: torch.Tensor, b: torch.Tensor, latent_frames: int) -> str:
    """Return PSNR and SSIM of each chunk and of the whole video, as a table."""
    fidelity, measures = library("evaluation.fidelity"), library("evaluation.metrics")
    first, others = 1 + 4 * (latent_frames - 1), 4 * latent_frames  # the VAE makes 1 frame of the first latent, else 4
    bounds = [0, *range(first, len(a), others), len(a)]
    rows = []
    for chunk, (start, stop) in enumerate(itertools.pairwise(bounds)):
        pair = [fidelity.to_uint8(images[start:stop].cpu().numpy()) for images in (a, b)]
        rows.append(f"{chunk:5d}   {fidelity.psnr_db([pair[0]], [pair[1]]):9.2f}   {measures.ssim(*pair):.4f}")
    whole = [fidelity.to_uint8(images.cpu().numpy()) for images in (a, b)]
    rows.append(f"  all   {fidelity.psnr_db([whole[0]], [whole[1]]):9.2f}   {measures.ssim(*whole):.4f}")
    return "\n".join(["chunk   PSNR (dB)   SSIM", *rows])


def _side_by_side(a: torch.Tensor, b: torch.Tensor, labels: tuple[str, str]) -> torch.Tensor:
    """Return images `[frames, height, 3 * width, 3]`: first, second, and four times their difference."""
    scale = max(1, round(TILE / a.shape[1]))
    joined = torch.cat([a, b, ((a - b).abs() * 4).clamp(0, 1)], dim=2)
    joined = joined.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    banner = Image.new("RGB", (joined.shape[2], BANNER), "white")
    draw, tile = ImageDraw.Draw(banner), joined.shape[2] // 3
    for column, text in enumerate((*labels, "difference x 4")):
        draw.text((column * tile + 8, 5), text, fill="black", font=ImageFont.load_default(15))
    top = torch.tensor(list(banner.tobytes()), dtype=torch.uint8).reshape(1, BANNER, -1, 3).to(joined) / 255
    return torch.cat([top.expand(len(joined), -1, -1, -1), joined], dim=1)


class QARVDInfo(io.ComfyNode):
    """Describe a pipeline and the operators that run it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDInfo",
            display_name="Q-ARVD Info",
            description="Shows scheme, size and rollout of a pipeline, and which implementation of each integer "
            "operator runs on this machine.",
            search_aliases=["size", "report", "about", "backend"],
            inputs=[PipelineType.Input("pipeline", tooltip="Any pipeline.")],
            outputs=[output(io.String, "text", "The description.")],
            is_output_node=True,
        )

    @classmethod
    @work
    def execute(cls, pipeline: PipelineHandle) -> io.NodeOutput:
        """Return the description."""
        library()
        import qarvd_kernels

        operators = [f"{name}: {implementation}" for name, implementation, _ in qarvd_kernels.report()]
        text = "\n".join([describe(pipeline), "operators here:", *operators])
        return io.NodeOutput(text, ui=ui.PreviewText(text))
