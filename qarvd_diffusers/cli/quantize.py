"""Calibrate and quantize a float model folder or Hub id, measure the result, and save it with its model card.

Under `accelerate launch -m qarvd_diffusers quantize ...` the processes share the calibration.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .common import (
    add_device_arguments,
    layer_bar,
    load_pipeline,
    named_model,
    read_prompts,
    require_new_folder,
    seed,
    table,
    watched_roll_out,
    whole,
)

if TYPE_CHECKING:
    from ..config import QARVDConfig
    from ..pipelines.pipeline_arvd import ARVDPipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..config import ROUNDINGS, SCHEMES

    parser.add_argument(
        "model", help="float model folder or Hub id; `bundled` names the model that ships with the package"
    )
    parser.add_argument("out", help="folder to write; must not exist yet")
    parser.add_argument("--scheme", choices=tuple(SCHEMES), default="w8a8")
    parser.add_argument("--prompts", metavar="FILE", help="calibration prompts, one per line (default: bundled ones)")
    parser.add_argument("--sensitivity", metavar="JSON", help="chunk weights: a file of `qarvd sensitivity`")
    parser.add_argument("--chunks", type=whole(1), default=7, help="chunks per calibration rollout (default: 7)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the calibration noise (default: 0)")
    parser.add_argument(
        "--evaluate", type=whole(0), default=1, metavar="N", help="compare N prompts with the float model (default: 1)"
    )
    parser.add_argument("--reference-compat", action="store_true", help="reproduce the public reference recipe")
    parser.add_argument(
        "--rounding", choices=ROUNDINGS, default="auto", help="how weights become integers (default: by scheme)"
    )
    parser.add_argument(
        "--mixed",
        type=float,
        metavar="SHARE",
        help="8 bits for the layers of a 4-bit scheme that cost most, up to this share of all weights (such as 0.1)",
    )
    parser.add_argument(
        "--from-disk",
        action="store_true",
        help="block by block from the folder's files, for models that do not fit into memory (schemes without calibration)",
    )
    parser.add_argument("--text-encoder", choices=("int8",), help="quantize the text encoder's weights when loading")
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    from ..calibration.processes import Processes
    from ..calibration.sensitivity import SensitivityResult
    from ..config import QARVDConfig
    from ..conversion import quantize_folder
    from ..evaluation.fidelity import compare, describe
    from ..pipelines.quantization import quantize_pipeline, require_float

    config = QARVDConfig(
        args.scheme,
        reference_compat=args.reference_compat,
        rounding=args.rounding,
        chunk_weights=SensitivityResult.load(args.sensitivity).chunk_weights if args.sensitivity else "published",
        calibration_prompts=read_prompts(args.prompts),
        calibration_chunks=args.chunks,
        calibration_seed=args.seed,
        text_encoder=args.text_encoder,
    )
    if args.from_disk and args.mixed:
        raise ValueError("--mixed has to run the model and cannot work from disk: leave out --mixed or --from-disk")
    require_new_folder(args.out)
    if args.from_disk:
        with layer_bar("quantizing") as report:
            sizes = quantize_folder(named_model(args.model), args.out, config, report)
        return {"out": args.out, "scheme": args.scheme, "sizes": sizes, "report": None}
    processes = Processes.launched()  # first, since it gives every process a GPU of its own
    pipe = load_pipeline(args.model, args)
    require_float(pipe)
    compared = _compared_prompts(pipe, config, args.evaluate)
    prompts = compared if processes.is_main else ()
    if args.mixed:
        config = pipe.choose_bits(config, args.mixed)
    # The evaluation noise is never the calibration noise.
    noise = args.seed + 10_000
    expected = watched_roll_out(pipe, prompts, args.chunks, noise, "float model") if prompts else None
    quantize_pipeline(pipe, config)
    processes.close()
    if not processes.is_main:
        return None
    report = None
    if expected is not None:
        got = watched_roll_out(pipe, prompts, args.chunks, noise, "quantized model")
        report = compare(expected, got) | describe(pipe, got, prompts, None)
        report |= {"prompts": len(prompts), "num_chunks": args.chunks, "seed": noise, "reference_adherence": None}
    pipe.save_pretrained(args.out, report=report)
    mixed = {"module_bits": dict(config.module_bits)} if config.module_bits else {}
    return {"out": args.out, "scheme": args.scheme, **mixed, "sizes": _sizes(pipe), "report": report}


def _compared_prompts(pipe: ARVDPipeline, config: QARVDConfig, count: int) -> tuple[str, ...]:
    """The last of the calibration prompts, to compare the two models on.

    Raises:
        ValueError: there are not as many.
    """
    from ..pipelines.quantization import calibration_prompts

    prompts = calibration_prompts(pipe, config)
    if count > len(prompts):
        raise ValueError(
            f"--evaluate is {count}, but there are {len(prompts)} calibration prompts to compare on: ask for fewer, or give "
            "more with --prompts"
        )
    return prompts[len(prompts) - count :]


def _sizes(pipe: Any) -> dict[str, int]:
    from ..serialization import stored_bytes

    return stored_bytes(pipe.transformer)


def render(result: dict[str, Any]) -> str:
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
