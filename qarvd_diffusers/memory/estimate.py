"""Estimate from shapes alone what a stream needs of a GPU's memory, component by component."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..config import QARVDConfig
from ..kv_cache.cache import KVCache
from ..kv_cache.storage import STORAGES
from ..vae.streaming import StreamingVAEDecoder, optimize_vae
from .shapes import ModelShapes, cast, live_bytes, quantized_bytes

RESERVE = 830_000_000  # CUDA context, kernels and libraries, which no allocator counts (measured 0.82 GB on an H200)
ALLOCATOR_OVERHEAD = 1.03  # reserved / allocated with expandable_segments (measured 1.027)
CONVOLUTION_WORKSPACE = 300_000_000  # cuDNN's, while a VAE decodes (measured 0.29 GB at 832 x 480)
WINDOW = 21  # latent frames of the videos that models of unlimited window are trained on

# Components in use in every phase.
_RESIDENT = (
    "transformer weights",
    "K/V cache",
    "K/V of the prompt",
    "controls of a chunk",
    "CUDA graphs of the passes",
    "VAE decoder and encoder weights",
    "VAE memory of earlier frames",
)


@dataclass(frozen=True)
class MemoryChoice:
    """Hold the run-time choices that depend on memory.

    Attributes:
        scheme: quantize the float transformer on loading; None leaves it as it is stored.
        kv_cache: storage of the K/V cache.
        text_encoder: see `offload_text_encoder`.
        window: latent frames that are kept; None keeps the model's own window.
    """

    scheme: str | None = None
    kv_cache: str = "auto"
    text_encoder: str = "keep"
    window: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """Hold an estimate.

    Attributes:
        choice: the choices it is for.
        components: bytes per component.
        phases: bytes in use at the peak of each phase, without CUDA's own.
        budget: bytes of the device, or None without limit.
    """

    choice: MemoryChoice
    components: Mapping[str, int]
    phases: Mapping[str, int]
    budget: int | None = None

    @property
    def allocated(self) -> int:
        """Peak bytes that torch allocates."""
        return max(self.phases.values())

    @property
    def total(self) -> int:
        """Peak bytes in use on the device, CUDA's own included."""
        return int(ALLOCATOR_OVERHEAD * self.allocated) + RESERVE

    @property
    def fits(self) -> bool:
        """Whether the total is within the budget."""
        return self.budget is None or self.total <= self.budget

    def describe(self) -> str:
        """Return one line per component and phase."""
        rows = [*self.components.items(), *((f"peak: {name}", size) for name, size in self.phases.items())]
        return "\n".join(f"  {name:<34} {size / 1e9:8.2f} GB" for name, size in rows)


def estimate(
    shapes: ModelShapes,
    choice: MemoryChoice,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype] = torch.bfloat16,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    budget: int | None = None,
) -> MemoryPlan:
    """Estimate what a stream needs, from the shapes alone.

    Args:
        shapes: of the model.
        choice: run-time choices.
        dtype: of the float parts; or one per component, `default` for the others, as loaders take it.
        height: pixels; None takes the model's.
        width: see `height`.
        batch: samples of the stream.
        budget: bytes, stored in the plan.
    """
    size = (height or shapes.index.get("height", 480), width or shapes.index.get("width", 832))
    vae = _vae_bytes(shapes, _dtype_of(dtype, "vae"), size, batch, shapes.fields.num_frames_per_chunk)
    encoder = _encoder_bytes(shapes, _dtype_of(dtype, "text_encoder"))
    components = _transformer_components(shapes, choice, _dtype_of(dtype, "transformer"), size, batch) | {
        "VAE decoder and encoder weights": vae.weights,
        "VAE memory of earlier frames": vae.left,
        "VAE decoding": vae.peak - vae.left + (CONVOLUTION_WORKSPACE if vae.peak else 0),
        "text encoder weights": encoder.weights,
        "text encoder, largest layer": encoder.left,
        "encoding a prompt": encoder.peak,
    }
    resident = sum(components.get(name, 0) for name in _RESIDENT)
    kept = encoder.weights if choice.text_encoder == "keep" else 0
    encoding = encoder.left if choice.text_encoder == "stream" else encoder.weights
    phases = {
        "encoding a prompt": resident + encoding + encoder.peak,
        "denoising": resident + kept + components["one pass"],
        "decoding": resident + kept + components["VAE decoding"],
    }
    return MemoryPlan(choice, components, phases, budget)


def _transformer_components(
    shapes: ModelShapes, choice: MemoryChoice, dtype: torch.dtype, size: tuple[int, int], batch: int
) -> dict[str, int]:
    """Estimate the bytes of the transformer, its caches, one pass and the CUDA graphs."""
    fields, values = shapes.fields, shapes.transformer
    if choice.window is not None:
        fields = dataclasses.replace(fields, local_attention_frames=choice.window)
    window = fields.local_attention_frames if fields.local_attention_frames != -1 else WINDOW
    chunk, text_tokens = fields.num_frames_per_chunk, shapes.index.get("max_sequence_length", 512)
    layers, channels = values["num_layers"], values["num_attention_heads"] * values["attention_head_dim"]
    tokens = _tokens_per_frame(shapes, size)
    weights, largest = _transformer_bytes(shapes, choice.scheme, dtype)
    working = _pass_bytes(shapes, choice.kv_cache, dtype, size, window, batch, chunk, text_tokens)
    prompt = 2 * layers * text_tokens * channels * dtype.itemsize * batch
    graphs = 0
    if _runs_fused(shapes, choice.scheme):  # activations and inputs of a segment, and the prompt's K/V
        graphs = chunk * tokens * batch * (7 * channels * dtype.itemsize + values["ffn_dim"]) + prompt
    stored = (STORAGES[choice.kv_cache] or dtype).itemsize
    controls = 2 * layers * chunk * tokens * channels * stored if "control_dim" in values else 0  # scales and shifts
    graphs += 2 * chunk * tokens * channels * dtype.itemsize if controls and graphs else 0
    return {
        "transformer weights": weights,
        "K/V cache": 2 * layers * window * tokens * channels * stored * batch,
        "K/V of the prompt": prompt,
        **({"controls of a chunk": controls} if controls else {}),
        "one pass": working + largest,
        "CUDA graphs of the passes": graphs,
    }


