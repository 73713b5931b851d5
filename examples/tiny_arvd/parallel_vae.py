"""Whole-clip forward of the stock `AutoencoderKLWan`: the same numbers as `encode`/`decode`, without their frame loop.

The stock loop feeds one latent frame at a time through feature caches. Because every convolution is causal with zero
padding at the start, the whole clip can be computed at once; only the two temporal resamplers need care at frame 0.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample


def _resample(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    if layer.mode == "upsample3d":  # frame 0 stays one frame, every later one becomes two
        first, rest = x[:, :, :1], x[:, :, 1:]
        if rest.shape[2]:
            pair = layer.time_conv(rest).unflatten(1, (2, -1))  # [B, 2, C, T, H, W]
            rest = pair.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x = torch.cat([first, rest], dim=2)
    x = layer(x)  # without a cache: the spatial part alone
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def encode_moments(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """[B, 3, 1 + 4n, H, W] -> moments (mean and log-variance) [B, 2 * z_dim, 1 + n, H / 8, W / 8]."""
    encoder = vae.encoder
    x = encoder.conv_in(video)
    for layer in encoder.down_blocks:
        x = _resample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.mid_block(x)
    return vae.quant_conv(encoder.conv_out(encoder.nonlinearity(encoder.norm_out(x))))


def decode_video(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """[B, z_dim, 1 + n, h, w] -> video [B, 3, 1 + 4n, 8h, 8w], not clamped."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        if block.upsamplers is not None:
            x = _resample(block.upsamplers[0], x)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))


def latent_statistics(vae: AutoencoderKLWan, device) -> tuple[torch.Tensor, torch.Tensor]:
    """The config's per-channel mean and standard deviation, each [1, z_dim, 1, 1, 1]."""
    mean, std = (torch.tensor(values, device=device) for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
