"""Quantizing a loaded pipeline: which prompts, on which device, from which cache; the work itself is in calibration/."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import PipelineQuantizationConfig
from tqdm.auto import tqdm

from ..bundled import bundled_prompts
from ..calibration.calibrate import Progress, Work, apply, calibrate, plan_work, quantize_weights
from ..calibration.processes import Processes
from ..calibration.result import REVISION, CalibrationResult
from ..calibration.resume import ResumeFolder
from ..config import PACKED_FORMAT, QARVDConfig, parse_prompts
from ..models.pass_info import PassInfo
from ..quantizer import attach
from ..serialization import quantized_linears
from ..text_files import read_text
from .lora import adapter_scales
from .work_bar import WorkBar, work_totals

if TYPE_CHECKING:
    from .arvd_mixin import ARVDMixin

logger = logging.getLogger(__name__)

PROMPTS_FILE = "calibration_prompts.txt"


def split_config(quantization_config: Any) -> tuple[QARVDConfig | None, PipelineQuantizationConfig | None]:
    """What the user passed as `quantization_config`: our part for the transformer, the rest for diffusers.

    Args:
        quantization_config: `QARVDConfig`, its dict, a `PipelineQuantizationConfig` (whose `quant_mapping` may hold a
            `QARVDConfig` for the transformer beside configs of other components), or None.
    """
    if isinstance(quantization_config, dict):
        return QARVDConfig.from_dict(quantization_config), None
    if isinstance(quantization_config, PipelineQuantizationConfig):
        mapping = dict(quantization_config.quant_mapping or {})
        ours = mapping.pop("transformer", None)
        if not isinstance(ours, QARVDConfig):
            return None, quantization_config
        return ours, PipelineQuantizationConfig(quant_mapping=mapping) if mapping else None
    if quantization_config is None or isinstance(quantization_config, QARVDConfig):
        return quantization_config, None
    raise ValueError(
        f"quantization_config is a {type(quantization_config).__name__}, expected QARVDConfig, its dict, "
        "PipelineQuantizationConfig or None"
    )


def check_stored_config(stored: QARVDConfig, wanted: QARVDConfig) -> None:
    """Refuse to load a quantized checkpoint under a config that asks for something else than what is stored."""
    differing = {
        name: (getattr(stored, name), getattr(wanted, name))
        for name in ("scheme", "reference_compat")
        if getattr(stored, name) != getattr(wanted, name)
    }
    if differing:
        listed = ", ".join(f"{name}: stored {a!r}, asked {b!r}" for name, (a, b) in differing.items())
        raise ValueError(
            f"The checkpoint is quantized already and its config differs from the one passed ({listed}). Load it without "
            "quantization_config, or quantize the float model."
        )


def calibration_prompts(pipe: ARVDMixin, config: QARVDConfig) -> tuple[str, ...]:
    """The config's prompts, else those in the model's own folder, else the bundled set of general ones."""
    if config.calibration_prompts is not None:
        return config.calibration_prompts
    own = Path(pipe.source or "") / PROMPTS_FILE
    if own.is_file():
        return parse_prompts(read_text(own).splitlines(), str(own))
    return bundled_prompts()


def cache_folder() -> Path:
    """Where calibration results are kept: `$QARVD_CACHE`, else `qarvd` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qarvd"
    return Path(os.environ.get("QARVD_CACHE") or default)


def can_keep_results() -> bool:
    """Whether `cache_folder()` can be written to; says so where it cannot: nothing but time is lost then."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_folder()):
            return True
    except OSError as error:
        logger.warning(
            "Results will not be kept for another time: %s cannot be written to (%s). Set QARVD_CACHE to a folder that can.",
            cache_folder(),
            error,
        )
        return False


def _kept(path: Path) -> CalibrationResult | None:
    """An earlier result, if there is one that can be read."""
    if not path.is_file():
        return None
    try:
        result = CalibrationResult.load(path)
    except (OSError, ValueError) as error:
        logger.warning("A kept calibration is not used: %s", error)
        return None
    logger.info("Calibration found in %s", path)
    return result


def _keep(result: CalibrationResult, path: Path) -> None:
    try:
        result.save(path)
    except OSError as error:
        logger.warning("The calibration is not kept for another time: %s", error)


def require_float(pipe: ARVDMixin) -> None:
    """Refuse a quantized pipeline before anything is done with it.

    Raises:
        ValueError: names its scheme.
    """
    if quantized_linears(pipe.transformer):
        config = pipe.transformer.config.get("quantization_config")
        scheme = "" if config is None else f" ({config['scheme'] if isinstance(config, dict) else config.scheme})"
        raise ValueError(f"The transformer is quantized already{scheme}: take the float model.")


def content_hash(pipe: ARVDMixin, config: QARVDConfig, embeds: list[torch.Tensor]) -> str:
    """Hash of everything a calibration depends on: float weights, config, prompt embeddings, rollout settings.

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
    return digest.hexdigest()


