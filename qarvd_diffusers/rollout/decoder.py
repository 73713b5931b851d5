"""Declare what a stream needs of a decoder, and check a decoder that the caller passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from ..files.safetensors import TensorSpec


@runtime_checkable
class Decoder(Protocol):
    """Decode the chunks of one stream; `reset`, `state_dict`, `load_state_dict` of `StatefulDecoder` are optional."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode the next latents `[B, C, F, H, W]` to pixels `[B, 3, frames, height, width]` in [-1, 1]."""


class StatefulDecoder(Decoder, Protocol):
    """Decode the chunks of one stream, with memory of earlier chunks that can be cleared, saved and restored."""

    def reset(self) -> None:
        """Forget earlier chunks: the next latents start a video."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the memory of earlier chunks; raises ValueError if it cannot be saved."""

    def expected_state(
        self, shape: tuple[int, int, int, int], frames: int, found: Mapping[str, TensorSpec]
    ) -> dict[str, TensorSpec] | None:
        """Return the tensors of `state_dict` after `frames` latent frames of `shape` `(B, C, H, W)`, given those that
        are `found`; None if the decoder does not say.
        """

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned; raises ValueError if that is not possible."""


class CheckedDecoder:
    """Complete any `Decoder` to a `StatefulDecoder`, and check the shape of its pixels.

    Args:
        decoder: without `reset`, it is taken to remember nothing; without `state_dict`, its stream cannot be saved.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode the next latents, see `Decoder`.

        Raises:
            ValueError: if the pixels have another shape.
        """
        pixels = self._decoder.decode(latents)
        if pixels.ndim != 5 or pixels.shape[:2] != (latents.shape[0], 3):
            raise ValueError(
                f"the decoder ({type(self._decoder).__name__}) gave {list(pixels.shape)}, expected pixels "
                f"[{latents.shape[0]}, 3, frames, height, width] in [-1, 1]"
            )
        return pixels

    def reset(self) -> None:
        """Forget earlier chunks."""
        if (reset := getattr(self._decoder, "reset", None)) is not None:
            reset()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the memory of earlier chunks.

        Raises:
            ValueError: if the decoder has no `state_dict`.
        """
        return self._method("state_dict", "saved")()

    def expected_state(
        self, shape: tuple[int, int, int, int], frames: int, found: Mapping[str, TensorSpec]
    ) -> dict[str, TensorSpec] | None:
        """Return what the decoder's own `expected_state` does; None without one."""
        method = getattr(self._decoder, "expected_state", None)
        return None if method is None else method(shape, frames, found)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: if the decoder has no `load_state_dict`.
        """
        self._method("load_state_dict", "restored")(state)

    def _method(self, name: str, purpose: str) -> Callable[..., Any]:
        method = getattr(self._decoder, name, None)
        if method is None:
            raise ValueError(f"a {type(self._decoder).__name__} cannot be {purpose}: it has no {name}()")
        return method


def check_decoder(
    decoder: Decoder | Callable[[], Decoder], channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> CheckedDecoder:
    """Return the decoder that the caller passed, or that the caller's function makes, if it fits the model's latents.

    Args:
        decoder: an object with `decode`, or a class or function that makes one. `latents_mean` and `latents_std` (a
            number per channel) say which latents it was made for: those of the VAE whose normalized latents it
            decodes.
        channels: latent channels of the transformer.
        mean: of the pipeline's VAE; None if it has none, and only the number of channels can be compared.
        std: see `mean`.

    Raises:
        ValueError: if the object cannot decode, or was made for other latents.
    """
    instance: Any = decoder
    if isinstance(decoder, type) or (callable(decoder) and not isinstance(decoder, Decoder)):
        instance = decoder()
    name = type(instance).__name__
    if not callable(getattr(instance, "decode", None)):
        raise ValueError(f"decoder is a {name}, expected an object with decode(latents), or a function that makes one")
    for key, expected in (("latents_mean", mean), ("latents_std", std)):
        values = getattr(instance, key, None)
        if values is None:
            raise ValueError(f"the decoder ({name}) does not say what latents it was made for: give it {key}")
        got = torch.as_tensor(values, dtype=torch.float32).flatten().cpu()
        if len(got) != channels:
            raise ValueError(f"the decoder ({name}) is made for {len(got)} latent channels, the model has {channels}")
        if expected is not None and not torch.allclose(got, torch.tensor(expected), atol=1e-3):
            raise ValueError(
                f"the decoder ({name}) was made for latents of other statistics: its {key} is off by up to "
                f"{(got - torch.tensor(expected)).abs().max():.3g} from that of the pipeline's VAE"
            )
    return CheckedDecoder(instance)
