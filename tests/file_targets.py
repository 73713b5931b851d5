"""The kinds of files that are loaded, each as a tiny valid folder, what uses it, and what a changed one may give."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from file_mutations import read_layout
from lora_files import as_file, random_lora
from safetensors.torch import load_file, save_file
from tiny_pipeline import build_pipeline
from torch import Tensor

from qarvd_diffusers import ARVDPipeline, QARVDConfig
from qarvd_diffusers.calibration.resume import ResumeFolder
from qarvd_diffusers.calibration.sensitivity import SensitivityResult
from qarvd_diffusers.conversion import convert_checkpoint, to_original_keys
from qarvd_diffusers.quantization.result import CalibrationResult
from qarvd_diffusers.rollout.text_encoder import save_prompt_embeds

PROMPT = "a red circle moves left"
SEAL = "qarvd_seal"  # entry of a header, by which a change of content is seen
_WEIGHTS, _JSON = "*.safetensors", "*.json"

Use = Callable[[Path], list[Any]]  # path of the files -> tensors and JSON values that came of them


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Attributes:
        folder: valid files, below a folder of the kind's name.
        patterns: which of them are damaged.
        use: loads the folder and computes with what was loaded.
    """

    folder: Path
    patterns: tuple[str, ...]
    use: Use

    def files(self, folder: Path | None = None) -> list[Path]:
        """List the files to be damaged."""
        root = folder or self.folder
        return sorted({path for pattern in self.patterns for path in root.rglob(pattern)})


def quiet(pipe: ARVDPipeline) -> ARVDPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(pipe: ARVDPipeline, output_type: str = "pt", **inputs: Any) -> list[Tensor]:
    """Make one chunk."""
    inputs = inputs or {"prompt": PROMPT}
    generator = torch.Generator().manual_seed(0)
    return [quiet(pipe)(**inputs, num_frames=9, generator=generator, output_type=output_type).frames]


def make_targets(root: Path) -> dict[str, Target]:
    """Write valid files of every kind below `root`; the seeds are fixed."""
    build_pipeline().save_pretrained(root / "base")
    base = ARVDPipeline.from_pretrained(root / "base", denoising_timesteps=[1000, 500])
    base.save_pretrained(root / "base")
    targets: dict[str, Target] = {}

    def add(name: str, write: Callable[[Path], Any], use: Use, *patterns: str) -> None:
        (root / name).mkdir()
        write(root / name)
        targets[name] = Target(root / name, patterns, use)

    def add_folder(name: str, pipe: ARVDPipeline, *components: str, **options: Any) -> None:
        patterns = [f"{component}/{each}" for component in components for each in (_WEIGHTS, _JSON)]
        add(name, lambda path: pipe.save_pretrained(path, **options), load_folder, *patterns)

    def fresh() -> ARVDPipeline:
        return quiet(ARVDPipeline.from_pretrained(root / "base"))

    quantized = {}
    for scheme in ("w4a8", "w8a8", "w8a8_dynamic"):
        prompts = None if scheme == "w8a8_dynamic" else (PROMPT,)
        config = QARVDConfig(scheme, outlier_alignment=4, calibration_prompts=prompts, calibration_chunks=1)
        pipe = quantized[scheme] = fresh()
        result = pipe.calibrate(config, use_cache=False)
        pipe.quantize(config, result)
        add_folder(scheme, pipe, "transformer")
        if scheme == "w4a8":
            add_results(add, fresh, config, result)
    add_folder("float", base, "transformer")
    add_folder("sharded", base, "transformer", max_shard_size="30KB")
    add_folder("vae", base, "vae")
    add_folder("text_encoder", base, "text_encoder")
    folders = [f"{name}/{_JSON}" for name in ("scheduler", "tokenizer", "vae", "text_encoder")]
    add("json", base.save_pretrained, load_folder, "model_index.json", *folders)
    parts = {name: getattr(base, name) for name in ("vae", "text_encoder", "tokenizer")}

    def load_single(folder: Path) -> list[Any]:
        return video(ARVDPipeline.from_single_file(folder / "model.safetensors", **parts), "latent")

    for name, pipe in (("float", base), *quantized.items()):
        add(
            f"single_{name}",
            lambda p, pipe=pipe: pipe.save_single_file(p / "model.safetensors"),
            load_single,
            _WEIGHTS,
        )
    add_others(add, base, fresh)
    return targets


def load_folder(folder: Path) -> list[Any]:
    return video(ARVDPipeline.from_pretrained(folder))


def add_results(
    add: Callable[..., None], fresh: Callable[[], ARVDPipeline], config: QARVDConfig, result: CalibrationResult
) -> None:
    """Add what a calibration writes."""

    def load_result(folder: Path) -> list[Any]:
        pipe = fresh()
        pipe.quantize(config, CalibrationResult.load(folder / "result.safetensors", config))
        return video(pipe, "latent")

    add("result", lambda p: result.save(p / "result.safetensors"), load_result, _WEIGHTS)

    def write_resume(folder: Path) -> None:
        ResumeFolder(folder, "f" * 40).save("part", result.layers)

    linears = {name: fresh().transformer.get_submodule(name) for name in result.layers}

    def load_resume(folder: Path) -> list[Any]:
        with warnings_as_errors():
            layers = ResumeFolder(folder, "f" * 40).load("part", linears)
        if layers is None:  # it is made again
            raise FileNotFoundError(f"{folder}: the part is not there")
        return [tensor for name in sorted(layers) for _, tensor in sorted(layers[name].tensors().items())]

    add("resume", write_resume, load_resume, _WEIGHTS, _JSON)

    measured = {"model": "m", "config": {"scheme": "w4a8", "seed": 0}, "prompts": [PROMPT]}

    def write_sensitivity(folder: Path) -> None:
        errors = ((0.5, 0.25, 0.125), (0.0, 0.5, 0.25), (0.0, 0.0, 0.5))
        SensitivityResult(measured, 1, (3, 3, 3)).with_prompt(errors).save(folder / "sensitivity.json")

    def load_sensitivity(folder: Path) -> list[Any]:
        loaded = SensitivityResult.load(folder / "sensitivity.json")
        loaded.require_same_measurement(measured, folder)
        return [loaded.errors, loaded.frames, loaded.chunk_weights]

    add("sensitivity", write_sensitivity, load_sensitivity, _JSON)


