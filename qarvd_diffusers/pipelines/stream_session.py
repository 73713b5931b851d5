"""`StreamSession`: what a `Stream` and the generator behind it share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..models.pass_info import PassInfo
from .chunk_loop import ChunkLoop
from .decoding import Decoder
from .inputs import StreamInputs

if TYPE_CHECKING:
    from .stream_state import SavedStream


@dataclass
class StreamSession:
    """What a stream and the generator behind it share; the generator does not know the stream, so that dropping the
    stream ends it at once.

    Attributes:
        inputs: what the stream was started from.
        text: arguments of `encode_prompt`.
        output_type: see `Frames`.
        kv_cache: storage of the K/V cache.
        overlap_decoding: see `ARVDMixin.stream`.
        callback: `callback_on_step_end` and the names of the tensors that it gets.
        on_pass: see `ARVDMixin.stream`.
        make_decoder: makes the stream's decoder; None takes the pipeline's.
        saved: state to go on from; None starts at the beginning.
        loop: while the stream is alive.
        decoder: while the stream is alive; None where nothing needs pixels.
        prompt: `(arguments of encode_prompt, how)` that wait for the next chunk.
        closing: the stream is to end as soon as possible.
    """

    inputs: StreamInputs
    text: dict[str, Any]
    output_type: str
    kv_cache: str = "auto"
    overlap_decoding: bool = False
    callback: tuple[Callable | None, tuple[str, ...]] = (None, ())
    on_pass: Callable[[PassInfo], None] | None = None
    make_decoder: Callable[[], Decoder] | None = None
    saved: SavedStream | None = None
    loop: ChunkLoop | None = None
    decoder: Decoder | None = None
    prompt: tuple[dict[str, Any], str] | None = None
    closing: bool = False

    def release(self) -> None:
        """Give all memory back, also where a traceback still holds the objects that used it."""
        for part, method in ((self.loop and self.loop.cache, "clear"), (self.decoder, "reset")):
            getattr(part, method, lambda: None)()
        if self.loop is not None:
            self.loop.on_step = self.loop.before_chunk = self.loop.reencode = None  # these refer back to the loop
        self.loop = self.decoder = None
