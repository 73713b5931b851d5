"""Calibrate and quantize a float model folder or Hub id, measure the result, and save it with its model card.

Under `accelerate launch -m qarvd_diffusers quantize ...` the processes share the calibration.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .common import (
    add_device_arguments,
    add_model_argument,
    add_overwrite_argument,
    add_start_arguments,
    check_new_folder,
    keep_old_name,
    layer_bar,
    load_pipeline,
    named_model,
    read_prompts,
    replaced_folder,
    seed,
    table,
    watched_roll_out,
    whole,
)

if TYPE_CHECKING:
    from ..calibration.processes import Processes
    from ..config import QARVDConfig
    from ..pipelines.pipeline_arvd import ARVDPipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `qarvd quantize`."""
    from ..config import SCHEMES

    add_model_argument(parser, kind="float ")
    parser.add_argument("out", help="folder to write; an existing one is an error unless --overwrite is given")
    add_overwrite_argument(parser)
    parser.add_argument(
        "--scheme", choices=tuple(SCHEMES), default="w8a8", help="bits of weights and activations (default: w8a8)"
    )
    _add_calibration_arguments(parser)
    parser.add_argument(
        "--evaluate",
        type=whole(0),
        default=1,
        metavar="N",
        help="compare the model with its float model on the last N calibration prompts (default: 1)",
    )
    parser.add_argument(
        "--from-disk",
        action="store_true",
        help="work block by block on the folder's files, for models larger than memory (schemes without calibration)",
    )
    parser.add_argument("--text-encoder", choices=("int8",), help="quantize the text encoder's weights on loading")
    add_start_arguments(parser)
    add_device_arguments(parser)


def _add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `QARVDConfig` that concern calibration."""
    from ..config import ROUNDINGS

    prompts = parser.add_argument(
        "--calibration-prompts",
        metavar="FILE",
        help="calibration prompts, one per line (default: the model's, else bundled ones)",
    )
    keep_old_name(parser, prompts, "--prompts")
    chunks = parser.add_argument(
        "--calibration-chunks",
        type=whole(1),
        default=7,
        metavar="N",
        help="chunks per calibration rollout (default: 7)",
    )
    keep_old_name(parser, chunks, "--chunks")
    noise = parser.add_argument(
        "--calibration-seed", type=seed, default=0, metavar="N", help="seed of the calibration noise (default: 0)"
    )
    keep_old_name(parser, noise, "--seed")
    parser.add_argument("--sensitivity", metavar="JSON", help="take chunk weights from a file of `qarvd sensitivity`")
    parser.add_argument("--reference-compat", action="store_true", help="reproduce the recipe of the public reference")
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default="auto",
        help="how weights are rounded to integers (default: by scheme)",
    )
    mixed = parser.add_argument(
        "--mixed-precision",
        type=float,
        metavar="SHARE",
        help="give 8 bits to the most sensitive layers of a 4-bit scheme: a share of all weights, such as 0.1",
    )
    keep_old_name(parser, mixed, "--mixed")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Quantize and save; of several processes, only the main one returns a result."""
    from ..calibration.processes import Processes

    config = _config(args)
    if args.from_disk and args.mixed_precision:
        raise ValueError("--mixed-precision runs the model, --from-disk does not: leave out one of the two")
    check_new_folder(args.out, args.overwrite, named_model(args.model))
    if args.from_disk:
        return _quantize_from_disk(args, config)
    processes = Processes.launched()  # first: it gives every process its own GPU
    pipe = load_pipeline(args.model, args)
    if pipe.quantization is not None:
        raise ValueError(f"{args.model} is quantized already ({pipe.quantization.scheme}): quantize the float model")
    config, report = _quantize_and_compare(pipe, config, args, processes)
    processes.close()
    if not processes.is_main:
        return None
    with replaced_folder(args.out) as out:
        pipe.save_pretrained(out, report=report)
    mixed = {"module_bits": dict(config.module_bits)} if config.module_bits else {}
    return {"out": args.out, "scheme": args.scheme, **mixed, "sizes": _sizes(pipe), "report": report}


