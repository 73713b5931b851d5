"""`KVCache`: keys and values of earlier chunks, and of the prompt, for a causal video transformer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .storage import STORAGES, allocate, check_storage, decode, encode, fit_scale, is_quantized

_FIRST_CHUNKS = 4  # room of a full cache of unknown length; each doubling moves buffers and recompiles compiled blocks
# Room above the first chunk's largest value: see benchmarks/kv_cache.py. A float code is as precise under a larger scale.
_SCALE_MARGINS = {torch.int8: 1.25, torch.float8_e4m3fn: 4.0}
_FACTS = (
    "frames",
    "origin",
    "shift",
    "pinned",
    "_shot",
    "_next_frame",
    "_tokens_per_frame",
    "_capacity",
)  # bookkeeping of a saved cache


class KVLayerCache:
    """Keys and values of one transformer block.

    Bookkeeping is the `KVCache`'s: `update` only moves tensors, so that it compiles without graph breaks.

    Attributes:
        key: keys after RoPE (before it in window mode), preallocated `[B, capacity or a little more, heads, head_dim]` in
            storage order (sink first), in the storage dtype; None before the first pass.
        value: see `key`; how it lies in memory is up to `kv_storage.allocate`.
        key_scale: `[B, heads]` float32 (`[heads]` where it was given, or saved by an earlier version) if the storage has 8 bits,
            value = code * scale; else None.
        value_scale: see `key_scale`.
        text_key: cross-attention keys of the prompt `[B, text_tokens, heads, head_dim]`, or None.
        text_value: see `text_key`.
        scales_given: the scales were given, and passes do not set them.
    """

    def __init__(self) -> None:
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None
        self.key_scale: torch.Tensor | None = None
        self.value_scale: torch.Tensor | None = None
        self.text_key: torch.Tensor | None = None
        self.text_value: torch.Tensor | None = None
        self.scales_given = False

    def update(self, key: torch.Tensor, value: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the current chunk's K/V `[B, tokens, heads, head_dim]` at token `start`; return all that it can see.

        Of storage in another dtype the pass sees the past as stored and the current chunk at full precision. With
        gradients enabled the past is constant and the current chunk's K/V keep their graph.
        """
        stop = start + key.shape[1]
        self.write(key, value, start)
        if self.key.dtype == key.dtype and not torch.is_grad_enabled():
            return self.key[:, :stop], self.value[:, :stop]
        # Buffers are overwritten by the next pass; autograd must not have saved views of them.
        past_key, past_value = self.read(0, start, key.dtype)
        return torch.cat([past_key, key], dim=1), torch.cat([past_value, value], dim=1)

    def write(self, key: torch.Tensor, value: torch.Tensor, start: int) -> None:
        """Write K/V `[B, tokens, heads, head_dim]` at token `start`."""
        if start == 0:
            self.fit_scales(key, value)
        stop = start + key.shape[1]
        self.key[:, start:stop] = encode(key.detach(), self.key_scale, self.key.dtype)
        self.value[:, start:stop] = encode(value.detach(), self.value_scale, self.value.dtype)

    def read(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the tokens `start:stop` in `dtype`."""
        return (
            decode(self.key[:, start:stop], self.key_scale, dtype),
            decode(self.value[:, start:stop], self.value_scale, dtype),
        )

    def fit_scales(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Widen the scales to hold a pass that sees nothing stored, so that no code stands under an older scale.

        Called by `update` for every pass at token 0: after the passes of the first chunk the scales stand. Does nothing
        where `fits_scales` says so.
        """
        if not self.fits_scales:
            return
        for name, tensor in (("key_scale", key), ("value_scale", value)):
            margin = _SCALE_MARGINS[self.key.dtype]
            scale, old = fit_scale(tensor, self.key.dtype, margin), getattr(self, name)
            setattr(self, name, scale if old is None else torch.maximum(old, scale))

    @property
    def fits_scales(self) -> bool:
        """Whether a pass at token 0 has to set scales: of 8-bit storage whose scales were not given, in float8 once."""
        if not is_quantized(self.key.dtype) or self.scales_given:
            return False
        return self.key.dtype == torch.int8 or self.key_scale is None

    def turn_back(self, cos: torch.Tensor, sin: torch.Tensor, stop: int) -> None:
        """Rotate the stored keys up to token `stop` back by an angle per pair; `cos`, `sin` `[pairs]` of the first pairs.

        Codes are decoded, turned and stored under the same scale.
        """
        width = 2 * len(cos)
        keys = decode(self.key[:, :stop], self.key_scale, torch.float32)
        first, second = keys[..., :width].unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((first * cos + second * sin, second * cos - first * sin), dim=-1).flatten(-2)
        self.key[:, :stop] = encode(torch.cat([turned, keys[..., width:]], dim=-1), self.key_scale, self.key.dtype)

    def fold(self, sink: int, start: int, keep: float) -> None:
        """Average the first `sink` tokens with as many from `start` on: `keep` of the old, the rest of the others."""
        for buffer, scale in ((self.key, self.key_scale), (self.value, self.value_scale)):
            old, new = (decode(buffer[:, at : at + sink], scale, torch.float32) for at in (0, start))
            buffer[:, :sink] = encode(keep * old + (1 - keep) * new, scale, buffer.dtype)

    def store_text(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep the cross-attention K/V `[B, text_tokens, heads, head_dim]` of the prompt."""
        self.text_key, self.text_value = key, value

    def get_text(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cross-attention K/V of the prompt, or None before the first pass."""
        return None if self.text_key is None else (self.text_key, self.text_value)

    def reserve(self, tokens: int, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        """Make room for `tokens` tokens of `(batch, heads, head_dim)`, keeping what is stored."""
        batch, heads, head_dim = shape
        for name in ("key", "value"):
            new = allocate((batch, tokens, heads, head_dim), dtype, device, values=name == "value")
            if (old := getattr(self, name)) is not None:
                new[:, : old.shape[1]] = old
            setattr(self, name, new)

    def drop(self, start: int, stop: int, used: int) -> None:
        """Forget the tokens `start:stop` of `used`; later ones move up."""
        for buffer in (self.key, self.value):
            buffer[:, start : start + used - stop] = buffer[:, stop:used].clone()

    def reset_text(self) -> None:
        self.text_key = self.text_value = None


class KVCache:
    """State of one rollout: self-attention K/V of the visible latent frames and cross-attention K/V of the prompt.

    Keys are stored after RoPE at their absolute frame index; eviction never re-indexes them. Where the RoPE table ends, all
    positions move down together and the stored keys turn with them (`reindex`): attention depends on differences alone, so
    that a stream without end computes what a table without end would give. The first pass at a new frame
    offset appends (and evicts, if a window is set); every later pass over the same frames overwrites in place. That is the
    rolling cache of Self-Forcing (Huang et al. 2025, arXiv 2506.08009).

    `begin_shot` moves the frames appended next, and all later ones, further on than their index, and may pin them: they are then
    evicted only while they do not stand right behind the sink (LongLive 2.0). `restart` empties the cache for a context that
    is encoded anew.

    With `rope_mode="window"` keys are stored before RoPE and a frame's position is its slot in the window, counted anew in
    every pass (Infinity-RoPE); `sink_ema` then lets evicted frames live on in the sink as a moving average (Reward Forcing).

    A cache belongs to one stream. It is handed to the model as `kv_cache` and changed by every pass.

    Args:
        num_layers: number of transformer blocks.
        local_attention_frames: latent frames kept, sink and current chunk included; -1 keeps all.
        sink_frames: first latent frames that are never evicted.
        num_frames: latent frames of the whole rollout, if known: a full cache is then allocated once instead of doubling.
        storage: dtype of the stored K/V: `"auto"` (that of the passes), `"bf16"`, or in 8 bits `"int8"` or `"fp8"`
            (float8 e4m3), with static scales per sample and head that the first chunk sets, or `set_scales`.
        rope_mode: `"absolute"` or `"window"`.
        sink_ema: share of the old sink when evicted frames are averaged into it; None keeps the sink as it is.
    """

    def __init__(
        self,
        num_layers: int,
        local_attention_frames: int = -1,
        sink_frames: int = 0,
        num_frames: int | None = None,
        storage: str = "auto",
        rope_mode: str = "absolute",
        sink_ema: float | None = None,
    ) -> None:
        if local_attention_frames != -1 and local_attention_frames <= sink_frames:
            raise ValueError(
                f"local_attention_frames is {local_attention_frames}, expected -1 (all) or more than "
                f"sink_frames = {sink_frames}"
            )
        self.layers = [KVLayerCache() for _ in range(num_layers)]
        self.local_attention_frames = local_attention_frames
        self.sink_frames = sink_frames
        self.num_frames = num_frames
        self.storage = check_storage(storage)
        self.rope_mode = rope_mode
        self.sink_ema = sink_ema
        self.frames: list[int] = []  # absolute latent frame in every slot, in storage order
        self.origin = 0  # absolute latent frame whose RoPE position is 0
        self.shift = 0  # positions by which the current pass stands further on
        self.pinned: list[int] = []  # frames that are not evicted once they stand right behind the sink
        self._shot: tuple[int, bool] | None = None  # of the shot that the next appended frames begin
        self._next_frame: int | None = None  # where a rewound cache goes on
        self._tokens_per_frame = 0
        self._capacity = 0  # in frames

    def begin_pass(
        self, frame_offset: int, num_frames: int, tokens_per_frame: int, heads: tuple[int, int], like: torch.Tensor
    ) -> int:
        """Make room for the K/V of frames `frame_offset ... frame_offset + num_frames - 1`.

        Args:
            frame_offset: absolute index of the first latent frame of the pass.
            num_frames: latent frames of the pass.
            tokens_per_frame: tokens of one latent frame.
            heads: `(number of heads, head_dim)`.
            like: a tensor `[B, ...]` with the batch size, dtype and device of the pass.

        Returns:
            The token at which the K/V of this pass start, for `KVLayerCache.update`.

        Raises:
            ValueError: if the frames neither follow the last ones nor repeat them, if they do not fit the window, or
                if the pass has another batch size, frame size or device than what is stored.
        """
        shape = (like.shape[0], *heads)
        self._check_layout(shape, tokens_per_frame, like)
        frames = list(range(frame_offset, frame_offset + num_frames))
        follows = self.frames[-1] + 1 if self.frames and self._next_frame is None else self._next_frame
        if not self.frames or frame_offset == follows:
            self._append(frames, shape, like)
        elif self.frames[-num_frames:] != frames:
            raise ValueError(
                f"a pass over frames {frame_offset}..{frames[-1]} neither follows nor repeats the last cached frames "
                f"(cached: {self.frames}); run chunks in order, or start from an empty KVCache"
            )
        return (len(self.frames) - num_frames) * tokens_per_frame

    def reindex(
        self, num_frames: int, positions: int, turn: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    ) -> int:
        """Position of the first frame of the pass just begun, in a RoPE table of `positions` rows.

        Args:
            num_frames: latent frames of the pass.
            positions: rows of the table. If the pass leaves it, `origin` moves to the oldest frame that the window can
                still need again, and the stored keys turn by as much; the sink may then stand at negative positions.
            turn: number of positions -> cos and sin `[pairs]` of the temporal pairs of a head.
        """
        first, last = self.frames[-num_frames] + self.shift, self.frames[-1] + self.shift
        if first - self.origin >= 0 and last - self.origin < positions:
            return first - self.origin
        oldest = first
        for frame in reversed(self.frames[:-num_frames]):
            if frame + self.shift != oldest - 1:
                break
            oldest -= 1
        origin = min(first, max(oldest, last + 1 - max(positions // 2, self.local_attention_frames)))
        if len(self.frames) > num_frames:
            cos, sin = turn(abs(origin - self.origin))
            sin = sin if origin > self.origin else -sin
            for layer in self.layers:
                layer.turn_back(cos, sin, (len(self.frames) - num_frames) * self._tokens_per_frame)
        self.origin = origin
        return first - origin

    def _check_layout(self, shape: tuple[int, int, int], tokens_per_frame: int, like: torch.Tensor) -> None:
        if not self._capacity:
            self._tokens_per_frame = tokens_per_frame
            return
        stored = self.layers[0].key
        expected = (*(stored.shape[0], *stored.shape[2:]), self._tokens_per_frame, stored.device)
        got = (*shape, tokens_per_frame, like.device)
        if got != expected:
            raise ValueError(
                "this KVCache holds K/V of another layout: (batch, heads, head_dim, tokens per frame, device) is "
                f"{expected}, the pass has {got}; use one KVCache per stream"
            )

    def _append(self, frames: list[int], shape: tuple[int, int, int], like: torch.Tensor) -> None:
        window = self.local_attention_frames
        sink = min(self.sink_frames, len(self.frames))
        if self.frames[sink : sink + len(self.pinned)] == self.pinned:
            sink += len(self.pinned)
        if window != -1 and sink + len(frames) > window:
            raise ValueError(
                f"a pass over {len(frames)} frames and {sink} sink frames (pinned ones included) do not fit into "
                f"local_attention_frames = {window}"
            )
        tokens = self._tokens_per_frame
        evict = 0 if window == -1 else max(0, len(self.frames) + len(frames) - window)
        if evict:
            first, last = sink, sink + evict
            if self.sink_ema is not None and evict != sink:
                raise ValueError(
                    f"{evict} frames leave the window at once and cannot be averaged into {sink} sink frames"
                )
            for layer in self.layers:
                if self.sink_ema is not None:
                    layer.fold(sink * tokens, first * tokens, self.sink_ema)
                layer.drop(first * tokens, last * tokens, len(self.frames) * tokens)
            del self.frames[first:last]
        needed = len(self.frames) + len(frames)
        if needed > self._capacity:
            known = window if window != -1 else self.num_frames
            if known is None or known < needed:
                known = max(2 * self._capacity, _FIRST_CHUNKS * len(frames))
            self._capacity = max(needed, known)
            for layer in self.layers:
                layer.reserve(self._capacity * tokens, shape, like.device, STORAGES[self.storage] or like.dtype)
        self.frames.extend(frames)
        self._next_frame = None
        if self.rope_mode == "window":
            self.shift = 0
        if self._shot is not None:
            rope_offset, pin = self._shot
            self.shift += rope_offset
            self.pinned = frames if pin else []
            self._shot = None

    def begin_shot(self, rope_offset: int, pin: bool) -> None:
        """Let the frames appended next begin a new shot.

        Args:
            rope_offset: positions by which they stand further away from the frames before: with absolute positions all
                later frames too, in a window, where positions are counted anew, they alone.
            pin: keep them from eviction as long as they stand right behind the sink, instead of those pinned before.
        """
        self._shot = (rope_offset, pin)

    def restart(self, next_frame: int) -> None:
        """Forget all frames but not the prompt; the next pass stores frame `next_frame`, at position 0."""
        self.rewind(0, next_frame)
        self.origin = next_frame + self.shift

    def rewind(self, num_frames: int, next_frame: int) -> None:
        """Forget all but the first `num_frames` stored frames; the next pass appends frame `next_frame` behind them."""
        del self.frames[num_frames:]
        self._next_frame = next_frame

    def visible(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a block, `[B, visible tokens, heads, head_dim]`, in storage order (sink first); 8 bits as float32."""
        tokens, dtype = len(self.frames) * self._tokens_per_frame, self.layers[layer].key.dtype
        return self.layers[layer].read(0, tokens, torch.float32 if is_quantized(dtype) else dtype)

    def set_scales(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Give the scales of 8-bit storage, instead of taking them from the first chunk.

        Args:
            key: `[num_layers, heads]`, or `[num_layers, B, heads]` (one per sample), float32.
            value: see `key`.

        Raises:
            ValueError: if the storage has no scales, something is stored already, or there are other than `num_layers`.
        """
        if self.storage not in ("int8", "fp8") or self.frames:
            raise ValueError("set_scales needs an empty KVCache with storage 'int8' or 'fp8'")
        if not len(key) == len(value) == len(self.layers):
            raise ValueError(f"scales of {len(key)} and {len(value)} layers for a KVCache of {len(self.layers)}")
        for layer, key_scale, value_scale in zip(self.layers, key, value, strict=True):
            layer.key_scale, layer.value_scale, layer.scales_given = key_scale.float(), value_scale.float(), True

    def reset_text(self) -> None:
        """Forget the prompt's K/V; the next pass computes them from its `encoder_hidden_states`."""
        for layer in self.layers:
            layer.reset_text()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What is stored, as tensors and JSON types, for `load_state` of a cache made with the same arguments.

        The prompt's K/V are left out: the next pass computes them again.
        """
        tokens, tensors = len(self.frames) * self._tokens_per_frame, {}
        for index, layer in enumerate(self.layers):
            for name in ("key", "value", "key_scale", "value_scale"):
                if (tensor := getattr(layer, name)) is not None:
                    tensors[f"{index}.{name}"] = tensor if name.endswith("scale") else tensor[:, :tokens]
        facts = {name: getattr(self, name) for name in _FACTS}
        return tensors, facts | {"scales_given": self.layers[0].scales_given}

    def load_state(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], device: torch.device) -> None:
        """Go on where the cache stood that `state` was called on; buffers are allocated on `device`."""
        for name in _FACTS:
            setattr(self, name, facts[name])
        for index, layer in enumerate(self.layers):
            layer.scales_given = facts["scales_given"]
            for name in ("key_scale", "value_scale"):
                if (scale := tensors.get(f"{index}.{name}")) is not None:
                    setattr(layer, name, scale.to(device))
            if (stored := tensors.get(f"{index}.key")) is None:
                continue
            shape = (stored.shape[0], *stored.shape[2:])
            layer.reserve(self._capacity * self._tokens_per_frame, shape, device, stored.dtype)
            for name in ("key", "value"):
                getattr(layer, name)[:, : stored.shape[1]] = tensors[f"{index}.{name}"].to(device)

    def clear(self) -> None:
        """Forget everything, buffers included."""
        self.layers = [KVLayerCache() for _ in self.layers]
        self.frames = []
        self.origin = self.shift = 0
        self.pinned, self._shot = [], None
        self._next_frame = None
        self._capacity = 0

    def clone(self) -> KVCache:
        """An independent copy, to branch a rollout."""
        return copy.deepcopy(self)

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        tensors = (t for layer in self.layers for t in vars(layer).values() if isinstance(t, torch.Tensor))
        return sum(tensor.nbytes for tensor in tensors)
