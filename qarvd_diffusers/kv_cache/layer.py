"""Store the keys and values of one transformer block."""

from __future__ import annotations

import torch

from .storage import allocate, decode, encode, fit_scale, is_quantized

# Room above the first chunk's largest value: see benchmarks/kv_cache.py. A float code is as precise under a larger
# scale.
_SCALE_MARGINS = {torch.int8: 1.25, torch.float8_e4m3fn: 4.0}


class KVLayerCache:
    """Hold the keys and values of one transformer block.

    The `KVCache` does the bookkeeping: `update` only moves tensors, so that it compiles without graph breaks.

    Attributes:
        key: keys after RoPE (before it in window mode), preallocated `[B, capacity or a little more, heads, head_dim]`
            in storage order (sink first), in the storage dtype; None before the first pass.
        value: see `key`; `storage.allocate` decides the memory layout.
        key_scale: `[B, heads]` float32 (`[heads]` if set by the caller, or saved by an earlier version) if the storage
            has 8 bits, value = code * scale; else None.
        value_scale: see `key_scale`.
        text_key: cross-attention keys of the prompt `[B, text_tokens, heads, head_dim]`, or None.
        text_value: see `text_key`.
        scales_given: the caller set the scales, and passes do not change them.
    """

    def __init__(self) -> None:
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None
        self.key_scale: torch.Tensor | None = None
        self.value_scale: torch.Tensor | None = None
        self.text_key: torch.Tensor | None = None
        self.text_value: torch.Tensor | None = None
        self.scales_given = False

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `key` and `value`, which `reserve` has allocated."""
        assert self.key is not None and self.value is not None
        return self.key, self.value

    def update(self, key: torch.Tensor, value: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the current chunk's K/V `[B, tokens, heads, head_dim]` at token `start`; return all that it can see.

        If the storage has another dtype, the pass sees the past as stored and the current chunk at full precision.
        With gradients enabled, the past is constant and the current chunk's K/V keep their graph.
        """
        stop = start + key.shape[1]
        self.write(key, value, start)
        keys, values = self.buffers()
        if keys.dtype == key.dtype and not torch.is_grad_enabled():
            return keys[:, :stop], values[:, :stop]
        # Buffers are overwritten by the next pass; autograd must not have saved views of them.
        past_key, past_value = self.read(0, start, key.dtype)
        return torch.cat([past_key, key], dim=1), torch.cat([past_value, value], dim=1)

    def write(self, key: torch.Tensor, value: torch.Tensor, start: int) -> None:
        """Write K/V `[B, tokens, heads, head_dim]` at token `start`."""
        if start == 0:
            self.fit_scales(key, value)
        stop = start + key.shape[1]
        keys, values = self.buffers()
        keys[:, start:stop] = encode(key.detach(), self.key_scale, keys.dtype)
        values[:, start:stop] = encode(value.detach(), self.value_scale, values.dtype)

    def read(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of the tokens `start:stop` in `dtype`."""
        keys, values = self.buffers()
        return (
            decode(keys[:, start:stop], self.key_scale, dtype),
            decode(values[:, start:stop], self.value_scale, dtype),
        )

    def fit_scales(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Widen the scales to hold a pass that sees nothing stored, so that every code is stored under the current
        scale.

        `update` calls it for every pass at token 0: after the passes of the first chunk the scales are fixed. It does
        nothing unless `fits_scales`.
        """
        if not self.fits_scales:
            return
        dtype = self.buffers()[0].dtype
        for name, tensor in (("key_scale", key), ("value_scale", value)):
            scale, old = fit_scale(tensor, dtype, _SCALE_MARGINS[dtype]), getattr(self, name)
            setattr(self, name, scale if old is None else torch.maximum(old, scale))

    @property
    def fits_scales(self) -> bool:
        """Whether a pass at token 0 has to set scales: if storage has 8 bits and the caller set none; in float8 only
        once.
        """
        dtype = self.buffers()[0].dtype
        if not is_quantized(dtype) or self.scales_given:
            return False
        return dtype == torch.int8 or self.key_scale is None

    def rotate_keys_back(self, cos: torch.Tensor, sin: torch.Tensor, stop: int) -> None:
        """Rotate the stored keys up to token `stop` back by one angle per pair of channels.

        8-bit codes are decoded, rotated and stored under the same scale.

        Args:
            cos: `[pairs]`, cosines for the leading pairs; the other channels stay.
            sin: `[pairs]`, sines.
            stop: first token that stays.
        """
        buffer, width = self.buffers()[0], 2 * len(cos)
        keys = decode(buffer[:, :stop], self.key_scale, torch.float32)
        first, second = keys[..., :width].unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack((first * cos + second * sin, second * cos - first * sin), dim=-1).flatten(-2)
        buffer[:, :stop] = encode(torch.cat([rotated, keys[..., width:]], dim=-1), self.key_scale, buffer.dtype)

    def ema_into_sink(self, sink: int, start: int, keep: float) -> None:
        """Average the tokens `start:start + sink` into the first `sink` tokens, which keep the share `keep`."""
        for buffer, scale in zip(self.buffers(), (self.key_scale, self.value_scale), strict=True):
            old, new = (decode(buffer[:, at : at + sink], scale, torch.float32) for at in (0, start))
            buffer[:, :sink] = encode(keep * old + (1 - keep) * new, scale, buffer.dtype)

    def store_text(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep the cross-attention K/V `[B, text_tokens, heads, head_dim]` of the prompt."""
        self.text_key, self.text_value = key, value

    def get_text(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the cross-attention K/V of the prompt, or None before the first pass."""
        if self.text_key is None or self.text_value is None:
            return None
        return self.text_key, self.text_value

    def reserve(self, tokens: int, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        """Make room for `tokens` tokens of shape `(batch, heads, head_dim)` and keep what is stored."""
        batch, heads, head_dim = shape
        for name in ("key", "value"):
            new = allocate((batch, tokens, heads, head_dim), dtype, device, values=name == "value")
            if (old := getattr(self, name)) is not None:
                new[:, : old.shape[1]] = old
            setattr(self, name, new)

    def drop(self, start: int, stop: int, used: int) -> None:
        """Forget the tokens `start:stop` of the `used` ones; later ones move up."""
        for buffer in self.buffers():
            buffer[:, start : start + used - stop] = buffer[:, stop:used].clone()

    def reset_text(self) -> None:
        """Forget the cross-attention K/V of the prompt."""
        self.text_key = self.text_value = None
