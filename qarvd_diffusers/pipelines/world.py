"""Steer a world model: turn what a user does in each chunk into the tensors that its transformer reads."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..controls.camera import Intrinsics, action_tensor, camera_tensor
from ..controls.control import Control
from ..controls.recording import Recording, read_controls
from ..rollout.inputs import StreamInputs
from ..rollout.steerable import SteerableMixin
from ..rollout.steering import ControlSource

_CAMERA, _ACTIONS = 6, 7  # values per pixel: origin and ray, or ray and four keys


@dataclasses.dataclass(frozen=True)
class WorldControls:
    """Return the controls of each chunk as a tensor `[B or 1, control_channels, F, h, w]`.

    Attributes:
        source: `Control`, what `Control.of` reads, or a finished tensor, of each chunk.
        inputs: of the stream.
        control_dim: of the transformer.
        pixels: height and width of a frame.
    """

    source: ControlSource
    inputs: StreamInputs
    control_dim: int
    pixels: tuple[int, int]

    _latest: dict[int, Any] = dataclasses.field(default_factory=dict)

    def entry(self, chunk: int) -> Any:
        """Return the entry of a chunk; the source is asked once."""
        if chunk not in self._latest:
            self._latest.clear()
            self._latest[chunk] = self.source(chunk)
        return self._latest[chunk]

    def __call__(self, chunk: int) -> Tensor:
        """Return the tensor of a chunk."""
        return self.tensor(self.entry(chunk), chunk, f"controls of chunk {chunk}")

    def event(self, chunk: int) -> str | None:
        """Return the prompt that a chunk switches to, or None."""
        value = self.entry(chunk)
        return None if isinstance(value, Tensor) else Control.of(value).event

    def tensor(self, value: Any, chunk: int, name: str) -> Tensor:
        """Return what the transformer reads for an entry of the source.

        Raises:
            ValueError: it does not fit the chunk; names it as `name`.
        """
        frames = self.inputs.fields.chunk_frames(chunk)
        if isinstance(value, Tensor):
            batch, _, *size = self.inputs.shape
            expected = (self.control_dim * 64, frames, *size)
            if value.ndim != 5 or value.shape[1:] != expected or value.shape[0] not in (1, batch):
                raise ValueError(
                    f"{name} have shape {list(value.shape)}, expected [{batch} or 1, {', '.join(map(str, expected))}]"
                )
            return value.clone()  # the caller may write other values to it for the next chunk
        control = Control.of(value, name)
        control.check_frames(frames, name)
        moves = control.frame_motions(frames, first=chunk == 0)
        camera = control.intrinsics or Intrinsics.default()
        if self.control_dim == _ACTIONS:
            return action_tensor(moves, control.flags(frames), camera, *self.pixels)
        return camera_tensor(moves, camera, *self.pixels)


class WorldMixin(SteerableMixin):
    """Let an `ARVDPipeline` take controls if its transformer has layers for them."""

    if TYPE_CHECKING:  # the host's
        config: Mapping[str, Any]
        transformer: Any
        vae_scale_factor_spatial: int
        vae_scale_factor_temporal: int

    def steered_by(self, inputs: StreamInputs, controls: Any) -> StreamInputs:
        """See `SteerableMixin.steered_by`; `controls` may also be a `Recording` or its file."""
        if isinstance(controls, str | os.PathLike):
            controls = read_controls(controls)
        if isinstance(controls, Recording):
            fields, scale = inputs.fields, self.vae_scale_factor_temporal
            chunks = None if inputs.num_chunks is None else [frames for *_, frames in fields.chunks(inputs.num_chunks)]
            fps = self.config.get("fps")
            controls = controls.control if chunks is None else controls.controls(chunks, fps, scale)
        return super().steered_by(inputs, controls)

    def prepare_controls(
        self, source: ControlSource, inputs: StreamInputs, chunks: Iterable[int] = ()
    ) -> WorldControls:
        """See `SteerableMixin.prepare_controls`; entries are those of `WorldControls.source`."""
        config: Mapping[str, Any] = self.transformer.config
        dim = config.get("control_dim")
        if dim is None:
            raise ValueError("controls were passed, but this model takes none: leave them out")
        if dim not in (_CAMERA, _ACTIONS):
            raise ValueError(
                f"the transformer reads {dim} values per pixel (control_dim), expected {_CAMERA} (a camera) or "
                f"{_ACTIONS} (a ray and four keys)"
            )
        pixels = tuple(self.vae_scale_factor_spatial * size for size in inputs.shape[2:])
        prepared = WorldControls(source, inputs, dim, pixels)
        for chunk in chunks:
            prepared.tensor(source(chunk), chunk, f"controls of chunk {chunk}")
        return prepared

    def held(self, entry: Any, inputs: StreamInputs) -> ControlSource:
        """See `SteerableMixin.held`; the mouse and an event act in the first chunk alone."""
        begun: list[int] = []

        def source(chunk: int) -> Any:
            begun.append(chunk)
            return entry if isinstance(entry, Tensor) or chunk == begun[0] else Control.of(entry).later()

        prepared = self.prepare_controls(source, inputs)
        prepared.tensor(entry, 1, "controls")  # like any chunk but the first
        return prepared

    def with_default_controls(self, inputs: StreamInputs) -> StreamInputs:
        """Let the camera of a world model stand still."""
        if "control_dim" not in self.transformer.config:
            return inputs
        return dataclasses.replace(inputs, controls=self.prepare_controls(lambda chunk: None, inputs))
