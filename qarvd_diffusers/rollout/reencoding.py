"""Encode decoded frames of a stream again, for models whose context needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..files.safetensors import TensorSpec
from .decoder import StatefulDecoder

_FRAME = "frame."  # prefix in the state dict


class ReencodingDecoder:
    """Wrap the decoder of a stream, keep a picture of each of the last latent frames, and encode it as the start of a
    video.

    For models whose context begins with such a frame: a latent frame stands for one picture at the start of a video,
    and for several later on.

    Args:
        decoder: of the stream.
        encode: pixels `[B, 3, 1, height, width]` in [-1, 1] -> normalized latents `[B, C, 1, H, W]`.
        frames: latent frames whose pictures are kept.
        scale: pictures per latent frame.
    """

    def __init__(
        self, decoder: StatefulDecoder, encode: Callable[[torch.Tensor], torch.Tensor], frames: int, scale: int
    ) -> None:
        self._decoder, self._encode, self._frames, self._scale = decoder, encode, frames, scale
        self._pictures: dict[int, torch.Tensor] = {}  # last picture of a latent frame, by its index in the video

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode the next latents, see `Decoder`, and keep the pictures."""
        pixels, count = self._decoder.decode(latents), latents.shape[2]
        following = max(self._pictures, default=-1) + 1
        for index in range(count):
            last = pixels.shape[2] - 1 - self._scale * (count - 1 - index)
            self._pictures[following + index] = pixels[:, :, last : last + 1].clone()
        for frame in sorted(self._pictures)[: -self._frames]:
            del self._pictures[frame]
        return pixels

    def reencode(self, frame: int) -> torch.Tensor:
        """Return latents `[B, C, 1, H, W]` of the last picture of latent frame `frame`, as if a video began there."""
        return self._encode(self._pictures[frame])

    def reset(self) -> None:
        """Forget earlier chunks and their pictures."""
        self._pictures.clear()
        self._decoder.reset()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the decoder's state and the pictures."""
        pictures = {f"{_FRAME}{frame}": picture for frame, picture in self._pictures.items()}
        return {**self._decoder.state_dict(), **pictures}

    def expected_state(
        self, shape: tuple[int, int, int, int], frames: int, found: Mapping[str, TensorSpec]
    ) -> dict[str, TensorSpec] | None:
        """Return what `state_dict` holds, see `StatefulDecoder`; the size of the pictures is that of the first one."""
        names = [f"{_FRAME}{index}" for index in range(max(0, frames - self._frames), frames)]
        picture = next((spec for name in names if (spec := found.get(name))), TensorSpec((), torch.float32))
        dtype = picture.dtype if picture.dtype.is_floating_point else torch.float32
        pictures = dict.fromkeys(names, TensorSpec((shape[0], 3, 1, *picture.shape[3:]), dtype))
        others = self._decoder.expected_state(shape, frames, found)
        return None if others is None else others | pictures

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        own = {name: tensor for name, tensor in state.items() if name.startswith(_FRAME)}
        self._pictures = {int(name.removeprefix(_FRAME)): picture for name, picture in own.items()}
        self._decoder.load_state_dict({name: tensor for name, tensor in state.items() if name not in own})