def hash_tensors(digest: hashlib.blake2b, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Add names, dtypes, shapes and bits of tensors to a hash."""
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())


def calibrate_pipeline(
    pipe: ARVDMixin,
    config: QARVDConfig,
    use_cache: bool = True,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Calibrate a float pipeline; nothing of it changes.

    Under `accelerate launch` all processes call this and work together: prompts are shared in the search of ranges, layers
    in rounding. Integer weights do not depend on the number of processes; scores of range candidates do in the last bits
    of a float64.

    Args:
        pipe: a float pipeline.
        config: what to calibrate for.
        use_cache: take and keep the result in `cache_folder()` under its content hash; where that cannot be written, go on
            without.
        resume: folder for finished parts, so that an interrupted calibration goes on where it stopped; None takes one in
            `cache_folder()` that is removed at the end, or none without `use_cache`.
        progress: told, as the bar is, for every layer, pass and step of rounding what is being done, how many steps are done,
            and how many there are in all; what it raises ends the calibration.

    Returns:
        The integer weights and quantizer parameters of every quantizable Linear.

    Raises:
        ValueError: the pipeline is quantized already, or runs on several GPUs; `resume` was made with another model, config
            or prompts; or the processes of a launch differ in them.
        RuntimeError: another process of a launch ended.
    """
    require_float(pipe)
    if getattr(pipe.transformer, "_parallel_config", None) is not None:
        raise ValueError(
            "The transformer was split by enable_parallelism(): calibrate before it. The processes of a launch share the "
            "prompts and layers of a calibration by themselves."
        )
    processes = Processes.launched()
    if not config.needs_calibration:
        work = plan_work(pipe.transformer, config)
        with WorkBar(work_totals(work, 0, 0), progress, desc="quantizing", disable=_hidden(pipe)) as bar:
            return quantize_weights(pipe.transformer, config, _by_kind(bar, work))
    with torch.no_grad():
        embeds = [pipe.encode_prompt(prompt) for prompt in calibration_prompts(pipe, config)]
    fingerprint = content_hash(pipe, config, embeds)
    processes.require_same(fingerprint, "model, config, prompts or settings")
    path = cache_folder() / "calibration" / f"{fingerprint}.safetensors"
    found = processes.from_main(_kept(path) if processes.is_main and use_cache else None)
    if found is not None:
        return found
    use_cache = processes.from_main(processes.is_main and use_cache and can_keep_results())
    unfinished = cache_folder() / "unfinished" / fingerprint if use_cache and resume is None else None
    parts = unfinished or resume
    folder = None if parts is None else ResumeFolder(parts, fingerprint)
    rollouts = list(enumerate(embeds))
    share = processes.share(rollouts)
    passes = sum(sum(pipe.causal_fields.passes(chunk).values()) for chunk in range(config.calibration_chunks))
    work = plan_work(pipe.transformer, config, folder, processes)
    totals = work_totals(work, passes * len(rollouts), passes * len(share))
    hidden = _hidden(pipe)
    with undisturbed(pipe), WorkBar(totals, progress, desc="calibrating", disable=hidden) as bar:

        def run(on_pass: Callable[[PassInfo], None], chosen: Sequence[tuple[int, torch.Tensor]] = rollouts) -> None:
            def observed(info: PassInfo) -> None:
                bar.advance("pass", "running the model")
                on_pass(info)

            for index, prompt_embeds in chosen:
                generator = torch.Generator("cpu").manual_seed(config.calibration_seed + index)
                for _ in pipe.stream(
                    prompt_embeds=prompt_embeds,
                    num_chunks=config.calibration_chunks,
                    generator=generator,
                    output_type="latent",
                    on_pass=observed,
                ):
                    pass

        run_share = partial(run, chosen=share)
        result = calibrate(pipe.transformer, run, config, _by_kind(bar, work), folder, processes, run_share)
    if processes.is_main and use_cache:
        _keep(result, path)
    if processes.is_main and unfinished is not None:
        shutil.rmtree(unfinished)
    return result


def _by_kind(bar: WorkBar, work: Work) -> Progress:
    """What `calibrate` reports, as steps of the bar: first all layers, then the rounding."""
    layers = iter(range(work.layers))

    def report(text: str, step: int, steps: int) -> None:
        kind = "rounding" if next(layers, None) is None else "layer"
        bar.advance(kind, text)

    return report


def quantize_pipeline(pipe: ARVDMixin, config: QARVDConfig, result: CalibrationResult | None = None) -> None:
    """Quantize the pipeline's transformer in place, calibrating first unless a result is given."""
    require_float(pipe)
    apply(pipe.transformer, result or calibrate_pipeline(pipe, config))
    hub_id = pipe.source if pipe.source and not Path(pipe.source).exists() else None
    adapters = adapter_scales(pipe.transformer) if config.needs_calibration else {}
    config = config.replace(base_model=config.base_model or hub_id, calibration_adapters=adapters or None)
    attach(pipe.transformer, config)


def quantize_text_encoder(text_encoder: torch.nn.Module) -> None:
    """Weight-only int8 by optimum-quanto, in place."""
    from optimum.quanto import freeze, qint8, quantize

    quantize(text_encoder, weights=qint8)
    freeze(text_encoder)


def _hidden(pipe: ARVDMixin) -> bool:
    """Whether to show no bars: the pipeline has none, or this is not the main process of a launch."""
    bars = getattr(pipe, "_progress_bar_config", {})
    return bool(bars.get("disable")) or not Processes.launched().is_main


@contextmanager
def undisturbed(pipe: ARVDMixin) -> Iterator[None]:
    """No bar for each rollout; on the GPU if there is one, and back afterwards."""
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


@contextmanager
def at_work(pipe: ARVDMixin, what: str, unit: str, total: int) -> Iterator[Callable[[], Any]]:
    """One bar over all rollouts, whose step is handed out; see `undisturbed`."""
    hidden = _hidden(pipe)
    with undisturbed(pipe), tqdm(desc=what, unit=unit, total=total, disable=hidden) as bar:
        yield bar.update