class warnings_as_errors(logging.Handler):
    """Raise the first warning of the library as a ValueError: where a damaged file is left out, that names it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> None:
        self.messages: list[str] = []
        logging.getLogger("qarvd_diffusers").addHandler(self)

    def __exit__(self, *error: object) -> None:
        logging.getLogger("qarvd_diffusers").removeHandler(self)
        if self.messages and error[0] is None:
            raise ValueError(self.messages[0])


def add_others(add: Callable[..., None], base: ARVDPipeline, fresh: Callable[[], ARVDPipeline]) -> None:
    """Add states, adapters, original checkpoints and embeddings."""

    def write_state(folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        stream = quiet(fresh()).stream(PROMPT, num_chunks=2, generator=generator, output_type="pt", kv_cache="int8")
        next(stream)
        stream.save_state(folder / "state.safetensors")

    def load_state(folder: Path) -> list[Any]:
        return [chunk.frames for chunk in quiet(fresh()).restore_stream(folder / "state.safetensors")]

    add("state", write_state, load_state, _WEIGHTS)
    lora = as_file(random_lora(base.transformer), "comfyui")

    def load_lora(folder: Path) -> list[Any]:
        pipe = fresh()
        pipe.load_lora_weights(next(folder.glob("lora.*")))
        return video(pipe, "latent")

    add("lora", lambda p: save_file(lora, p / "lora.safetensors"), load_lora, _WEIGHTS)
    add("lora_pt", lambda p: torch.save({"generator_lora": lora}, p / "lora.pt"), load_lora, "*.pt")
    original = {key: tensor.detach() for key, tensor in to_original_keys(base.transformer.state_dict()).items()}

    def convert(folder: Path) -> list[Any]:
        out = convert_checkpoint(folder / "model.pt", folder / "out", num_attention_heads=2)
        tensors = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
        return [tensor for _, tensor in sorted(tensors.items())]

    nested = {"generator_ema": original, "step": 3}
    add("original_pt", lambda p: torch.save(nested, p / "model.pt"), convert, "*.pt")
    embeds = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(1))
    add(
        "embeds",
        lambda p: save_prompt_embeds(embeds, p / "embeds.safetensors"),
        lambda p: video(base, "latent", prompt_embeds=p / "embeds.safetensors"),
        _WEIGHTS,
    )


# --- what a changed file may give ---


def is_same(one: list[Any], other: list[Any]) -> bool:
    """Return whether two uses gave the same bits."""

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b

    return len(one) == len(other) and all(map(same, one, other))


def is_finite(values: list[Any]) -> bool:
    """Return whether the tensors of a use are finite."""
    return all(value.isfinite().all() for value in values if isinstance(value, Tensor))


def says_so(old: Path, new: Path) -> bool:
    """Return whether a damaged file is a plausible one without a seal, whose values may differ: same structure."""
    try:
        if new.suffix == ".json":
            return _alike(json.loads(old.read_bytes()), json.loads(new.read_bytes(), object_pairs_hook=_unique))
        return _plausible(*map(_content, (old, new)))
    except Exception:
        return False


def _content(path: Path) -> dict[str, Any]:
    """Read a file independently of the library: tensors and JSON values by name."""
    if path.suffix != ".safetensors":
        return dict(_flat(torch.load(path, weights_only=True)))
    texts = read_layout(path)[1]
    if SEAL in texts:
        raise ValueError("sealed")
    return load_file(path) | {f"text {key}": _parsed(text) for key, text in texts.items()}


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except ValueError:
        return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("twice")
    return dict(pairs)


def _plausible(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Return whether two files have the same names, shapes and kinds of numbers, and the new one possible values."""
    return old.keys() == new.keys() and all(_fits(name, old[name], new[name]) for name in old)


def _fits(name: str, old: Any, new: Any) -> bool:
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return _alike(old, new)
    batch = name == "prompt_embeds" and old.ndim == new.ndim  # of several videos
    if (old.shape != new.shape and not batch) or old.is_floating_point() != new.is_floating_point():
        return False
    if not new.is_floating_point():
        order = name.endswith("channel_order")
        return old.dtype == new.dtype and (not order or torch.equal(new.sort().values, old.sort().values))
    scale = name.endswith("_scale")
    return bool(new.isfinite().all() and (not scale or (new > 0).all()) and (not scale or old.dtype == new.dtype))


def _alike(old: Any, new: Any) -> bool:
    """Return whether two JSON values have the same keys and types."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_alike(old[key], new[key]) for key in old)
    if isinstance(old, list) and isinstance(new, list):
        return all(_alike(old[0], each) for each in new) if old else not new
    if isinstance(old, float) and type(new) is int:
        return True
    return type(old) is type(new) and not (isinstance(new, float) and not math.isfinite(new))
