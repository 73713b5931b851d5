"""Name the schemes; describe one quantized layer (`QuantizedModule`) and the layout of a checkpoint of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .files.schema import check_fields

PACKED_FORMAT = 2
"""Layout of packed tensors in checkpoints and calibration results. 2: 8-bit codes are stored as the signed operand of
the integer product. The layout before it had no number."""

NEW_FORMAT = 3
"""As 2, with layers whose activations have a scale per token or whose 4-bit weights are in groups, which versions that
know 2 alone cannot run."""

GROUP = 16  # channels of a 4-bit weight


@dataclass(frozen=True)
class Scheme:
    """Describe how one quantized Linear computes.

    Attributes:
        weight_bits: 4 or 8.
        activation: `"static"` (int8, calibrated per tensor and group), `"dynamic"` (int8 per token and group, at run
            time) or `"none"` (float activations, dequantized weights).
        symmetric_weights: zero-point in the middle of the code range; saves the row sums of an 8-bit GEMM.
    """

    weight_bits: int
    activation: str
    symmetric_weights: bool

    @property
    def needs_calibration(self) -> bool:
        """Whether activation ranges have to be calibrated."""
        return self.activation == "static"


SCHEMES: dict[str, Scheme] = {
    "w8a8": Scheme(8, "static", symmetric_weights=True),
    "w4a8": Scheme(4, "static", symmetric_weights=False),
    "w8a16": Scheme(8, "none", symmetric_weights=True),
    "w4a16": Scheme(4, "none", symmetric_weights=False),
    "w8a8_dynamic": Scheme(8, "dynamic", symmetric_weights=True),
    "w4a8_dynamic": Scheme(4, "dynamic", symmetric_weights=False),
}
ACTIVATIONS = ("static", "dynamic", "none", "token")


@dataclass(frozen=True)
class QuantizedModule:
    """Describe one quantized Linear in a checkpoint's config, so that its empty module can be built.

    Attributes:
        num_outliers: number of outlier input channels, stored first.
        weight_bits: bits of a weight code.
        activation: see `Scheme.activation`; or `"token"`: int8 with one scale per token, at run time, channels in
            their own order.
        rotation: channels of the blocks that the input, and the weight alike, are rotated in before they are quantized
            (Walsh-Hadamard transform); 1 rotates nothing. Only with `"token"`.
        group: neighbouring channels of a 4-bit weight that share an integer factor and a zero-point: 16, or 0 for
            zero-points that a whole row shares.
    """

    num_outliers: int
    weight_bits: int
    activation: str
    rotation: int = 1
    group: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        by_token = self.activation == "token"
        if (
            self.weight_bits not in (4, 8)
            or self.activation not in ACTIVATIONS
            or self.num_outliers < 0
            or self.rotation not in ([2**i for i in range(8)] if by_token else [1])
            or (by_token and self.num_outliers)
            or self.group not in ([0, GROUP] if self.weight_bits == 4 else [0])
        ):
            raise ValueError(f"{self} is not a valid description of a quantized module")


def format_of(modules: Iterable[QuantizedModule]) -> int:
    """Return the number of the layout that a checkpoint of these modules has."""
    return NEW_FORMAT if any(module.activation == "token" or module.group for module in modules) else PACKED_FORMAT
