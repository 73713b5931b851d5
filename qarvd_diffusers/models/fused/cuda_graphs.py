"""CUDA-graph segments between self-attention calls.

A segment is the part of a pass between two self-attention calls: about a dozen kernels, the same in every pass of one
shape, which a CUDA graph launches at once. Attention and the storing of K/V depend on the cache and stay outside. One
set of graphs therefore serves every chunk, stream and prompt, for any length, window and storage type of the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .block import FusedBlock, PassState

logger = logging.getLogger(__name__)
_MAX_KINDS = 2  # kinds of passes that keep their graphs; each holds the activations of one segment


@dataclass
class ForwardSegments:
    """Run the segments of one pass: number `i` lies between the self-attention calls of blocks `i - 1` and `i`.

    Attributes:
        blocks: blocks of the model.
        state: state of the pass; after the last segment it holds the output of the blocks.
        modulation: float32 `[blocks, 6, groups, C]`.
        texts: cross-attention K/V of the prompt, for every block.
        injections: returns scale and shift `[2, B or 1, tokens, C]` of a block, for a model with controls, else None.
    """

    blocks: Sequence[FusedBlock]
    state: PassState
    modulation: Tensor
    texts: Sequence[tuple[Tensor, Tensor]]
    injections: Callable[[int], Tensor] | None = None

    def __call__(self, index: int, attended: Tensor | None, out: Tensor | None = None) -> Tensor | None:
        """Finish block `index - 1` with the output of its self-attention, and project q, k and v of block `index`.

        Args:
            index: number of the segment, 0 to the number of blocks.
            attended: `[B, tokens, heads, head_dim]`; None for segment 0.
            out: `[B, tokens, 3 C]` to write q, k and v to; None allocates.

        Returns:
            q, k and v `[B, tokens, 3 C]`; None after the last block.
        """
        if index > 0:
            last = index - 1
            injection = None if self.injections is None else self.injections(last)
            self.blocks[last].finish(self.state, attended, self.texts[last], self.modulation[last], injection)
        if index == len(self.blocks):
            return None
        return self.blocks[index].project(self.state, self.modulation[index], out)

    def kind(self) -> tuple:
        """Return everything that graphs of this pass depend on, besides the model itself."""
        hidden, (key, value) = self.state.hidden, self.texts[0]
        backends = tuple(block.text_backend for block in self.blocks)
        sizes = self.modulation.shape, key.shape, None if self.injections is None else self.injections(0).shape
        return self.state.batch, hidden.shape, hidden.dtype, *sizes, value.dtype, backends


class CaptureError(RuntimeError):
    """Raised if a segment cannot be captured as a CUDA graph."""


class CapturedSegments:
    """Run the segments of one kind of pass as CUDA graphs; each is captured the first time it is called.

    Whatever enters or leaves a graph (inputs, the residual stream, q/k/v) is in buffers that were allocated outside of
    every capture, and that the kernels read and write directly. What is allocated while capturing is freed before the
    capture ends: memory of a graph must not be freed or read outside of it. The native allocator of torch tolerates
    that, `cudaMallocAsync` does not.

    Args:
        like: a pass of this kind.
    """

    def __init__(self, like: ForwardSegments) -> None:
        with torch.inference_mode(False):  # buffers are written to in every mode
            state = PassState(torch.empty_like(like.state.hidden), like.state.batch)
            texts = [tuple(torch.empty_like(part) for part in pair) for pair in like.texts]
            # Those of all blocks would take as much memory again: one is copied before each segment.
            self._injection = None if like.injections is None else torch.empty_like(like.injections(0))
            injections = None if like.injections is None else lambda _: self._injection
            self._inputs = ForwardSegments(like.blocks, state, torch.empty_like(like.modulation), texts, injections)
            rows, channels = state.hidden.shape
            self._projected = state.hidden.new_empty(state.batch, rows // state.batch, 3 * channels)
        self._loaded_texts: list[tuple[Tensor, Tensor]] | None = None
        self._attended: Tensor | None = None
        self._injections: Callable[[int], Tensor] | None = None
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(state.hidden.device)

    def load(self, segments: ForwardSegments) -> CapturedSegments:
        """Copy the inputs of a pass to the buffers."""
        self._injections = segments.injections
        self.state.hidden.copy_(segments.state.hidden)
        self._inputs.modulation.copy_(segments.modulation)
        loaded = self._loaded_texts
        if loaded is None or any(new[0] is not old[0] for new, old in zip(segments.texts, loaded, strict=True)):
            for buffers, tensors in zip(self._inputs.texts, segments.texts, strict=True):
                for buffer, tensor in zip(buffers, tensors, strict=True):
                    buffer.copy_(tensor)
            self._loaded_texts = list(segments.texts)
        return self

    @property
    def state(self) -> PassState:
        """State of the pass; after the last segment it holds the output of the blocks."""
        return self._inputs.state

    def __call__(self, index: int, attended: Tensor | None) -> Tensor | None:
        """Run a segment as `ForwardSegments` does; the result is valid until the next call."""
        if attended is not None:
            if self._attended is None:
                with torch.inference_mode(False):
                    self._attended = torch.empty_like(attended)
            self._attended.copy_(attended)
        if attended is not None and self._injections is not None:
            self._injection.copy_(self._injections(index - 1))
        if index == len(self._graphs):
            self._graphs.append(self._capture(index))
        self._graphs[index].replay()
        return self._projected if index < len(self._inputs.blocks) else None

    def _capture(self, index: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            try:
                # Other threads (a decoder, a user interface) may allocate meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    self._inputs(index, self._attended, self._projected)
                    self.state.summed()
                finally:
                    graph.capture_end()
            except RuntimeError as error:
                raise CaptureError(f"{type(error).__name__}: {error}") from error
        return graph


class GraphStore:
    """Keep graphs by kind of pass.

    The first pass of a kind runs without graphs, so that everything is compiled and allocated before the capture.
    """

    def __init__(self) -> None:
        self._captured: dict[tuple, CapturedSegments | None] = {}
        self._disabled = False

    def choose(self, segments: ForwardSegments) -> ForwardSegments | CapturedSegments:
        """Return what runs a pass: its graphs if there are any, else `segments` itself."""
        if self._disabled or not segments.state.hidden.is_cuda or torch.cuda.is_current_stream_capturing():
            return segments
        kind = segments.kind()
        if kind not in self._captured:
            if len(self._captured) == _MAX_KINDS:
                del self._captured[next(iter(self._captured))]
            self._captured[kind] = None
            return segments
        if self._captured[kind] is None:
            self._captured[kind] = CapturedSegments(segments)
        return self._captured[kind].load(segments)

    def disable(self, error: CaptureError) -> None:
        """Run every further pass without graphs, and say why."""
        logger.warning("Transformer passes are launched kernel by kernel, not as CUDA graphs: %s", error)
        self._disabled = True
        self._captured.clear()
