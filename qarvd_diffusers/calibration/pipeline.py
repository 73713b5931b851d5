"""Calibrate a loaded pipeline: choose prompts and device, use the cache, run the rollouts."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..bundled import bundled_prompts
from ..config import PACKED_FORMAT, QARVDConfig
from ..files.cache import cache_folder, can_keep_results
from ..files.hashing import hash_tensors
from ..files.text import parse_prompts, read_text
from ..quantization.adapters import adapter_scales
from ..quantization.model import quantized_linears, unwrapped
from ..quantization.result import REVISION, CalibrationResult, config_hash, require_layers
from ..rollout.exclusive import model_lock
from ..rollout.pass_info import PassInfo
from .calibrate import Progress, Work, calibrate, plan_work, quantize_weights
from .processes import Processes
from .report import with_chunk_weights
from .resume import ResumeFolder
from .scout import scout
from .targets import Targets, is_published_family, quantizable_linears, select
from .work_bar import WorkBar, work_totals

if TYPE_CHECKING:
    from ..rollout.host import PipelineHost

logger = logging.getLogger(__name__)

# Arguments of `stream` that rollouts of their own leave out, apart from those of `stream_defaults`.
NO_INPUTS = ("prompt", "num_frames", "height", "width", "latents", "renoise_latents", "initial_latents", "generator")

PROMPTS_FILE = "calibration_prompts.txt"


def calibration_prompts(pipe: PipelineHost, config: QARVDConfig) -> tuple[str, ...]:
    """Choose the config's prompts, else those in the model's own folder, else the bundled general ones."""
    if config.calibration_prompts is not None:
        return config.calibration_prompts
    own = Path(pipe.source or "") / PROMPTS_FILE
    if own.is_file():
        return parse_prompts(read_text(own).splitlines(), str(own))
    return bundled_prompts()


def content_hash(pipe: PipelineHost, config: QARVDConfig, embeds: list[torch.Tensor]) -> str:
    """Hash everything that a calibration depends on: float weights, config, prompt embeddings, rollout settings.

    Embeddings stand for prompts, tokenizer and text encoder at once.
    """
    digest = hashlib.blake2b(digest_size=20)
    settings = config.replace(
        calibration_prompts=None,
        text_encoder=None,
        base_model=None,
        calibration_adapters=adapter_scales(pipe.transformer) or None,
    ).to_dict()
    rollout = {key: value for key, value in pipe.config.items() if not key.startswith("_")}
    model = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    described = [PACKED_FORMAT, REVISION, settings, rollout, model, torch.__version__]
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    hash_tensors(digest, pipe.transformer.state_dict().items())
    hash_tensors(digest, ((f"prompt {i}", e) for i, e in enumerate(embeds)))
    if pipe.stream_defaults and embeds:
        hash_tensors(digest, default_tensors(pipe, embeds[0], config.calibration_chunks))
    return digest.hexdigest()


def default_tensors(
    pipe: PipelineHost, prompt_embeds: torch.Tensor, num_chunks: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that `stream_defaults` add to the rollouts: of the start, and the controls of every chunk."""
    inputs = pipe.stream_inputs(
        **{**dict.fromkeys(NO_INPUTS), **pipe.stream_defaults},
        prompt_embeds=prompt_embeds,
        num_chunks=num_chunks,
        output_type="latent",
    )
    for name in ("initial_latents", "condition"):
        if (tensor := getattr(inputs, name)) is not None:
            yield name, tensor
    for chunk in range(num_chunks if inputs.controls is not None else 0):
        controls = inputs.controls(chunk)
        if not isinstance(controls, torch.Tensor):
            controls = torch.tensor(list(repr(controls).encode()), dtype=torch.uint8)
        yield f"controls {chunk}", controls