def _config(args: argparse.Namespace) -> QARVDConfig:
    """Build the config that the options describe."""
    from ..calibration.sensitivity import SensitivityResult
    from ..config import QARVDConfig

    return QARVDConfig(
        args.scheme,
        reference_compat=args.reference_compat,
        rounding=args.rounding,
        chunk_weights=SensitivityResult.load(args.sensitivity).chunk_weights if args.sensitivity else "published",
        calibration_prompts=read_prompts(args.calibration_prompts),
        calibration_chunks=args.calibration_chunks,
        calibration_seed=args.calibration_seed,
        text_encoder=args.text_encoder,
    )


def _quantize_from_disk(args: argparse.Namespace, config: QARVDConfig) -> dict[str, Any]:
    """Quantize the files of a folder into another, without loading the model."""
    from ..conversion import quantize_folder

    with layer_bar("quantizing") as progress, replaced_folder(args.out) as out:
        sizes = quantize_folder(named_model(args.model), out, config, progress)
    return {"out": args.out, "scheme": args.scheme, "sizes": sizes, "report": None}


def _quantize_and_compare(
    pipe: ARVDPipeline, config: QARVDConfig, args: argparse.Namespace, processes: Processes
) -> tuple[QARVDConfig, dict[str, Any] | None]:
    """Quantize the transformer in place.

    Returns:
        The config with the bits of `--mixed-precision`, and the report of `--evaluate`; None without one.
    """
    from ..evaluation.fidelity import describe, join
    from ..pipelines.quantization import quantize_pipeline

    prompts = _compared_prompts(pipe, config, args.evaluate)
    compares = bool(prompts) and processes.is_main
    if args.mixed_precision:
        config = pipe.choose_bits(config, args.mixed_precision)
    noise = args.calibration_seed + 10_000  # never the calibration noise
    if compares:
        expected = watched_roll_out(pipe, prompts, args.calibration_chunks, noise, "float model")
        reference = describe(pipe, expected, prompts, None)
    quantize_pipeline(pipe, config)
    if not compares:
        return config, None
    got = watched_roll_out(pipe, prompts, args.calibration_chunks, noise, "quantized model")
    return config, join(expected, got, reference, describe(pipe, got, prompts, None), noise)


def _compared_prompts(pipe: ARVDPipeline, config: QARVDConfig, count: int) -> tuple[str, ...]:
    """Return the last `count` calibration prompts, to compare the two models on.

    Raises:
        ValueError: there are fewer.
    """
    from ..calibration.pipeline import calibration_prompts

    prompts = calibration_prompts(pipe, config)
    if count > len(prompts):
        raise ValueError(
            f"--evaluate is {count}, but there are {len(prompts)} calibration prompts to compare on: ask for fewer, "
            "or provide more with --calibration-prompts"
        )
    return prompts[len(prompts) - count :]


def _sizes(pipe: ARVDPipeline) -> dict[str, int]:
    from ..quantization.model import stored_bytes

    return stored_bytes(pipe.transformer)


def render(result: dict[str, Any]) -> str:
    """Say what was written, its size, and the PSNR per chunk."""
    sizes = result["sizes"]
    lines = [
        f"wrote {result['out']} ({result['scheme']}): quantized layers {sizes['quantized']:,} bytes, "
        f"{sizes['quantized'] / sizes['bfloat16']:.3f} of bfloat16"
    ]
    if result.get("module_bits"):
        lines.append("8 bits: " + ", ".join(result["module_bits"]))
    if result["report"]:
        rows = list(enumerate(f"{psnr:.2f}" for psnr in result["report"]["psnr_db"]))
        lines.append(table(("chunk", "PSNR dB"), rows))
    return "\n".join(lines)
