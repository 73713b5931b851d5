"""Set how OpenMP threads wait for each other, which is only possible before torch is imported."""

from __future__ import annotations

import argparse
import os
import sys

# torch's OpenMP runtime on Linux (GNU's libgomp) reads its policy from these variables once, when it is loaded.
_POLICY, _SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"

_COMPUTING = {"demo", "quantize", "sensitivity", "evaluate", "generate"}


def let_threads_sleep(args: argparse.Namespace) -> None:
    """Restart a command that computes on the CPU, with threads that sleep instead of spinning while they wait.

    Spinning threads take the cores from the threads they wait for as soon as anything else runs: several times slower
    on a busy machine, for no measurable gain on an idle one. Importing this package imports torch, so the variable can
    only be set for a new process. A value that the user set is kept.

    Args:
        args: those of the command.
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
