"""What was promised, beside what one run measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Bar(NamedTuple):
    """One promise, as a ratio of speeds.

    Attributes:
        name: what is compared.
        ratio: from a result of `qarvd bench`; raises KeyError where it was not measured.
        floor: the least ratio that holds.
        aim: the ratio that is aimed at.
    """

    name: str
    ratio: Callable[[dict[str, Any]], float]
    floor: float
    aim: float


def _product(n: int, k: int, other: str) -> Callable[[dict[str, Any]], float]:
    def ratio(result: dict[str, Any]) -> float:
        us = {(row["N"], row["K"]): row["us"] for row in result["gemm"]}[n, k]
        return us[other] / us["dual-scale int8"]

    return ratio


def _passes(name: str, other: str) -> Callable[[dict[str, Any]], float]:
    def ratio(result: dict[str, Any]) -> float:
        mean = {row["name"]: row["mean_ms"] for row in result["passes"] if "mean_ms" in row}
        return mean[other] / mean[name]

    return ratio


def _product_bars(n: int, k: int, feed_forward: bool) -> list[Bar]:
    bars = [Bar(f"product {n} x {k}, of fp8 tensorwise", _product(n, k, "fp8 tensorwise"), 0.95, 1.1)]
    if feed_forward:
        bars.append(Bar(f"product {n} x {k}, of bf16", _product(n, k, "bf16"), 1.4, 1.7))
    return bars


BARS = (
    *_product_bars(8960, 1536, True),
    *_product_bars(1536, 8960, True),
    *_product_bars(4608, 1536, False),
    Bar("pass, w8a8, of compiled bf16", _passes("w8a8", "bf16-compiled"), 1.15, 1.3),
    Bar("pass, w8a8 with 8-bit attention, of compiled bf16", _passes("w8a8-attention8", "bf16-compiled"), 1.35, 1.6),
    Bar("pass, w8a8 with 8-bit attention, of torchao float8", _passes("w8a8-attention8", "torchao-fp8"), 1.28, 1.5),
    Bar("pass, w4a8, of w8a8", _passes("w4a8", "w8a8"), 1 / 1.03, 1.0),
    Bar("pass, w4a8 of w8a8, with 8-bit attention", _passes("w4a8-attention8", "w8a8-attention8"), 1 / 1.03, 1.0),
)
"""The promises of the 1.3B shape. Speeds of passes are means over the measured chunks, 1, 4 and 7 by default."""


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar of which both sides were measured: `name`, `ratio`, `floor`, `aim`, `verdict`."""
    rows = []
    for bar in BARS:
        try:
            ratio = bar.ratio(result)
        except KeyError:
            continue
        verdict = "aim" if ratio >= bar.aim else "holds" if ratio >= bar.floor else "missed"
        rows.append({"name": bar.name, "ratio": ratio, "floor": bar.floor, "aim": bar.aim, "verdict": verdict})
    return rows
