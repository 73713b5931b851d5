"""Follow one run of Stream Generate: progress, previews, the Stop and Finish buttons, and the result."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.utils
import torch

from .compat import NodeError, stop_if_interrupted
from .handles import PipelineHandle, StreamState
from .preview import ChunkFeed, LatentPreview, picture
from .runs import Run
from .steering import keys
from .tensors import joined

if TYPE_CHECKING:
    from qarvd_diffusers.rollout.stream import Stream


@dataclass
class Take:
    """Hold the result of a run.

    Attributes:
        images: `[frames, height, width, 3]` in [0, 1], on the CPU.
        state: what the stream continues from.
        latent_frames: number of latent frames, the last of the state's, that the images were decoded from.
        chunks: frames and seconds of every chunk, without the frames that the video starts with.
        first_after: seconds until the first chunk was finished.
    """

    images: torch.Tensor
    state: StreamState
    latent_frames: int
    chunks: list[tuple[int, float]]
    first_after: float

    @property
    def latents(self) -> torch.Tensor:
        """Return normalized latents `[1, C, F, h, w]` of the images."""
        return self.state.latents[:, :, -self.latent_frames :]

    def stats(self, total: int, fps: float) -> str:
        """Describe how long the run took; `total` is the requested number of chunks."""
        frames, seconds = (sum(column) for column in zip(*self.chunks, strict=True))
        each = ", ".join(f"{seconds:.2f}" for _, seconds in self.chunks)
        early = f" of {total}, finished early" if len(self.chunks) < total else ""
        return (
            f"{len(self.chunks)} chunks{early}, {frames} frames in {seconds:.2f} s: "
            f"{frames / seconds:.1f} frames per second ({frames / seconds / fps:.2f} of real time)\n"
            f"first chunk after {self.first_after:.2f} s; seconds per chunk: {each}"
        )


class Watch:
    """Follow one run: progress and Stop before every pass, previews after steps and chunks, times.

    Args:
        run: the run, for the page.
        pipe: the pipeline that streams.
        fps: frames per second of previews.
        preview: `video`, `frames` or `off`.
    """

    def __init__(self, run: Run, pipe: Any, fps: float, preview: str) -> None:
        self._run, self._preview = run, preview
        fields = pipe.rollout_config
        passes = sum(len(fields.timesteps_of_chunk(chunk)) + 1 for chunk in range(run.total))
        self._bar = comfy.utils.ProgressBar(passes, node_id=run.node_id)
        self._feed = ChunkFeed(run, fps) if preview == "video" else None
        self._latent_preview = LatentPreview()

    def steered_by(self, steer: Callable[[Any], None]) -> None:
        """Let the page steer the stream: `steer` takes controls for the next chunks."""
        self._run.steer, self._run.keys = steer, keys()
        self._run.announce()

    def on_pass(self, info: Any) -> None:
        """Advance the progress bar; `on_pass` of the stream."""
        stop_if_interrupted()
        if info.role != "context":
            self._bar.update(1)

    def on_step(self, pipe: Any, step: int, timestep: float, tensors: dict[str, torch.Tensor]) -> dict:
        """Show the chunk in progress; `callback_on_step_end` of the stream."""
        if self._feed is not None:
            image = self._latent_preview.image(tensors["latents"])
            if image is not None:
                self._feed.step(image)
        return {}

    def collect(
        self,
        stream: Stream,
        before: StreamState | None,
        make_state: Callable[[torch.Tensor, Any], StreamState],
        keep: bool,
    ) -> Take:
        """Run the stream to its end, or until the user asks to finish.

        Args:
            stream: chunks; a chunk -1, what the video starts with, is among the images unless `before` is passed.
            before: the state that the stream continues from.
            make_state: makes the new state from the latents of all frames and the stream's saved state.
            keep: save the stream, to continue from it exactly.

        Raises:
            NodeError: if NaN or infinity appears.
        """
        images, latents, chunks, saved = [], [], [], None
        start, first_after = time.perf_counter(), 0.0
        try:
            for chunk in stream:
                pixels = chunk.frames[0].permute(0, 2, 3, 1).float().cpu().contiguous()
                if chunk.index == -1 and before is not None:
                    continue
                images.append(pixels)
                latents.append(chunk.latents.float().cpu())
                if self._feed is not None:
                    self._latent_preview.fit(chunk.latents, pixels)
                if chunk.index < 0:
                    continue
                chunks.append((len(pixels), chunk.seconds))
                first_after = first_after or time.perf_counter() - start
                self._show(pixels, chunk.seconds)
                finishing = self._run.finishing
                if keep and (finishing or len(chunks) == self._run.total):
                    saved = stream.state()
                if finishing:
                    break
        except FloatingPointError as error:
            problem, _, remedy = str(error).partition(": ")
            raise NodeError(problem, remedy[:1].upper() + remedy[1:]) from error
        finally:
            stream.close()  # an interrupted, finished or failed stream gives its cache back now
        latent_frames = sum(piece.shape[2] for piece in latents)
        everything = torch.cat([*([] if before is None else [before.latents]), *latents], dim=2)
        return Take(joined(images), make_state(everything, saved), latent_frames, chunks, first_after)

    def replay(self, take: Take) -> None:
        """Show the result of an earlier run."""
        begin = len(take.images) - sum(frames for frames, _ in take.chunks)
        for frames, seconds in take.chunks:
            self._show(take.images[begin : begin + frames], seconds)
            begin += frames

    def _show(self, pixels: torch.Tensor, seconds: float) -> None:
        """Show a finished chunk in the node, as `preview` says."""
        self._run.made += 1
        if self._feed is not None:
            self._feed.show(pixels, seconds)
            return
        if self._preview == "frames":
            self._bar.update_absolute(self._bar.current, preview=("JPEG", picture(pixels[-1]), None))
        self._run.announce()


class Takes:
    """Find the latest take of every node, for as long as ComfyUI itself keeps that result.

    ComfyUI runs a node again when any input changes. An input that only says how a result is shown must not generate
    it again, so the node looks here, by the other inputs. References are weak: nothing is kept alive.
    """

    def __init__(self) -> None:
        self._of_node: dict[str, tuple] = {}

    def keep(self, node_id: str, pipeline: PipelineHandle, inputs: str, take: Take) -> None:
        """Remember a take by the pipeline and a digest of the other inputs."""
        held = [weakref.ref(value) for value in (pipeline, take.images, take.state)]
        self._of_node[node_id] = (inputs, held, (take.latent_frames, take.chunks, take.first_after))

    def find(self, node_id: str, pipeline: PipelineHandle, inputs: str) -> Take | None:
        """Return the node's take if it was made from the same inputs and still exists, else None."""
        known, held, numbers = self._of_node.get(node_id, (None, (), ()))
        values = [reference() for reference in held]
        if known != inputs or values[0] is not pipeline or any(value is None for value in values):
            return None
        return Take(*values[1:], *numbers)
