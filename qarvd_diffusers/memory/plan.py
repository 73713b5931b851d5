"""What a stream needs of a GPU's memory, component by component, and the best choices that fit into it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKLWan

from ..config import QARVDConfig
from ..kv_cache.cache import KVCache
from ..kv_cache.storage import STORAGES
from ..vae.streaming import StreamingVAEDecoder, optimize_vae
from .shapes import ModelShapes, cast, live_bytes, quantized_bytes

if TYPE_CHECKING:
    from ..rollout.host import PipelineHost

RESERVE = 830_000_000  # CUDA context, kernels and libraries, which no allocator counts: 0.82 GB seen on an H200
GRANULES = 1.03  # what the allocator holds, of what is asked of it, with segments that grow: 1.027 seen
CONVOLUTION_WORKSPACE = 300_000_000  # what cuDNN asks for while a VAE decodes: 0.29 GB seen at 832 x 480
WINDOW = 21  # latent frames of the videos that models of unlimited window are trained on
DATA_FREE = "w8a8_dynamic"  # what a float model is quantized to: needs no calibration, hence no memory for it


@dataclass(frozen=True)
class MemoryChoice:
    """Run-time choices that memory decides.

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
    """An estimate.

    Attributes:
        choice: what was estimated.
        components: bytes per component.
        phases: bytes in use at the peak of each phase; CUDA's own are not among them.
        budget: bytes of the device, or None without limit.
    """

    choice: MemoryChoice
    components: Mapping[str, int]
    phases: Mapping[str, int]
    budget: int | None = None

    @property
    def allocated(self) -> int:
        """Peak of what torch allocates."""
        return max(self.phases.values())

    @property
    def total(self) -> int:
        """Peak of what the device holds, CUDA's own included."""
        return int(GRANULES * self.allocated) + RESERVE

    @property
    def fits(self) -> bool:
        return self.budget is None or self.total <= self.budget

    def describe(self) -> str:
        """One line per component and phase."""
        rows = [*self.components.items(), *((f"peak: {name}", size) for name, size in self.phases.items())]
        return "\n".join(f"  {name:<34} {size / 1e9:8.2f} GB" for name, size in rows)


def parse_budget(memory: str | float) -> int | None:
    """`"8GB"`, `"8"` or `8` (10^9 bytes each), `"8GiB"`, `"8192MiB"` -> bytes; `"max"` -> None.

    Raises:
        ValueError: for anything else.
    """
    if memory == "max":
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM]i?B|G|M|)\s*", str(memory), re.IGNORECASE)
    if match is None or (not match[2] and float(match[1]) >= 10_000):  # a number of bytes, it seems
        raise ValueError(
            f"memory is {memory!r}, expected a size such as '8GB', '8' (the same), '8GiB' or '500MB', or 'max'"
        )
    unit = match[2].lower() or "g"
    base = 1024 if "i" in unit else 1000
    return int(float(match[1]) * base ** (3 if unit[0] == "g" else 2))


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
    """What a stream needs, from the shapes alone.

    Args:
        shapes: of the model.
        choice: run-time choices.
        dtype: of the float parts; or one per component, `default` for the others, as loaders take it.
        height: pixels; None takes the model's.
        width: see `height`.
        batch: samples of the stream.
        budget: bytes, passed on.
    """
    fields = shapes.fields
    if choice.window is not None:
        fields = dataclasses.replace(fields, local_attention_frames=choice.window)
    model_dtype, vae_dtype, encoder_dtype = (_dtype_of(dtype, name) for name in ("transformer", "vae", "text_encoder"))
    size = (height or shapes.index.get("height", 480), width or shapes.index.get("width", 832))
    text_tokens = shapes.index.get("max_sequence_length", 512)
    spec = json.dumps([shapes.index, shapes.transformer, shapes.vae, shapes.text_encoder], sort_keys=True)
    weights, largest = _transformer_bytes(spec, choice.scheme, model_dtype)
    values = shapes.transformer
    layers, channels = values["num_layers"], values["num_attention_heads"] * values["attention_head_dim"]
    frame = _tokens_per_frame(shapes, size) * channels
    window = fields.local_attention_frames if fields.local_attention_frames != -1 else WINDOW
    stored = (STORAGES[choice.kv_cache] or model_dtype).itemsize
    text = 2 * layers * text_tokens * channels
    chunk = fields.num_frames_per_chunk
    working = _pass_bytes(spec, choice.kv_cache, model_dtype, size, window, batch, chunk, text_tokens)
    vae = _vae_bytes(spec, vae_dtype, size, batch, fields.num_frames_per_chunk)
    encoder = _encoder_bytes(spec, encoder_dtype)
    graphs = 0
    if _runs_fused(
        shapes, choice.scheme
    ):  # what its CUDA graphs hold: a stretch's activations, inputs, the prompt's K/V
        tokens = fields.num_frames_per_chunk * frame // channels * batch
        graphs = (
            tokens * (7 * channels * model_dtype.itemsize + values["ffn_dim"]) + text * model_dtype.itemsize * batch
        )
    components = {
        "transformer weights": weights,
        "K/V cache": 2 * layers * window * frame * stored * batch,
        "K/V of the prompt": text * model_dtype.itemsize * batch,
        "one pass": working + largest,
        "CUDA graphs of the passes": graphs,
        "VAE decoder and encoder weights": vae.weights,
        "VAE memory of earlier frames": vae.left,
        "VAE decoding": vae.peak - vae.left + (CONVOLUTION_WORKSPACE if vae.peak else 0),
        "text encoder weights": encoder.weights,
        "text encoder, largest layer": encoder.left,
        "encoding a prompt": encoder.peak,
    }
    resident = weights + components["K/V cache"] + components["K/V of the prompt"] + vae.weights + vae.left
    resident += graphs
    kept = encoder.weights if choice.text_encoder == "keep" else 0
    encoding = {"stream": encoder.left}.get(choice.text_encoder, encoder.weights)
    phases = {
        "encoding a prompt": resident + encoding + encoder.peak,
        "denoising": resident + kept + components["one pass"],
        "decoding": resident + kept + components["VAE decoding"],
    }
    return MemoryPlan(choice, components, phases, budget)


