"""`qarvd`: one module per command, each with `add_arguments(parser)` and `run(args) -> dict | None`.

Results go to stdout, as text or with `--json` as one JSON document; progress and logs go to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Sequence

from .threads import let_threads_sleep

COMMANDS = {
    "demo": "quantize the bundled model, save, reload, generate and compare: start here",
    "convert": "original checkpoint (.pt, .safetensors) to a diffusers folder, or back",
    "quantize": "calibrate and quantize a model folder",
    "sensitivity": "measure how much each chunk's quantization costs the whole video",
    "evaluate": "compare a quantized model with its float model: metrics per chunk, plots, one HTML page",
    "plan": "what a stream of a model needs of a GPU's memory, and the best choices that fit",
    "generate": "stream a video into an mp4",
    "inspect": "what is in a model folder: layers, bits, outliers, bytes",
    "bench": "measure kernels and transformer passes on this machine, beside other quantizers",
    "info": "versions, devices, and which kernel runs for each operator and why",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qarvd", description="Quantize and stream autoregressive video diffusion models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f".{name}", __name__)
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
        command.add_argument("--traceback", action="store_true", help="show where an error arose")
        command.set_defaults(run=module.run, render=module.render)
    return parser


def quiet_libraries() -> None:
    """Silence what other libraries print while they load and save; bars of downloads stay."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    hidden = are_progress_bars_disabled()
    of_transformers.disable_progress_bar()  # and with it those of huggingface_hub
    if not hidden:
        enable_progress_bars()
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # passed by diffusers, not by us


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `qarvd` script; returns the exit code."""
    args = build_parser().parse_args(argv)
    if argv is None:  # a process of its own
        let_threads_sleep(args)
    quiet_libraries()
    try:
        result = args.run(args)
    except KeyboardInterrupt:
        print("qarvd: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if args.traceback:
            raise
        print(f"qarvd {args.command}: {error}", file=sys.stderr)
        return 1
    if result is not None:  # of several processes one has something to say
        print(json.dumps(result, indent=2) if args.json else args.render(result))
    return 0
