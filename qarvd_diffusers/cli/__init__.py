"""Run the `qarvd` commands.

Each is a module with `add_arguments(parser)`, `run(args) -> dict | None` and `render(dict) -> str`. Results go to
stdout, as text or with `--json` as one JSON document; progress and logs go to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import warnings
from collections.abc import Sequence

from .threads import let_threads_sleep

COMMANDS = {
    "demo": "quantize the bundled model, save, reload, generate and compare: start here",
    "convert": "convert an original checkpoint (.pt, .safetensors) to a diffusers folder, or back",
    "quantize": "calibrate and quantize a model folder",
    "sensitivity": "measure the error of the whole video that quantizing each chunk causes",
    "evaluate": "compare a quantized model with its float model: metrics per chunk, plots, one HTML page",
    "plan": "estimate the GPU memory that a stream needs, and choose the best settings that fit",
    "generate": "stream a video into a file",
    "inspect": "list the layers of a model folder: bits, outliers, bytes",
    "bench": "measure kernels, transformer passes and whole videos on this machine",
    "info": "show versions, devices, and which kernel runs for each operator and why",
}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="qarvd", description="Quantize and stream autoregressive video diffusion models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f".{name}", __name__)
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print the result as one JSON document")
        command.add_argument("--traceback", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run, render=module.render)
    return parser


def quiet_libraries() -> None:
    """Silence the bars of other libraries for loading and saving; those of downloads stay."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    hidden = are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # disables those of huggingface_hub too
    if not hidden:
        enable_progress_bars()
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # passed by diffusers, not by us


def _terminate(number: int, frame: object) -> None:
    """End as by ctrl-C: temporary files are removed, and what is finished is kept."""
    print("qarvd: terminated", file=sys.stderr)
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `qarvd` script and return its exit code."""
    args = build_parser().parse_args(argv)
    if argv is None:  # run as a script, not called by other code
        let_threads_sleep(args)
        signal.signal(signal.SIGTERM, _terminate)
    try:
        quiet_libraries()
        result = args.run(args)
    except KeyboardInterrupt:
        print("qarvd: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if args.traceback:
            raise
        print(f"qarvd {args.command}: {error}", file=sys.stderr)
        return 1
    if result is not None:  # of several processes, only the main one has a result
        print(json.dumps(result, indent=2) if args.json else args.render(result))
    return 0