def _dtype_of(dtype: torch.dtype | Mapping[str, torch.dtype], component: str) -> torch.dtype:
    """Return the dtype of one component."""
    if isinstance(dtype, torch.dtype):
        return dtype
    return dtype.get(component, dtype.get("default", torch.float32))


@dataclass(frozen=True)
class _Part:
    """Bytes of one component."""

    weights: int = 0
    peak: int = 0  # while it runs, without the weights
    left: int = 0  # part of the peak that stays in use afterwards; for a text encoder, its largest layer


def _quantization(shapes: ModelShapes, scheme: str | None) -> QARVDConfig | None:
    """Return the config of a quantized checkpoint, else that of `scheme`."""
    return shapes.quantization or (QARVDConfig(scheme) if scheme else None)


def _tokens_per_frame(shapes: ModelShapes, size: tuple[int, int]) -> int:
    """Return the tokens of one latent frame of `size` in pixels."""
    scale = (shapes.vae or {}).get("scale_factor_spatial", 8)
    _, rows, columns = shapes.transformer["patch_size"]
    return (size[0] // (scale * rows)) * (size[1] // (scale * columns))


def _latents(
    shapes: ModelShapes, size: tuple[int, int], batch: int, frames: int, dtype: torch.dtype, channels: str
) -> torch.Tensor:
    """Return empty latents; `channels` is the entry of the transformer's config that counts theirs."""
    scale = (shapes.vae or {}).get("scale_factor_spatial", 8)
    count = shapes.transformer.get(channels) or shapes.transformer["in_channels"]
    return torch.empty(batch, count, frames, size[0] // scale, size[1] // scale, dtype=dtype)


def _runs_fused(shapes: ModelShapes, scheme: str | None) -> bool:
    """Whether passes run on fused integer kernels, and so, on a GPU, as CUDA graphs."""
    config = _quantization(shapes, scheme)
    return config is not None and config.resolved_scheme.activation == "static"


@functools.lru_cache(maxsize=16)
def _transformer_bytes(shapes: ModelShapes, scheme: str | None, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of the weights, and of the largest one that is dequantized in use."""
    config = _quantization(shapes, scheme)
    model = shapes.empty_transformer()
    return (cast(model, dtype), 0) if config is None else quantized_bytes(model, config, dtype)


@functools.lru_cache(maxsize=64)
def _pass_bytes(
    shapes: ModelShapes,
    storage: str,
    dtype: torch.dtype,
    size: tuple[int, int],
    window: int,
    batch: int,
    frames: int,
    text: int,
) -> int:
    """Return the bytes of one pass without weights and cache; one block is run, since a block frees what it uses."""
    model = shapes.empty_transformer(layers=1)
    cast(model, dtype)
    heads = (model.config.num_attention_heads, model.config.attention_head_dim)
    with torch.device("meta"):
        latents = _latents(shapes, size, batch, frames, dtype, "in_channels")
        cache = KVCache(1, window, 0, storage=storage)
        if window > frames:
            cache.begin_pass(0, window - frames, _tokens_per_frame(shapes, size), heads, latents)
        prompt = torch.empty(batch, text, model.config.text_dim, dtype=dtype)
    start, before = max(0, window - frames), cache.nbytes

    def run() -> None:
        model(latents, torch.empty(batch), prompt, kv_cache=cache, frame_offset=start, return_dict=False)

    peak, _ = live_bytes(run)
    return peak - (cache.nbytes - before)


@functools.lru_cache(maxsize=16)
def _vae_bytes(shapes: ModelShapes, dtype: torch.dtype, size: tuple[int, int], batch: int, frames: int) -> _Part:
    """Return the bytes of a VAE that decodes chunks of `frames` latent frames."""
    if shapes.vae is None:
        return _Part()
    vae = shapes.empty_vae()
    optimize_vae(vae)
    weights = cast(vae, dtype)
    decoder = StreamingVAEDecoder(vae)
    with torch.device("meta"):
        latents = _latents(shapes, size, batch, frames, dtype, "out_channels")

    def run() -> None:
        for _ in range(2):  # the second chunk is the first that finds the feature cache full
            decoder.decode(latents)

    return _Part(weights, *live_bytes(run))


@functools.lru_cache(maxsize=16)
def _encoder_bytes(shapes: ModelShapes, dtype: torch.dtype) -> _Part:
    """Return the bytes of the text encoder."""
    if shapes.text_encoder is None:
        return _Part()
    encoder, values = shapes.empty_text_encoder(), shapes.text_encoder
    table = encoder.get_input_embeddings().weight  # stays in host memory
    largest = max(weight.numel() for weight in encoder.parameters() if weight is not table) * dtype.itemsize
    tokens, heads = shapes.index.get("max_sequence_length", 512), values["num_heads"]
    # Attention scores with their bias and softmax in float32, and the two branches of the gated feed-forward layer.
    working = 12 * heads * tokens * tokens + tokens * dtype.itemsize * (4 * values["d_ff"] + 8 * values["d_model"])
    return _Part(cast(encoder, dtype), working, largest)
