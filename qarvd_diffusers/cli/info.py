"""Show versions, devices, which implementation runs for each operator, and why the others do not."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .common import table

_PACKAGES = (
    "qarvd-diffusers",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "optimum-quanto",
    "safetensors",
    "huggingface_hub",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: `qarvd info` has no options of its own."""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Return the versions and devices of this machine."""
    import torch

    devices = [
        {
            "name": torch.cuda.get_device_name(i),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
            "bytes": torch.cuda.get_device_properties(i).total_memory,
        }
        for i in range(torch.cuda.device_count())
    ]
    return {"versions": {package: _version(package) for package in _PACKAGES}, "devices": devices}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the environment, and per operator its implementation and the reasons against the others."""
    import qarvd_kernels

    return {
        **environment(),
        "operators": [
            {"operator": operator, "implementation": implementation, "refused": dict(refused)}
            for operator, implementation, refused in qarvd_kernels.report()
        ],
    }


def render(result: dict[str, Any]) -> str:
    """Format three tables and the list of implementations that are not used."""
    devices = [(d["name"], d["capability"], f"{d['bytes'] / 2**30:.1f} GiB") for d in result["devices"]]
    return "\n\n".join(
        [
            table(("package", "version"), list(result["versions"].items())),
            table(("device", "capability", "memory"), devices)
            if devices
            else "no CUDA device: everything runs on the CPU",
            *operators(result["operators"]),
        ]
    )


def operators(rows: list[dict[str, Any]]) -> list[str]:
    """Format a table of operators and implementations, and each reason against the others once."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for other, reason in row["refused"].items():
            reasons.setdefault(f"{other}: {reason}", []).append(row["operator"])
    return [
        table(("operator", "implementation"), [(row["operator"], row["implementation"]) for row in rows]),
        "not used:\n"
        + "\n".join(
            f"  {reason} ({'all operators' if len(names) == len(rows) else ', '.join(names)})"
            for reason, names in reasons.items()
        ),
    ]
