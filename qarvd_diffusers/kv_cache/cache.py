"""Keep the keys and values of earlier chunks, and of the prompt, for a causal video transformer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..files.safetensors import TensorSpec
from ..files.schema import check_mapping
from .layer import KVLayerCache
from .storage import STORAGES, check_storage, is_quantized

_FIRST_CHUNKS = 4  # room of a full cache of unknown length; each doubling moves buffers and recompiles compiled blocks
_MOST_AT_ONCE = 1024  # frames; a longer cache grows by doubling, whatever length is announced
_LARGEST = 2**31  # frames and positions
# Bookkeeping that a saved cache keeps.
_STATE_FIELDS = {
    "frames": list[int],
    "origin": int,
    "shift": int,
    "pinned": list[int],
    "_shot": tuple[int, bool] | None,
    "_next_frame": int | None,
    "_tokens_per_frame": int,
    "_capacity": int,
}


class KVCache:
    """Hold the state of one rollout: self-attention K/V of the visible latent frames, cross-attention K/V of the
    prompt.

    This is the rolling cache of Self-Forcing (Huang et al. 2025, arXiv 2506.08009). The first pass at a new frame
    offset appends, and evicts if a window is set. Every later pass over the same frames overwrites them in place. Keys
    are stored after RoPE at their absolute frame index; eviction never re-indexes them. At the end of the RoPE table
    all positions move down together and the stored keys rotate with them (`reindex`). Attention depends on differences
    of positions only, so an endless stream computes what an endless table would give.

    `begin_shot` moves the frames that are appended next, and all later ones, further on than their index, and may pin
    them: pinned frames are not evicted while they directly follow the sink (LongLive 2.0). `restart` empties the cache
    for a context that is encoded again.

    With `rope_mode="window"` keys are stored before RoPE, and a frame's position is its slot in the window, counted
    again in every pass (Infinity-RoPE). `sink_ema` then averages evicted frames into the sink (Reward Forcing).

    A cache belongs to one stream. It is passed to the model as `kv_cache`, and every pass changes it.

    Args:
        num_layers: number of transformer blocks.
        local_attention_frames: latent frames kept, sink and current chunk included; -1 keeps all.
        sink_frames: first latent frames that are never evicted.
        num_frames: latent frames of the whole rollout, if known: a full cache is then allocated once instead of
            doubling.
        storage: dtype of the stored K/V: `"auto"` (that of the passes), `"bf16"`, or in 8 bits `"int8"` or `"fp8"`
            (float8 e4m3), with static scales per sample and head, set by the first chunk or by `set_scales`.
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
        self.shift = 0  # positions that the current pass adds to its frame indices
        self.pinned: list[int] = []  # frames that are not evicted while they directly follow the sink
        self._shot: tuple[int, bool] | None = (
            None  # (rope_offset, pin) of the shot that the next appended frames begin
        )
        self._next_frame: int | None = None  # the frame that a rewound cache appends next
        self._tokens_per_frame = 0
        self._capacity = 0  # in frames
        # Controls of the latest chunk, and what the transformer computed from them.
        self.injections: tuple[torch.Tensor, Any] | None = None

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
        self, num_frames: int, positions: int, rope_delta: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    ) -> int:
        """Return the position of the first frame of the pass just begun, in a RoPE table of `positions` rows.

        If the pass leaves the table, `origin` moves to the oldest frame that the window may still need, and the stored
        keys rotate by as much; the sink may then have negative positions.

        Args:
            num_frames: latent frames of the pass.
            positions: rows of the table.
            rope_delta: number of positions -> cos and sin `[pairs]` of the temporal pairs of a head.
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
            cos, sin = rope_delta(abs(origin - self.origin))
            sin = sin if origin > self.origin else -sin
            for layer in self.layers:
                layer.rotate_keys_back(cos, sin, (len(self.frames) - num_frames) * self._tokens_per_frame)
        self.origin = origin
        return first - origin

    def _check_layout(self, shape: tuple[int, int, int], tokens_per_frame: int, like: torch.Tensor) -> None:
        if not self._capacity:
            self._tokens_per_frame = tokens_per_frame
            return
        stored = self.layers[0].buffers()[0]
        expected = (stored.shape[0], *stored.shape[2:], self._tokens_per_frame, stored.device)
        got = (*shape, tokens_per_frame, like.device)
        if got != expected:
            raise ValueError(
                "this KVCache holds K/V of another layout: (batch, heads, head_dim, tokens per frame, device) is "
                f"{expected}, the pass has {got}; use one KVCache per stream"
            )

    def _append(self, frames: list[int], shape: tuple[int, int, int], like: torch.Tensor) -> None:
        self._evict(len(frames))
        self._grow(len(frames), shape, like)
        self.frames.extend(frames)
        self._next_frame = None
        if self.rope_mode == "window":
            self.shift = 0
        if self._shot is not None:
            rope_offset, pin = self._shot
            self.shift += rope_offset
            self.pinned = frames if pin else []
            self._shot = None

    def _evict(self, coming: int) -> None:
        """Drop the oldest frames after the sink, so that `coming` more fit into the window."""
        window = self.local_attention_frames
        sink = min(self.sink_frames, len(self.frames))
        if self.frames[sink : sink + len(self.pinned)] == self.pinned:
            sink += len(self.pinned)
        if window != -1 and sink + coming > window:
            raise ValueError(
                f"a pass over {coming} frames and {sink} sink frames (pinned ones included) do not fit into "
                f"local_attention_frames = {window}"
            )
        evict = 0 if window == -1 else max(0, len(self.frames) + coming - window)
        if not evict:
            return
        if self.sink_ema is not None and evict != sink:
            raise ValueError(f"{evict} frames leave the window at once and cannot be averaged into {sink} sink frames")
        tokens = self._tokens_per_frame
        for layer in self.layers:
            if self.sink_ema is not None:
                layer.ema_into_sink(sink * tokens, sink * tokens, self.sink_ema)
            layer.drop(sink * tokens, (sink + evict) * tokens, len(self.frames) * tokens)
        del self.frames[sink : sink + evict]

    def _grow(self, coming: int, shape: tuple[int, int, int], like: torch.Tensor) -> None:
        """Allocate room for `coming` more frames, where there is none."""
        needed = len(self.frames) + coming
        if needed <= self._capacity:
            return
        known = self.local_attention_frames if self.local_attention_frames != -1 else self.num_frames
        if known is None or known < needed:
            known = max(2 * self._capacity, _FIRST_CHUNKS * coming)
        self._capacity = max(needed, min(known, max(2 * self._capacity, _MOST_AT_ONCE)))
        tokens, dtype = self._capacity * self._tokens_per_frame, STORAGES[self.storage] or like.dtype
        for layer in self.layers:
            layer.reserve(tokens, shape, like.device, dtype)

    def begin_shot(self, rope_offset: int, pin: bool) -> None:
        """Begin a new shot with the frames that are appended next.

        Args:
            rope_offset: positions that are added between them and the frames before. With absolute positions this also
                moves all later frames; in a window, where every pass counts positions again, only them.
            pin: do not evict them while they directly follow the sink; frames pinned before are released.
        """
        self._shot = (rope_offset, pin)

    def restart(self, next_frame: int) -> None:
        """Forget all frames but keep the prompt; the next pass stores frame `next_frame` at position 0."""
        self.rewind(0, next_frame)
        self.origin = next_frame + self.shift

    def rewind(self, num_frames: int, next_frame: int) -> None:
        """Forget all but the first `num_frames` stored frames; the next pass appends frame `next_frame` after them."""
        del self.frames[num_frames:]
        self._next_frame = next_frame

    def visible(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of a block, `[B, visible tokens, heads, head_dim]`, sink first; 8-bit storage as float32."""
        tokens, dtype = len(self.frames) * self._tokens_per_frame, self.layers[layer].buffers()[0].dtype
        return self.layers[layer].read(0, tokens, torch.float32 if is_quantized(dtype) else dtype)

    def set_scales(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Set the scales of 8-bit storage, instead of taking them from the first chunk.

        Args:
            key: `[num_layers, heads]`, or `[num_layers, B, heads]` (one per sample), float32.
            value: see `key`.

        Raises:
            ValueError: if the storage has no scales, something is stored already, or the number of layers differs.
        """
        if self.storage not in ("int8", "fp8") or self.frames:
            raise ValueError("set_scales needs an empty KVCache with storage 'int8' or 'fp8'")
        if not len(key) == len(value) == len(self.layers):
            raise ValueError(
                f"set_scales got scales of {len(key)} and {len(value)} layers, expected {len(self.layers)} of each"
            )
        for layer, key_scale, value_scale in zip(self.layers, key, value, strict=True):
            layer.key_scale, layer.value_scale, layer.scales_given = key_scale.float(), value_scale.float(), True

    def reset_text(self) -> None:
        """Forget the prompt's K/V; the next pass computes them from its `encoder_hidden_states`."""
        for layer in self.layers:
            layer.reset_text()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return what is stored, as tensors and JSON types, for `load_state` of a cache made with the same arguments.

        The prompt's K/V are left out: the next pass computes them again.
        """
        tokens, tensors = len(self.frames) * self._tokens_per_frame, {}
        for index, layer in enumerate(self.layers):
            for name in ("key", "value", "key_scale", "value_scale"):
                if (tensor := getattr(layer, name)) is not None:
                    tensors[f"{index}.{name}"] = tensor if name.endswith("scale") else tensor[:, :tokens]
        fields = {name: getattr(self, name) for name in _STATE_FIELDS}
        return tensors, fields | {"scales_given": self.layers[0].scales_given}

    def expected_state(
        self,
        fields: Mapping[str, Any],
        found: Mapping[str, TensorSpec],
        shape: tuple[int, int, int, int],
        frames_done: int,
        where: str,
    ) -> dict[str, TensorSpec]:
        """Return the tensors of a state with these `fields`, for a cache made with the same arguments.

        What a cache learns from its first pass (heads, head_dim, dtype) is taken from the first layer that is found.

        Args:
            fields: JSON values that `state` returned.
            found: the tensors that there are.
            shape: `(batch, channels, height, width)` of the latents.
            frames_done: latent frames of the stream so far.
            where: name of the fields in errors.

        Raises:
            ValueError: the fields are of other types, or contradict each other.
        """
        fields = check_mapping(fields, {**_STATE_FIELDS, "scales_given": bool}, where)
        self._check_fields(fields, shape, frames_done, where)
        batch = shape[0]
        key = found.get("0.key", TensorSpec((batch, 0, 0, 0), torch.float32))
        dtype = STORAGES[self.storage] or (key.dtype if key.dtype.is_floating_point else torch.float32)
        tokens, heads = len(fields["frames"]) * fields["_tokens_per_frame"], key.shape[2:]
        specs = dict.fromkeys(
            ("key", "value") if fields["_capacity"] else (), TensorSpec((batch, tokens, *heads), dtype)
        )
        if is_quantized(dtype) and (specs or fields["scales_given"]):
            scale = found.get("0.key_scale", TensorSpec((batch, *heads[:1]), torch.float32)).shape
            last = heads[:1] if specs else scale[-1:]
            last = last if len(scale) == 1 else (batch, *last)  # see `KVLayerCache.key_scale`
            specs |= dict.fromkeys(("key_scale", "value_scale"), TensorSpec(last, torch.float32))
        return {f"{index}.{name}": spec for index in range(len(self.layers)) for name, spec in specs.items()}

    @staticmethod
    def _check_fields(
        fields: Mapping[str, Any], shape: tuple[int, int, int, int], frames_done: int, where: str
    ) -> None:
        """Raise ValueError if the fields of a state contradict each other, or the frames that the stream has made."""
        frames, origin = fields["frames"], fields["origin"]
        end = max([frame + 1 for frame in frames[-1:]] + [fields["_next_frame"] or 0])
        offset = (fields["_shot"] or (0,))[0]
        numbers = (*frames, *fields["pinned"], end, offset, fields["shift"], origin, fields["_tokens_per_frame"])
        wrong = {
            "a negative or very large number": not all(0 <= number < _LARGEST for number in numbers),
            "frames out of order": frames != sorted(set(frames)),
            f"another last frame than the stream's, {frames_done - 1}": end not in (0, frames_done),
            "an origin after the last frame": origin > end + fields["shift"],
            "less capacity than frames": fields["_capacity"] < len(frames),
            "more tokens than a frame has latents": fields["_tokens_per_frame"] > shape[2] * shape[3],
        }
        for what, is_so in wrong.items():
            if is_so:
                raise ValueError(f"{where}: {what}; the file is damaged")

    def load_state(self, tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any], device: torch.device) -> None:
        """Restore what `state` returned; buffers are allocated on `device`."""
        for name in _STATE_FIELDS:
            setattr(self, name, fields[name])
        known = self.local_attention_frames if self.local_attention_frames != -1 else self.num_frames or 0
        self._capacity = min(self._capacity, max(_FIRST_CHUNKS * len(self.frames), min(known, _MOST_AT_ONCE)))
        for index, layer in enumerate(self.layers):
            layer.scales_given = fields["scales_given"]
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
        self._next_frame = self.injections = None
        self._capacity = 0

    def clone(self) -> KVCache:
        """Return an independent copy, to branch a rollout."""
        return copy.deepcopy(self, {id(self.injections): None})  # computed again where they are needed

    @property
    def nbytes(self) -> int:
        """Return the bytes held by all buffers."""
        tensors = (t for layer in self.layers for t in vars(layer).values() if isinstance(t, torch.Tensor))
        return sum(tensor.nbytes for tensor in tensors)
