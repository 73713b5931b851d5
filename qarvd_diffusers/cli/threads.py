"""How OpenMP threads wait for each other, which has to be decided before torch is imported."""

from __future__ import annotations

import argparse
import os
import sys

# What torch's OpenMP runtime on Linux (GNU's libgomp) takes its policy from, once, when it is loaded.
_POLICY, _SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"

_COMPUTING = {"demo", "quantize", "sensitivity", "evaluate", "generate"}


def let_threads_sleep(args: argparse.Namespace) -> None:
    """Start a command that computes on the CPU anew, with threads that sleep while they wait instead of spinning.

    Spinning threads take the cores from the ones they wait for as soon as anything else wants to run: several times slower
    on a machine that is not idle, for no measurable gain on one that is. Importing this package imports torch, so the
    variable can only be set for a process that begins. Whoever sets one of the variables keeps the choice.

    Args:
        args: of the command.
    """
    import torch

    if not sys.platform.startswith("linux") or args.command not in _COMPUTING or torch.get_num_threads() == 1:
        return
    if _POLICY in os.environ or _SPINS in os.environ:
        return
    on_gpu = torch.cuda.is_available() and args.command != "demo"
    if on_gpu and not str(args.device or "cuda").startswith("cpu"):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[_POLICY] = "passive"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
