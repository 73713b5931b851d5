"""What a fused pass computes between its self-attentions, launched piece by piece or as CUDA graphs.

These stretches are the same in every pass of one shape: a dozen kernels each, that a graph launches at once. Attention and
the storing of K/V stay outside, because they change with the cache; so one set of graphs serves every chunk, stream and
prompt, whatever the length, window or storage of the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .block import FusedBlock, PassState

logger = logging.getLogger(__name__)
_MOST_KINDS = 2  # of passes that keep their graphs; each holds the activations of a stretch


@dataclass
class Stretches:
    """The stretches of one pass: number `i` lies between the self-attentions of blocks `i - 1` and `i`.

    Attributes:
        blocks: of the model.
        state: of the pass; after the last stretch it holds the output of the blocks.
        modulation: float32 `[blocks, 6, groups, C]`.
        texts: cross-attention K/V of the prompt for every block.
    """

    blocks: Sequence[FusedBlock]
    state: PassState
    modulation: Tensor
    texts: Sequence[tuple[Tensor, Tensor]]

    def __call__(self, index: int, attended: Tensor | None) -> Tensor | None:
        """Finish block `index - 1` with its attention's output `[B, tokens, heads, head_dim]`; project q, k and v of the next.

        Returns:
            `[B, tokens, 3 C]`, valid until the next call; None after the last block.
        """
        if index > 0:
            before = index - 1
            self.blocks[before].finish(self.state, attended, self.texts[before], self.modulation[before])
        return self.blocks[index].project(self.state, self.modulation[index]) if index < len(self.blocks) else None

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """`[B, tokens, 3 C]` of q, k and v."""
        rows, channels = self.state.hidden.shape
        return self.state.batch, rows // self.state.batch, 3 * channels

    def kind(self) -> tuple:
        """What graphs of this pass depend on, besides the model itself."""
        hidden, (key, value) = self.state.hidden, self.texts[0]
        backends = tuple(block.text_backend for block in self.blocks)
        return self.state.batch, hidden.shape, hidden.dtype, self.modulation.shape, key.shape, value.dtype, backends


class CaptureError(RuntimeError):
    """A stretch could not become a graph."""


class CapturedStretches:
    """Stretches as CUDA graphs, captured one by one when first called.

    Whatever crosses the border of a graph (inputs, the residual stream, q/k/v) lies in buffers that were allocated outside of
    every capture. What is allocated while capturing is freed before the capture ends: memory of a graph must not be freed or
    read outside of it, which torch's own allocator forgives and `cudaMallocAsync` does not.
    """

    def __init__(self, like: Stretches) -> None:
        with torch.inference_mode(False):  # buffers are written in every mode
            state = PassState(torch.empty_like(like.state.hidden), like.state.batch)
            texts = [tuple(torch.empty_like(part) for part in pair) for pair in like.texts]
            self._inputs = Stretches(like.blocks, state, torch.empty_like(like.modulation), texts)
        self._hidden = state.hidden
        self._output: Tensor | None = None  # of every stretch but the last; they have one shape
        self._held_texts: list[tuple[Tensor, Tensor]] | None = None
        self._attended: Tensor | None = None
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(state.hidden.device)

    def load(self, given: Stretches) -> CapturedStretches:
        """Take over the inputs of a pass."""
        self._hidden.copy_(given.state.hidden)
        self._inputs.modulation.copy_(given.modulation)
        held = self._held_texts
        if held is None or any(new[0] is not old[0] for new, old in zip(given.texts, held, strict=True)):
            for buffers, tensors in zip(self._inputs.texts, given.texts, strict=True):
                for buffer, tensor in zip(buffers, tensors, strict=True):
                    buffer.copy_(tensor)
            self._held_texts = list(given.texts)
        return self

    @property
    def state(self) -> PassState:
        """Of the pass, after its last stretch."""
        return PassState(self._hidden, self._inputs.state.batch)

    def __call__(self, index: int, attended: Tensor | None) -> Tensor | None:
        """As `Stretches`."""
        if attended is not None:
            self._attended = self._filled(self._attended, attended)
        if index == len(self._graphs):
            self._graphs.append(self._capture(index))
        self._graphs[index].replay()
        return self._output if index < len(self._inputs.blocks) else None

    @staticmethod
    def _filled(buffer: Tensor | None, tensor: Tensor) -> Tensor:
        if buffer is None:
            with torch.inference_mode(False):
                buffer = torch.empty_like(tensor)
        return buffer.copy_(tensor)

    def _capture(self, index: int) -> torch.cuda.CUDAGraph:
        if self._output is None and index < len(self._inputs.blocks):
            with torch.inference_mode(False):
                self._output = self._hidden.new_empty(self._inputs.output_shape)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            try:
                # Other threads (a decoder, a user interface) may go on allocating.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    self._run(index)
                finally:
                    graph.capture_end()
            except RuntimeError as error:
                raise CaptureError(f"{type(error).__name__}: {error}") from error
        return graph

    def _run(self, index: int) -> None:
        """Run a stretch from the buffers into the buffers."""
        output = self._inputs(index, self._attended)
        if output is not None:
            self._output.copy_(output)
        state = self._inputs.state
        if state.summed() is not self._hidden:
            self._hidden.copy_(state.hidden)
            state.hidden = self._hidden


class GraphStore:
    """Graphs by kind of pass. A kind runs once without, so that everything is compiled and allocated before the capture."""

    def __init__(self) -> None:
        self._captured: dict[tuple, CapturedStretches | None] = {}
        self._refused = False

    def of(self, given: Stretches) -> Stretches | CapturedStretches:
        """The stretches to run: graphs, where they can be had."""
        hidden = given.state.hidden
        if self._refused or not hidden.is_cuda or torch.cuda.is_current_stream_capturing():
            return given
        kind = given.kind()
        if kind not in self._captured:
            if len(self._captured) == _MOST_KINDS:
                del self._captured[next(iter(self._captured))]
            self._captured[kind] = None
            return given
        if self._captured[kind] is None:
            self._captured[kind] = CapturedStretches(given)
        return self._captured[kind].load(given)

    def refuse(self, error: CaptureError) -> None:
        """Go on without graphs."""
        logger.warning("Transformer passes are launched kernel by kernel, not as CUDA graphs: %s", error)
        self._refused = True
        self._captured.clear()
