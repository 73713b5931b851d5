"""Write the model cards of converted and quantized checkpoints."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..config import QARVDConfig
from ..files.schema import read_json

logger = logging.getLogger(__name__)

CARD_FILE, REPORT_FILE = "README.md", "fidelity.json"
_TAG = "qarvd"
_UNMEASURED = (
    "Fidelity was not measured for this checkpoint. Measure it with "
    "`qarvd_diffusers.evaluate(float_pipe, pipe, prompts)`.\n"
)
# Metric of a report -> title and format of its column.
_COLUMNS = {
    "psnr_db": ("PSNR (dB)", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "latent_mse": ("latent MSE", ".3e"),
    "lpips": ("LPIPS", ".4f"),
}


def is_non_commercial(licence: str | None) -> bool:
    """Tell whether a licence identifier, such as `cc-by-nc-sa-4.0`, forbids commercial use, as academic ones do."""
    words = re.split(r"[\W_]+", (licence or "").lower().replace("non-commercial", "noncommercial"))
    return not {"nc", "noncommercial", "academic"}.isdisjoint(words)


def _card_data(folder: str | os.PathLike[str]) -> ModelCardData | None:
    """Read the header of a folder's model card; None if there is no card, or one that cannot be read."""
    path = Path(folder) / CARD_FILE
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path).data
    except Exception as error:  # a README is anybody's text, and no reason not to save a model
        logger.warning("%s is not read as a model card, its licence is not known: %s", path, error)
        return None


def stated_licence(folder: str | os.PathLike[str]) -> str | None:
    """Return the licence identifier in a folder's model card, None if there is no card or it states no licence."""
    licence = getattr(_card_data(folder), "license", None)
    if licence is not None and not isinstance(licence, str):
        logger.warning("%s: license is %r, expected an identifier", Path(folder) / CARD_FILE, licence)
        return None
    return licence


def stored_report(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the report of `evaluate` that a folder was saved with; None if there is none, or a damaged one."""
    path = Path(folder) / REPORT_FILE
    if not path.is_file():
        return None
    try:
        report = read_json(path)
        _fidelity(report)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        logger.warning("%s is damaged, the model card says that nothing was measured: %s", path, error)
        return None
    return report


def owned_files(folder: str | os.PathLike[str]) -> list[str]:
    """Name the files of a saved pipeline that speak of its weights: a save that does not write them removes them.

    A README that is none of our model cards is its user's.
    """
    tags = getattr(_card_data(folder), "tags", None)
    return [REPORT_FILE, *([CARD_FILE] if isinstance(tags, list) and _TAG in tags else [])]


def _code(text: str) -> str:
    """Set a text that a checkpoint brought as code, without characters that would end it or begin something else."""
    return "`" + re.sub(r"[`|<>\s]+", " ", text)[:100] + "`"


def _tags(licence: str | None, *tags: str) -> list[str]:
    """Return the tags of a card, with `non-commercial` if the licence is."""
    return [*tags, "non-commercial"] if is_non_commercial(licence) else [*tags]


def _licence_text(licence: str | None) -> str:
    """Write the section on the licence."""
    if licence is None:
        return "Not known. These weights inherit the licence of the base model: state it before you publish them."
    warning = ""
    if is_non_commercial(licence):
        warning = "**Non-commercial**: these weights may not be used or sold commercially. "
    return f"{warning}{_code(licence)}, inherited from the base model."


def converted_card(family: str, source: str, licence: str | None) -> ModelCard:
    """Write the card of a float model that was converted from an original release.

    Args:
        family: key of `FAMILIES`.
        source: Hub id and file names of the release.
        licence: licence identifier of the released weights, None if unknown.
    """
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-video",
        tags=_tags(licence, "autoregressive-video-diffusion", family),
        license=licence,
    )
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {family}

The weights of {source}, converted to the diffusers layout. Only tensor names and the file format differ.

```python
import qarvd_diffusers  # pip install -e . in a clone of the Q-ARVD repository
pipe = qarvd_diffusers.ARVDPipeline.from_pretrained("path/to/this/folder")
```

## Licence

{_licence_text(licence)}
"""
    )


def _number(value: float | None, form: str) -> str:
    # JSON has no infinity: the PSNR of identical videos may have become None.
    return "identical" if value is None or math.isinf(value) else format(value, form)


