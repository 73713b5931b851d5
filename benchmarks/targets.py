"""Compare a result of `qarvd bench` with the performance targets of this project.

qarvd bench --out runs/bench.json && python benchmarks/targets.py runs/bench.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class PerformanceTarget(NamedTuple):
    """Set a ratio of speeds that was to be reached.

    Attributes:
        name: what is compared.
        ratio: computes the ratio from a result of `qarvd bench`; raises KeyError if it was not measured.
        minimum: the smallest acceptable ratio.
        goal: the ratio to reach.
    """

    name: str
    ratio: Callable[[dict[str, Any]], float]
    minimum: float
    goal: float


def _product(n: int, k: int, other: str) -> Callable[[dict[str, Any]], float]:
    """Compare the dual-scale product of `n` x `k` with another kernel's."""

    def ratio(result: dict[str, Any]) -> float:
        us = {(row["N"], row["K"]): row["us"] for row in result["gemm"]}[n, k]
        return us[other] / us["dual-scale int8"]

    return ratio


def _pass(name: str, other: str) -> Callable[[dict[str, Any]], float]:
    """Compare the mean time of a transformer pass of two variants."""

    def ratio(result: dict[str, Any]) -> float:
        mean = {row["name"]: row["mean_ms"] for row in result["passes"] if "mean_ms" in row}
        return mean[other] / mean[name]

    return ratio


def _product_targets(n: int, k: int) -> list[PerformanceTarget]:
    """Set the targets of a product of the feed-forward."""
    return [
        PerformanceTarget(f"product {n} x {k}, of fp8 tensorwise", _product(n, k, "fp8 tensorwise"), 0.95, 1.1),
        PerformanceTarget(f"product {n} x {k}, of bf16", _product(n, k, "bf16"), 1.4, 1.7),
    ]


TARGETS = (
    *_product_targets(8960, 1536),
    *_product_targets(1536, 8960),
    PerformanceTarget("product 4608 x 1536, of fp8 tensorwise", _product(4608, 1536, "fp8 tensorwise"), 0.95, 1.1),
    PerformanceTarget("pass, w8a8, of compiled bf16", _pass("w8a8", "bf16-compiled"), 1.15, 1.3),
    PerformanceTarget(
        "pass, w8a8 with 8-bit attention, of compiled bf16", _pass("w8a8-int8", "bf16-compiled"), 1.65, 1.8
    ),
    PerformanceTarget(
        "pass, w8a8 with 8-bit attention, of torchao float8", _pass("w8a8-int8", "torchao-fp8"), 1.28, 1.5
    ),
    PerformanceTarget("pass, w4a8, of w8a8", _pass("w4a8", "w8a8"), 1 / 1.03, 1.0),
    PerformanceTarget("pass, w4a8 of w8a8, with 8-bit attention", _pass("w4a8-int8", "w8a8-int8"), 1 / 1.03, 1.0),
)
"""Targets of the 1.3B shape. Speeds of passes are means over the measured chunks: 1, 4 and 7 by default."""


def check_targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare a result with every target of which both sides were measured.

    Returns:
        Rows of `name`, `ratio`, `minimum`, `goal` and `verdict`: "goal", "minimum" or "missed".
    """
    rows = []
    for target in TARGETS:
        try:
            ratio = target.ratio(result)
        except KeyError:
            continue
        verdict = "goal" if ratio >= target.goal else "minimum" if ratio >= target.minimum else "missed"
        rows.append({**target._asdict(), "ratio": ratio, "verdict": verdict})
    return rows


def main() -> None:
    """Print a table of the targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON file that `qarvd bench --out` wrote, of the full 1.3b shape")
    result = json.loads(parser.parse_args().result.read_text(encoding="utf-8"))
    if (result["shape"], result["layers"], result["frames_per_chunk"]) != ("1.3b", 30, 3):
        parser.error("the targets are those of --shape 1.3b with all its layers and 3 frames per chunk")
    print("| speed | ratio | minimum | goal | verdict |\n|---|---|---|---|---|")
    for row in check_targets(result):
        print("| {name} | {ratio:.3f} | {minimum:.3f} | {goal:.3f} | {verdict} |".format(**row))


if __name__ == "__main__":
    main()
