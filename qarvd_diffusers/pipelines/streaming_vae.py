"""`StreamingVAEDecoder`: decode a video piece by piece, exactly as if it were decoded whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify


class StreamingVAEDecoder:
    """Decoder of one stream over a shared `AutoencoderKLWan`.

    Wan's VAE decodes frame by frame through causal convolutions that remember their last inputs, but its `decode` forgets
    them after every call, so that a chunk decoded alone loses frames and starts with a seam. This class keeps that memory
    per stream: pieces joined equal one `decode` of the whole, and streams over one VAE do not disturb each other.

    Args:
        vae: the VAE; none of its state is changed.
        decode_frame: `vae.decoder`, or what `compile_decoder` made of it.

    Raises:
        ValueError: if the VAE is of another class or has tiling switched on.
    """

    def __init__(self, vae: AutoencoderKLWan, decode_frame: Callable[..., torch.Tensor] | None = None) -> None:
        if not isinstance(vae, AutoencoderKLWan):
            raise ValueError(f"streaming decode needs an AutoencoderKLWan, got {type(vae).__name__}")
        if vae.use_tiling:
            raise ValueError("streaming decode cannot be combined with VAE tiling; call vae.disable_tiling()")
        self._vae = vae
        self._decode_frame = vae.decoder if decode_frame is None else decode_frame
        self._memory: list | None = None

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode the next latent frames of the stream.

        Args:
            latents: normalized latents `[B, C, F, H, W]`, as the transformer sees them.

        Returns:
            Pixels `[B, 3, frames, height, width]` in [-1, 1]: the first latent frame of a stream gives one frame, every
            later one `scale_factor_temporal` frames.
        """
        vae = self._vae
        if hasattr(vae, "_hf_hook") and hasattr(vae._hf_hook, "pre_forward"):
            vae._hf_hook.pre_forward(vae)  # what `vae.decode` does first, so that CPU offload brings the weights in
        device = getattr(getattr(vae, "_hf_hook", None), "execution_device", None)
        hidden = vae.post_quant_conv(self._denormalize(latents.to(device or latents.device, vae.dtype)))
        first = self._memory is None
        if first:
            self._memory = [None] * vae._cached_conv_counts["decoder"]
        pieces = []
        for frame in hidden.split(1, dim=2):
            pieces.append(self._decode_frame(frame, feat_cache=self._memory, feat_idx=[0], first_chunk=first))
            first = False
        pixels = torch.cat(pieces, dim=2)
        if vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        return pixels.clamp(-1.0, 1.0)

    def reset(self) -> None:
        """Forget earlier frames: the next ones start a video."""
        self._memory = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the convolutions remember; an empty tensor is the mark that stands for repeated first frames."""
        memory = self._memory or []
        return {
            str(index): entry if isinstance(entry, torch.Tensor) else torch.empty(0)
            for index, entry in enumerate(memory)
            if entry is not None
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where the decoder stood that `state_dict` was called on."""
        if not state:
            return self.reset()
        entries: list[torch.Tensor | str | None] = [None] * self._vae._cached_conv_counts["decoder"]
        for index, entry in state.items():
            entries[int(index)] = entry.to(self._vae.device) if entry.numel() else "Rep"
        self._memory = entries

    def _denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
            for values in (self._vae.config.latents_mean, self._vae.config.latents_std)
        )
        return latents * std + mean


def compile_decoder(vae: AutoencoderKLWan, channels_last: bool = True, **options: Any) -> Callable[..., torch.Tensor]:
    """The VAE's decoder compiled for streaming: one graph each for the first, the second and all later frames of a video.

    Args:
        vae: stays as it is, but for the memory layout of its decoder's weights.
        channels_last: lay convolution weights out with the channels last, which GPUs convolve faster.
        **options: those of `torch.compile`; `dynamic=False, fullgraph=True` unless said otherwise.
    """
    if channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for parameter in vae.decoder.parameters():
            if parameter.ndim in formats:
                parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
    return torch.compile(vae.decoder, **{"dynamic": False, "fullgraph": True, **options})