def _fidelity(report: Mapping[str, Any] | None) -> str:
    """Write the table of metrics per chunk."""
    if report is None:
        return _UNMEASURED
    columns = {name: form for name, form in _COLUMNS.items() if report.get(name) is not None}
    rows = "\n".join(
        f"| {chunk} | " + " | ".join(_number(report[name][chunk], form) for name, (_, form) in columns.items()) + " |"
        for chunk in range(report["num_chunks"])
    )
    header = " | ".join(title for title, _ in columns.values())
    text = (
        f"Compared with the float model on identical initial noise and re-noise: {report['prompts']} prompts, "
        f"{report['num_chunks']} chunks, seed {report['seed']}.\n\n"
        f"| chunk | {header} |\n|---{'|---' * len(columns)}|\n{rows}\n"
    )
    if report.get("adherence") is not None:
        text += f"\nPrompt adherence: {report['adherence']:.1%}, float model {report['reference_adherence']:.1%}.\n"
    return text


def _base_model(name: str | None) -> str:
    """Write the base model as a link if its name is one of a Hub repository."""
    if not name:
        return "An autoregressive video diffusion model"
    return f"[{name}](https://huggingface.co/{name})" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else _code(name)


def _exceptions(config: QARVDConfig) -> str:
    """List the layers whose number of bits differs from the scheme's."""
    listed = ", ".join(f"{bits} bits in {_code(name)}" for name, bits in (config.module_bits or {}).items())
    return f" ({listed})" if listed else ""


def _loading(pipeline: str, source: str) -> str:
    """Write the rest of the code block that loads a model, and a sentence on streaming if the pipeline can stream."""
    module, _, name = pipeline.rpartition(".")
    if module == "qarvd_diffusers":
        lines = f'pipe = {pipeline}.from_pretrained("{source}")\n```\n'
    else:
        lines = f'from {module} import {name}\n\npipe = {name}.from_pretrained("{source}")\n```\n'
    if module.split(".")[0] == "diffusers":
        return lines  # a stock pipeline generates whole videos
    return f'{lines}\n`for chunk in pipe.stream("a prompt")` yields `chunk.frames` as they are generated.\n'


def model_card(
    config: QARVDConfig,
    sizes: Mapping[str, int],
    report: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    repo_id: str | None = None,
    pipeline: str = "qarvd_diffusers.ARVDPipeline",
) -> ModelCard:
    """Write the card of a quantized model: bits, sizes, fidelity per chunk, base model, licence and how to load it.

    Args:
        config: the checkpoint's stored config.
        sizes: `stored_bytes` of its transformer.
        report: what `evaluate` returned, None if nothing was measured.
        base_model: Hub id of the float model.
        licence: licence identifier of the base model, which the quantized weights inherit.
        repo_id: Hub repository of the card; None writes a placeholder.
        pipeline: dotted name of the class that loads the model.
    """
    scheme = config.resolved_scheme
    activations = {"static": "static 8-bit", "dynamic": "dynamic 8-bit", "none": "float"}[scheme.activation]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-video",
        tags=_tags(licence, _TAG, "quantized", "autoregressive-video-diffusion", config.scheme),
        base_model=base_model,
        license=licence,
    )
    ratio = sizes["quantized"] / sizes["bfloat16"] if sizes["bfloat16"] else 1.0
    content = f"""---
{data.to_yaml()}
---

# {(repo_id or "Autoregressive video diffusion model").split("/")[-1]} ({config.scheme})

{_base_model(base_model)}
quantized with Q-ARVD ([arXiv 2605.21072](https://arxiv.org/abs/2605.21072)):
{scheme.weight_bits}-bit weights{_exceptions(config)}, {activations} activations,
and a separate scale for outlier channels.

```python
import qarvd_diffusers  # registers the quantization method; pip install -e . in a clone of the Q-ARVD repository
{_loading(pipeline, repo_id or "path/to/this/folder")}
## Size

| | bytes |
|---|---|
| quantized layers, including scales | {sizes["quantized"]:,} ({ratio:.3f} of bfloat16) |
| the same layers in bfloat16 | {sizes["bfloat16"]:,} |
| whole transformer | {sizes["total"]:,} |

## Fidelity

{_fidelity(report)}
## Licence

{_licence_text(licence)}
"""
    return ModelCard(content)
