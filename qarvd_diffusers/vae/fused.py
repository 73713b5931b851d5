"""Replace modules in the decoder of Wan's VAE by fused ones, which read and write memory less often.

A chunk at 832x480 is a tensor of 0.9 GB before every convolution of the last stage. For a norm, a SiLU, cached frames
and padding, diffusers reads or writes such a tensor about twenty times; the fused modules read and write it once. Each
class computes what its base class computes, without gradients. Installing changes the class of a module: parameters,
names and hooks stay.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanDecoder3d,
    WanResidualBlock,
    WanRMS_norm,
    WanUpsample,
)
from torch import nn

import qarvd_kernels as ops

_REMEMBERED = 2  # past frames that a convolution over three frames needs


class FastCausalConv3d(WanCausalConv3d):
    """Convolve with implicit spatial padding."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve `[B, C, F, H, W]`, after the past frames `cache_x`; missing past frames are zero."""
        pieces, missing = [x], self._padding[4]
        if missing and cache_x is not None:
            pieces.insert(0, cache_x.to(x.device))
            missing -= cache_x.shape[2]
        if missing:
            pieces.insert(0, x.new_zeros(*x.shape[:2], missing, *x.shape[3:]))
        return self.convolve(torch.cat(pieces, dim=2) if len(pieces) > 1 else x, self.bias)

    def convolve(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Convolve `x`, past frames in front. torch adds a bias in a separate pass: leave it to the next module if
        possible.
        """
        return F.conv3d(x, self.weight, bias, self.stride, (0, self._padding[2], self._padding[0]))


class FastNormSiLU(WanRMS_norm):
    """Apply the norm and the SiLU after it."""

    def forward(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        past: torch.Tensor | None = None,
        lead: int = 0,
    ) -> torch.Tensor:
        """Map `[B, C, F, H, W]` to `[B, C, lead + F, H, W]`, channels-last; the other arguments are those of
        `rms_norm_silu`.
        """
        past = None if past is None else _rows(past)
        out = ops.rms_norm_silu(_rows(x), bias, self.gamma.flatten(), past, lead)
        return out.unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)


class FastResidualBlock(WanResidualBlock):
    """Let norms write into the input of the next convolution, and add the bias of the one before."""

    def forward(
        self, x: torch.Tensor, feat_cache: list | None = None, feat_idx: list[int] | None = None
    ) -> torch.Tensor:
        """Map `[B, C, F, H, W]` to `[B, C_out, F, H, W]`, channels-last; updates `feat_cache` and `feat_idx`."""
        memory = feat_cache if feat_cache is not None else [None, None]
        place = feat_idx if feat_idx is not None else [0]
        hidden, bias = x, None
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            hidden = norm(hidden, bias, memory[place[0]], _REMEMBERED)
            memory[place[0]] = _kept(hidden[:, :, -_REMEMBERED:], memory[place[0]])
            place[0] += 1
            hidden, bias = conv.convolve(hidden, None), conv.bias
        # Summed in place: the callers of a block do not use its input again, but keep a reference to it.
        total = _flat(self.conv_shortcut(x))
        ops.add_bias(total, _flat(hidden), bias)
        return total.view(hidden.shape[0], *hidden.shape[2:], -1).permute(0, 4, 1, 2, 3)


class FastUpsample(WanUpsample):
    """Repeat pixels in their own dtype, channels-last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale_factor != (2.0, 2.0):
            return super().forward(x)
        pixels = x.permute(0, 2, 3, 1)
        if pixels.is_contiguous() and pixels.shape[3] * x.element_size() % 8 == 0:
            pixels = pixels.view(torch.int64)  # torch copies a repeated tensor element by element
        batch, height, width, words = pixels.shape
        pixels = pixels[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
        return pixels.reshape(batch, 2 * height, 2 * width, words).view(x.dtype).permute(0, 3, 1, 2)


def _kept(frames: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    """Copy `frames`, into the old tensor if it fits: long-lived memory that moves would fragment the allocator."""
    if old is None or old.shape != frames.shape or old.stride(1) != frames.stride(1):
        return frames.clone()
    return old.copy_(frames)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """Flatten `[B, C, F, H, W]` to `[B * F * H * W, C]`."""
    return x.permute(0, 2, 3, 4, 1).flatten(0, 3)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Flatten `[B, C, F, H, W]` to `[B, F, H * W, C]`, without a copy if memory is channels-last."""
    return x.permute(0, 2, 3, 4, 1).flatten(2, 3)


def is_fast(decoder: WanDecoder3d) -> bool:
    """Return whether a decoder has the fused modules."""
    return any(isinstance(module, FastResidualBlock) for module in decoder.modules())


def install_fast_modules(decoder: WanDecoder3d) -> None:
    """Install the fused modules in a decoder; modules without a fused one (those of Wan 2.2) stay."""
    for module in list(decoder.modules()):
        if type(module) is WanResidualBlock and isinstance(module.nonlinearity, nn.SiLU):
            module.__class__ = FastResidualBlock
            module.norm1.__class__ = module.norm2.__class__ = FastNormSiLU
        elif type(module) is WanCausalConv3d and module.stride[1:] == (1, 1):
            module.__class__ = FastCausalConv3d
        elif type(module) is WanUpsample:
            module.__class__ = FastUpsample
    if type(decoder.norm_out) is WanRMS_norm and isinstance(decoder.nonlinearity, nn.SiLU):
        decoder.norm_out.__class__ = FastNormSiLU
        decoder.nonlinearity = nn.Identity()