def calibrate_pipeline(
    pipe: PipelineHost,
    config: QARVDConfig,
    use_cache: bool = True,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Calibrate a float pipeline; nothing of it changes.

    Under `accelerate launch` all processes call this and work together: prompts are shared in the search of ranges,
    layers in rounding. Integer weights do not depend on the number of processes; scores of range candidates do in the
    last bits of a float64.

    Args:
        pipe: a float pipeline.
        config: what to calibrate for.
        use_cache: read and store the result in `cache_folder()` under its content hash, if that is writable.
        resume: folder for finished parts, so that an interrupted calibration continues where it stopped; None takes
            one in `cache_folder()` that is removed at the end, or none without `use_cache`.
        progress: called for every layer, pass and step of rounding with the current work, the steps done and the
            number of steps; an exception from it ends the calibration.

    Returns:
        The integer weights and quantizer parameters of every quantizable Linear.

    Raises:
        ValueError: the pipeline is quantized already, or runs on several GPUs; `resume` was made with another model,
            config or prompts; or the processes of a launch differ in them.
        RuntimeError: another process of a launch ended.
    """
    require_float(pipe)
    if getattr(pipe.transformer, "_parallel_config", None) is not None:
        raise ValueError(
            "The transformer was split by enable_parallelism(): calibrate before it. The processes of a launch share "
            "the prompts and layers of a calibration by themselves."
        )
    processes = Processes.launched()
    if not config.needs_calibration:
        work = plan_work(pipe.transformer, config)
        with WorkBar(work_totals(work, 0, 0), progress, desc="quantizing", disable=_hidden(pipe)) as bar:
            return quantize_weights(pipe.transformer, config, _by_kind(bar, work))
    config, _ = with_chunk_weights(pipe.transformer, config)
    with torch.no_grad():
        embeds = [pipe.encode_prompt(prompt) for prompt in calibration_prompts(pipe, config)]
    fingerprint = content_hash(pipe, config, embeds)
    processes.require_same(fingerprint, "model, config, prompts or settings")
    path = cache_folder() / "calibration" / f"{fingerprint}.safetensors"
    cached = processes.from_main(_cached(path, pipe, config) if processes.is_main and use_cache else None)
    if cached is not None:
        return cached
    use_cache = processes.from_main(processes.is_main and use_cache and can_keep_results())
    unfinished = cache_folder() / "unfinished" / fingerprint if use_cache and resume is None else None
    folder = _unfinished(unfinished, fingerprint) if unfinished else resume and ResumeFolder(resume, fingerprint)
    rollouts = list(enumerate(embeds))
    targets, scouted = pipeline_targets(pipe, config, embeds[0])
    share = processes.share(rollouts)
    passes = sum(sum(pipe.rollout_config.passes(chunk).values()) for chunk in range(config.calibration_chunks))
    work = plan_work(pipe.transformer, scouted, folder, processes, targets)
    totals = work_totals(work, passes * len(rollouts), passes * len(share))
    hidden = _hidden(pipe)
    with undisturbed(pipe), WorkBar(totals, progress, desc="calibrating", disable=hidden) as bar:
        run, run_share = (partial(_run, pipe, config, bar, some) for some in (rollouts, share))
        result = calibrate(pipe.transformer, run, scouted, _by_kind(bar, work), folder, processes, run_share, targets)
    result = replace(result, config_hash=config_hash(config))
    if processes.is_main and use_cache:
        _cache(result, path)
    if processes.is_main and unfinished is not None:
        shutil.rmtree(unfinished)
    return result


def pipeline_targets(
    pipe: PipelineHost, config: QARVDConfig, prompt_embeds: torch.Tensor
) -> tuple[Targets, QARVDConfig]:
    """Select what to quantize in a pipeline: by its structure in the published family, else by a float rollout.

    Returns:
        See `scout`.
    """
    if is_published_family(pipe.transformer) or not config.needs_calibration:
        return select(pipe.transformer, config), config
    with undisturbed(pipe):
        return scout(unwrapped(pipe.transformer), config, partial(_run, pipe, config, None, [(0, prompt_embeds)]))


def _run(
    pipe: PipelineHost,
    config: QARVDConfig,
    bar: WorkBar | None,
    rollouts: Sequence[tuple[int, torch.Tensor]],
    on_pass: Callable[[PassInfo], None],
) -> None:
    """Run rollouts, pairs of index and prompt embeddings; `on_pass` is called before every pass."""

    def observed(info: PassInfo) -> None:
        if bar is not None:
            bar.advance("pass", "running the model")
        on_pass(info)

    for index, prompt_embeds in rollouts:
        generator = torch.Generator("cpu").manual_seed(config.calibration_seed + index)
        for _ in pipe.stream(
            prompt_embeds=prompt_embeds,
            num_chunks=config.calibration_chunks,
            generator=generator,
            output_type="latent",
            on_pass=observed,
        ):
            pass


def _hidden(pipe: PipelineHost) -> bool:
    """Tell whether to hide bars: the pipeline hides its own, or this is not the main process of a launch."""
    bars = getattr(pipe, "_progress_bar_config", {})
    return bool(bars.get("disable")) or not Processes.launched().is_main


@contextmanager
def progress_on_device(pipe: PipelineHost, what: str, unit: str, total: int) -> Iterator[Callable[[], Any]]:
    """Show one bar over all rollouts and yield its step function; see `undisturbed`."""
    hidden = _hidden(pipe)
    with undisturbed(pipe), tqdm(desc=what, unit=unit, total=total, disable=hidden) as bar:
        yield bar.update


def _cached(path: Path, pipe: PipelineHost, config: QARVDConfig) -> CalibrationResult | None:
    """Load an earlier result, if there is one that can be read and is of this model and config."""
    if not path.is_file():
        return None
    try:
        result = CalibrationResult.load(path, config)
        linears = quantizable_linears(pipe.transformer, config)
        if not is_published_family(pipe.transformer):  # a rollout has left some of them out
            linears = {name: linear for name, linear in linears.items() if name in result.layers}
        require_layers(result.layers, linears, path)
    except (OSError, ValueError) as error:
        logger.warning("A cached calibration is not used: %s", error)
        return None
    logger.info("Calibration found in %s", path)
    return result


def _unfinished(path: Path, fingerprint: str) -> ResumeFolder:
    """Open the folder of an interrupted calibration in the cache; one that cannot be read starts over."""
    try:
        return ResumeFolder(path, fingerprint)
    except ValueError as error:
        logger.warning("An interrupted calibration is not continued: %s", error)
        shutil.rmtree(path, ignore_errors=True)
        return ResumeFolder(path, fingerprint)


def _cache(result: CalibrationResult, path: Path) -> None:
    """Store a result, or log a warning where it cannot be written."""
    try:
        result.save(path)
    except OSError as error:
        logger.warning("The calibration is not kept for another time: %s", error)


def require_float(pipe: PipelineHost) -> None:
    """Check that a pipeline is float, before anything is done with it.

    Raises:
        ValueError: it is quantized; the message names its scheme.
    """
    if quantized_linears(pipe.transformer):
        config = pipe.transformer.config.get("quantization_config")
        scheme = "" if config is None else f" ({config['scheme'] if isinstance(config, dict) else config.scheme})"
        name = getattr(pipe, "name_or_path", None) or "the pipeline"
        raise ValueError(f"{name} is quantized already{scheme}: quantize the float model")


def _by_kind(bar: WorkBar, work: Work) -> Progress:
    """Turn what `calibrate` reports into steps of the bar: first all layers, then the rounding."""
    layers = iter(range(work.layers))

    def report(text: str, step: int, steps: int) -> None:
        kind = "rounding" if next(layers, None) is None else "layer"
        bar.advance(kind, text)

    return report


@contextmanager
def undisturbed(pipe: PipelineHost) -> Iterator[None]:
    """Hide the bars of single rollouts, and move the pipeline to the GPU, if there is one, and back afterwards.

    Streams of other threads wait meanwhile: their passes would be observed, too.
    """
    with model_lock(pipe.transformer):
        yield from _undisturbed(pipe)


def _undisturbed(pipe: PipelineHost) -> Iterator[None]:
    home = pipe.device
    bar_config = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    if home.type == "cpu" and torch.cuda.is_available():
        pipe.to("cuda")
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**bar_config)
        if pipe.device != home:
            pipe.to(home)
