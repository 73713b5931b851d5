"""`ReencodingDecoder`: a stream's decoder that can give a decoded frame back as latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .decode_queue import Decoder

_FRAME = "frame."  # prefix in the state dict


class ReencodingDecoder:
    """Wraps the decoder of a stream and keeps a picture of each of the last latent frames, to be encoded as a start.

    For models whose context begins with such a frame: inside a video a latent frame stands for several pictures, at its
    start for one.

    Args:
        decoder: of the stream.
        encode: pixels `[B, 3, 1, height, width]` in [-1, 1] -> normalized latents `[B, C, 1, H, W]`.
        frames: latent frames whose pictures are kept.
        scale: pictures per latent frame.
    """

    def __init__(
        self, decoder: Decoder, encode: Callable[[torch.Tensor], torch.Tensor], frames: int, scale: int
    ) -> None:
        self._decoder, self._encode, self._frames, self._scale = decoder, encode, frames, scale
        self._pictures: dict[int, torch.Tensor] = {}  # last picture of a latent frame, by its index in the video

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `Decoder`."""
        pixels, count = self._decoder.decode(latents), latents.shape[2]
        following = max(self._pictures, default=-1) + 1
        for index in range(count):
            last = pixels.shape[2] - 1 - self._scale * (count - 1 - index)
            self._pictures[following + index] = pixels[:, :, last : last + 1].clone()
        for frame in sorted(self._pictures)[: -self._frames]:
            del self._pictures[frame]
        return pixels

    def reencode(self, frame: int) -> torch.Tensor:
        """Latents `[B, C, 1, H, W]` of the last picture of latent frame `frame`, as if a video began with it."""
        return self._encode(self._pictures[frame])

    def reset(self) -> None:
        """Forget everything."""
        self._pictures.clear()
        getattr(self._decoder, "reset", lambda: None)()

    def state_dict(self) -> dict[str, Any]:
        """The decoder's, and the pictures."""
        pictures = {f"{_FRAME}{frame}": picture for frame, picture in self._pictures.items()}
        return {**self._decoder.state_dict(), **pictures}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where the decoder stood that `state_dict` was called on."""
        own = {name: tensor for name, tensor in state.items() if name.startswith(_FRAME)}
        self._pictures = {int(name.removeprefix(_FRAME)): picture for name, picture in own.items()}
        self._decoder.load_state_dict({name: tensor for name, tensor in state.items() if name not in own})
