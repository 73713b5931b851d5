"""Decode a video chunk by chunk, with exactly the result of decoding it whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, unpatchify

from ..files.safetensors import TensorSpec
from ..quantization.model import unwrapped
from .fused import install_fast_modules, is_fast


class StreamingVAEDecoder:
    """Decode one stream with a shared `AutoencoderKLWan`.

    Wan's VAE decodes frame by frame through causal convolutions that cache their last inputs. Its `decode` clears this
    cache after every call, so a chunk decoded alone loses frames and starts with a seam. This class keeps the cache
    per
    stream: the chunks together equal one `decode` of the whole video, and streams with one VAE are independent.

    Args:
        vae: the VAE; its state does not change.
        frames_at_once: latent frames that go through the decoder together. More frames take more memory and, on a GPU,
            less time unless the decoder is optimized (`optimize_vae`). The result is bit-identical with 1, and
            otherwise
            differs by the order of float sums. None takes 1 on the CPU or if the decoder is optimized, else all frames
            of a call.

    Raises:
        ValueError: if the VAE is of another class or has tiling enabled.
    """

    def __init__(self, vae: AutoencoderKLWan, frames_at_once: int | None = None) -> None:
        vae = unwrapped(vae)
        if not isinstance(vae, AutoencoderKLWan):
            raise ValueError(f"streaming decode needs an AutoencoderKLWan, got {type(vae).__name__}")
        if vae.use_tiling:
            raise ValueError("streaming decode cannot be combined with VAE tiling; call vae.disable_tiling()")
        self._vae, self._frames_at_once = vae, frames_at_once
        self._memory: list | None = None
        self._statistics: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode the next latent frames of the stream.

        Args:
            latents: normalized latents `[B, C, F, H, W]`, as the transformer sees them.

        Returns:
            Pixels `[B, 3, frames, height, width]` in [-1, 1]: the first latent frame of a stream gives one frame,
            every later one `scale_factor_temporal` frames.
        """
        vae = self._vae
        if hasattr(vae, "_hf_hook") and hasattr(vae._hf_hook, "pre_forward"):
            vae._hf_hook.pre_forward(vae)  # as `vae.decode` does first: CPU offload moves the weights to the device
        device = getattr(getattr(vae, "_hf_hook", None), "execution_device", None)
        hidden = vae.post_quant_conv(self._denormalize(latents.to(device or latents.device, vae.dtype)))
        first = self._memory is None
        if first:
            self._memory = [None] * vae._cached_conv_counts["decoder"]
        pieces = []
        for group in hidden.split(self._groups(hidden, first), dim=2):
            pieces.append(vae.decoder(group, feat_cache=self._memory, feat_idx=[0], first_chunk=first))
            first = False
        pixels = torch.cat(pieces, dim=2)
        if vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        return pixels.clamp(-1.0, 1.0)

    def _groups(self, hidden: torch.Tensor, first: bool) -> list[int]:
        """Return the sizes of the groups of frames; the first frame of a video is decoded alone, since differently."""
        rest = hidden.shape[2] - int(first)
        one_by_one = hidden.device.type == "cpu" or is_fast(self._vae.decoder)
        size = self._frames_at_once or (1 if one_by_one else max(rest, 1))
        full, left = divmod(rest, size)
        return [1] * int(first) + [size] * full + [left] * bool(left)

    def reset(self) -> None:
        """Forget earlier frames: the next latents start a video."""
        self._memory = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the inputs that the convolutions cache; an empty tensor stands for the VAE's mark of a repeated first
        frame.
        """
        memory = self._memory or []
        return {
            str(index): entry if isinstance(entry, torch.Tensor) else torch.empty(0)
            for index, entry in enumerate(memory)
            if entry is not None
        }

    def expected_state(
        self, shape: tuple[int, int, int, int], frames: int, found: Mapping[str, TensorSpec]
    ) -> dict[str, TensorSpec]:
        """Return the tensors of `state_dict` after `frames` latent frames of `shape` `(B, C, H, W)`."""
        with torch.device("meta"):  # shapes only
            like = StreamingVAEDecoder(type(self._vae).from_config(self._vae.config), frames_at_once=1)
            batch, channels, height, width = shape
            for _ in range(min(frames, 3)):  # later ones change nothing
                like.decode(torch.empty(batch, channels, 1, height, width))
        marks = TensorSpec.of(torch.empty(0))
        specs = {name: TensorSpec.of(entry) for name, entry in like.state_dict().items()}
        return {
            name: spec if spec == marks else TensorSpec(spec.shape, self._vae.dtype) for name, spec in specs.items()
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        if not state:
            return self.reset()
        entries: list[torch.Tensor | str | None] = [None] * self._vae._cached_conv_counts["decoder"]
        for index, entry in state.items():
            # A copy: the decoder writes to its cache.
            entries[int(index)] = entry.to(self._vae.device, copy=True) if entry.numel() else "Rep"
        self._memory = entries

    def _denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        if self._statistics is None:  # once per stream: creating a tensor from numbers stalls the device
            self._statistics = latent_statistics(self._vae, latents)
        mean, std = self._statistics
        return latents * std + mean


def latent_statistics(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation of a VAE's latents, `[1, C, 1, 1, 1]`, on the device and in the dtype of `like`."""
    mean, std = (
        torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config["latents_mean"], vae.config["latents_std"])
    )
    return mean, std


def optimize_vae(vae: AutoencoderKLWan, compile_decoder: bool = False) -> None:
    """Make the decoder of a VAE faster on a GPU, in place.

    Convolutions run on channels-last weights, and the operations between them on fused kernels (see `vae.fused`).

    Args:
        compile_decoder: compile it too, with `torch.compile`.
    """
    vae = unwrapped(vae)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
    install_fast_modules(vae.decoder)
    if compile_decoder:
        vae.decoder.compile(dynamic=False)
