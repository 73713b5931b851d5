"""Time one transformer pass at several cache lengths: our schemes, the float model, and other quantizers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..calibration.calibrate import calibrate
from ..config import QARVDConfig
from ..kv_cache.cache import KVCache
from ..models.transformer_causal_wan import CausalWanTransformer3DModel
from ..quantization.install import apply
from ..rollout.pass_info import PassInfo
from .breakdown import breakdown
from .shapes import WINDOW_FRAMES, Shape, random_controls, random_inputs, random_transformer
from .timing import median_ms, relative_error, time_limit

TIMESTEP = 750.0


class PassRunner:
    """Run passes of one transformer on fixed inputs, chunk after chunk.

    Args:
        transformer: the model, on its device and in its dtype.
        shape: its sizes.
        kv_cache: storage of the K/V cache, a key of `kv_cache.storage.STORAGES`.
    """

    def __init__(self, transformer: CausalWanTransformer3DModel, shape: Shape, kv_cache: str = "auto") -> None:
        parameter = next(transformer.parameters())
        self._transformer = transformer
        self._latents, self._text = random_inputs(shape, parameter.device, torch.bfloat16)
        self._controls = random_controls(shape, parameter.device, torch.bfloat16)
        self._kv_cache = kv_cache
        self._timestep = torch.full((1,), TIMESTEP, device=parameter.device)
        self.reset()

    def reset(self) -> None:
        """Start a new stream."""
        self._cache = KVCache(len(self._transformer.blocks), num_frames=WINDOW_FRAMES, storage=self._kv_cache)

    @torch.no_grad()
    def __call__(self, chunk: int, cache_only: bool = False) -> Tensor:
        """Return the flow of one pass over `chunk`, which is that of the previous call or the next one."""
        return self._transformer(
            self._latents,
            self._timestep,
            self._text,
            kv_cache=self._cache,
            frame_offset=chunk * self._latents.shape[2],
            cache_only=cache_only,
            return_dict=False,
            **self._controls,
        )[0]


def measure(runner: PassRunner, chunks: Sequence[int], repeats: int) -> tuple[dict[str, float], dict[int, Tensor]]:
    """Time a denoising pass at each of `chunks`.

    Returns:
        Median milliseconds by chunk (from 1, as text), and flows by chunk (from 0), in float32 on the CPU.
    """
    times, flows = {}, {}
    for chunk in range(max(chunks) + 1):
        flow = runner(chunk)
        if chunk in chunks:
            flows[chunk] = flow.float().cpu()
            times[str(chunk + 1)] = median_ms(lambda chunk=chunk: runner(chunk), repeats)
    return times, flows


def operations(
    runner: PassRunner, shape: Shape, chunks: Sequence[int], eight: bool
) -> dict[str, list[dict[str, Any]]]:
    """Break a pass down at each of `chunks`, in a separate stream, so that no timed pass is profiled."""
    runner.reset()
    rows = {}
    for chunk in range(max(chunks) + 1):
        runner(chunk)
        if chunk in chunks:
            rows[str(chunk + 1)] = breakdown(lambda chunk=chunk: runner(chunk), shape, chunk, eight)
    return rows


def quantized(transformer: CausalWanTransformer3DModel, shape: Shape, scheme: str) -> CausalWanTransformer3DModel:
    """Return a quantized copy, calibrated on one chunk: enough to measure speed and a plausible error."""
    model = copy.deepcopy(transformer)
    config = QARVDConfig(scheme, rounding="nearest", calibration_chunks=1, calibration_prompts=("random",))

    def run(on_pass: Callable[[PassInfo], None]) -> None:
        """Run the passes to calibrate on."""
        runner = PassRunner(model, shape)
        for role in ("denoise", "refresh"):
            on_pass(PassInfo(0, role, 0, TIMESTEP, 0, shape.chunk_frames))
            runner(0)

    apply(model, calibrate(model, run, config))
    return model


def kv_cache_of(options: list[str]) -> str:
    """Return the storage of the K/V cache that the options of a variant, such as `["int8", "overlap"]`, ask for."""
    return next((option for option in options if option in ("int8", "fp8")), "auto")


def build(name: str, transformer: CausalWanTransformer3DModel, shape: Shape) -> PassRunner:
    """Build the variant `name` of a float transformer, which is not changed.

    Raises:
        ImportError: the package that the variant needs is not installed.
    """
    if name.startswith("w"):
        scheme, *options = name.split("-")
        return PassRunner(quantized(transformer, shape, scheme), shape, kv_cache_of(options))
    model = copy.deepcopy(transformer)
    if name.startswith("torchao"):
        _quantize_with_torchao(model, name)
    runner = PassRunner(model, shape)
    if name != "bf16":
        model.set_attention_backend("_native_cudnn")
        runner(0)  # projects the prompt first, since no block should be compiled for that single pass
        model.compile_repeated_blocks(fullgraph=True)
    return runner


def _quantize_with_torchao(model: CausalWanTransformer3DModel, name: str) -> None:
    """Quantize the blocks in place, as `torchao-int8` or `torchao-fp8`."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    config = Int8DynamicActivationInt8WeightConfig()
    if name == "torchao-fp8":
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(model.blocks, config)
    # torchao turns this tuning on, which takes minutes.
    torch._inductor.config.coordinate_descent_tuning = False
    torch._inductor.config.coordinate_descent_check_all_directions = False


def bench_passes(
    shape: Shape,
    variants: Sequence[str],
    device: torch.device,
    chunks: Sequence[int] = (0, 3, 6),
    repeats: int = 10,
    on_result: Callable[[dict[str, Any]], None] = lambda result: None,
    seconds: float | None = None,
) -> list[dict[str, Any]]:
    """Time every variant on the same weights and inputs.

    Args:
        shape: sizes of the model and of a chunk.
        variants: names, see `bench.PASS_VARIANTS`.
        device: where to run.
        chunks: indices, from 0, of the chunks whose passes are timed.
        repeats: how many passes to take the median of.
        on_result: called with the result of every variant.
        seconds: time limit of a variant, its compilation included.

    Returns:
        Per variant: `name`, `ms` by chunk (from 1), `mean_ms`, `peak_bytes`, `relative_error` of the flow against the
        first variant, and for our schemes `operations` by chunk (see `breakdown`); or `error`, if it failed.
    """
    transformer = random_transformer(shape, device, torch.bfloat16)
    results: list[dict[str, Any]] = []
    reference: dict[int, Tensor] = {}
    for name in variants:
        result: dict[str, Any] = {"name": name}
        try:
            with time_limit(seconds):
                runner = build(name, transformer, shape)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                result["ms"], flows = measure(runner, chunks, repeats)
            result["mean_ms"] = sum(result["ms"].values()) / len(result["ms"])
            reference = reference or flows
            errors = {str(chunk + 1): relative_error(flows[chunk], reference[chunk]) for chunk in chunks}
            result["relative_error"] = errors
            if device.type == "cuda":
                result["peak_bytes"] = torch.cuda.max_memory_allocated()
                if name.startswith("w"):
                    result["operations"] = operations(runner, shape, chunks, "-" in name)
            del runner
        except (ImportError, RuntimeError, ValueError, TypeError, TimeoutError, AssertionError) as error:
            result["error"] = f"{type(error).__name__}: {error}"
        results.append(result)
        on_result(result)
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results