def _dtype_of(dtype: torch.dtype | Mapping[str, torch.dtype], component: str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    return dtype.get(component, dtype.get("default", torch.float32))


def choose(shapes: ModelShapes, memory: str, *, scheme: str | None = None, **options: object) -> MemoryPlan:
    """The choices that cost least quality and time among those that fit.

    First the text encoder leaves the device, then the K/V cache goes to 8 bits, then a float transformer is quantized, then
    the window shrinks.

    Args:
        shapes: of the model.
        memory: see `parse_budget`.
        scheme: what the caller quantizes to anyway.
        **options: see `estimate`.

    Raises:
        ValueError: if nothing fits; shows what the smallest choice needs.
    """
    budget = parse_budget(memory)
    if budget is None:
        return estimate(shapes, MemoryChoice(scheme=scheme), **options)
    plan = None
    for choice in _candidates(shapes, scheme):
        plan = estimate(shapes, choice, budget=budget, **options)
        if plan.fits:
            return plan
    raise ValueError(
        f"{shapes.name} does not fit into {budget / 1e9:g}GB: with 8-bit K/V, a window of {plan.choice.window} latent frames and a "
        f"streamed text encoder it needs {plan.total / 1e9:.1f} GB\n{plan.describe()}\nAsk for a smaller picture, or a "
        "model of fewer parameters or bits."
    )


def _candidates(shapes: ModelShapes, scheme: str | None) -> Iterator[MemoryChoice]:
    fields = shapes.fields
    own = fields.local_attention_frames if fields.local_attention_frames != -1 else WINDOW
    least = fields.sink_frames + 2 * fields.num_frames_per_chunk  # a chunk that sees but its own sink is cut off
    windows = [own, *(w for w in range(own - fields.num_frames_per_chunk, least - 1, -fields.num_frames_per_chunk))]
    schemes = [scheme] if scheme or shapes.quantization else [None, DATA_FREE]
    for window, quantized, storage, encoder in itertools.product(
        windows, schemes, ("auto", "int8"), ("keep", "cpu", "stream")
    ):
        unchanged = window == fields.local_attention_frames
        yield MemoryChoice(quantized, storage, encoder, None if unchanged else window)


def apply_choice(pipe: PipelineHost, choice: MemoryChoice) -> None:
    """Set up a loaded pipeline, and bring it onto the GPU if there is one, its VAE with the modules that need least memory.

    Torch's allocator is told to let segments grow, for the process: what is free must not be in pieces when it is needed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        _let_segments_grow()
        if isinstance(getattr(pipe, "vae", None), AutoencoderKLWan):
            optimize_vae(pipe.vae)
    pipe.kv_cache, pipe.window = choice.kv_cache, choice.window
    if choice.text_encoder != "keep":
        pipe.offload_text_encoder(choice.text_encoder, device)
    pipe.to(device)


def _let_segments_grow() -> None:
    if torch.cuda.get_allocator_backend() == "native":
        # Has no public name but an environment variable, which is read too early; the second is the older one.
        setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        (setter or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


@dataclass(frozen=True)
class _Part:
    weights: int = 0
    peak: int = 0  # while it works, weights not included
    left: int = 0  # of that, what stays afterwards; of a text encoder, its largest layer


def _shapes(spec: str) -> ModelShapes:
    return ModelShapes("", *json.loads(spec))


def _tokens_per_frame(shapes: ModelShapes, size: tuple[int, int]) -> int:
    scale = (shapes.vae or {}).get("scale_factor_spatial", 8)
    _, rows, columns = shapes.transformer["patch_size"]
    return (size[0] // (scale * rows)) * (size[1] // (scale * columns))


def _latents(shapes: ModelShapes, size: tuple[int, int], batch: int, frames: int, dtype: torch.dtype) -> torch.Tensor:
    scale = (shapes.vae or {}).get("scale_factor_spatial", 8)
    return torch.empty(
        batch, shapes.transformer["in_channels"], frames, size[0] // scale, size[1] // scale, dtype=dtype
    )


def _runs_fused(shapes: ModelShapes, scheme: str | None) -> bool:
    """Whether passes run on fused integer kernels, which on a GPU they do as CUDA graphs."""
    config = shapes.quantization or (QARVDConfig(scheme) if scheme else None)
    return config is not None and config.resolved_scheme.activation == "static"


@functools.lru_cache(maxsize=16)
def _transformer_bytes(spec: str, scheme: str | None, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the weights, and of the largest one that is expanded while it works."""
    shapes = _shapes(spec)
    config = shapes.quantization or (QARVDConfig(scheme) if scheme else None)
    model = shapes.empty_transformer()
    return (cast(model, dtype), 0) if config is None else quantized_bytes(model, config, dtype)


@functools.lru_cache(maxsize=64)
def _pass_bytes(
    spec: str, storage: str, dtype: torch.dtype, size: tuple[int, int], window: int, batch: int, frames: int, text: int
) -> int:
    """Bytes that one pass needs beside weights and cache; one block is run, since a block frees what it used."""
    shapes = _shapes(spec)
    model = shapes.empty_transformer(layers=1)
    cast(model, dtype)
    heads = (model.config.num_attention_heads, model.config.attention_head_dim)
    with torch.device("meta"):
        latents = _latents(shapes, size, batch, frames, dtype)
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
def _vae_bytes(spec: str, dtype: torch.dtype, size: tuple[int, int], batch: int, frames: int) -> _Part:
    shapes = _shapes(spec)
    if shapes.vae is None:
        return _Part()
    vae = shapes.empty_vae()
    optimize_vae(vae)
    weights = cast(vae, dtype)
    decoder = StreamingVAEDecoder(vae)
    with torch.device("meta"):
        latents = _latents(shapes, size, batch, frames, dtype)

    def run() -> None:
        for _ in range(2):  # the second chunk is the first that finds a full memory
            decoder.decode(latents)

    return _Part(weights, *live_bytes(run))


@functools.lru_cache(maxsize=16)
def _encoder_bytes(spec: str, dtype: torch.dtype) -> _Part:
    shapes = _shapes(spec)
    if shapes.text_encoder is None:
        return _Part()
    encoder, values = shapes.empty_text_encoder(), shapes.text_encoder
    table = encoder.get_input_embeddings().weight  # stays in host memory
    largest = max(weight.numel() for weight in encoder.parameters() if weight is not table) * dtype.itemsize
    tokens, heads = shapes.index.get("max_sequence_length", 512), values["num_heads"]
    # Attention scores with their bias and softmax in float32, and the two branches of the gated feed-forward layer.
    working = 12 * heads * tokens * tokens + tokens * dtype.itemsize * (4 * values["d_ff"] + 8 * values["d_model"])
    return _Part(cast(encoder, dtype), working, largest)
