"""Hold how much each chunk's quantization costs the whole video, as a value and one JSON file: `SensitivityResult`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..files.atomic import write_json
from ..files.schema import from_fields, read_json

FORMAT = "qarvd-sensitivity-1"

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Decay:
    """Least-squares fit of `s_k = amplitude * exp(-rate * k)` to the logarithms of the sensitivities.

    Attributes:
        amplitude: fitted sensitivity of chunk 0.
        rate: per chunk; negative if later chunks are more sensitive.
        r_squared: share of the variance of `log s` that the fit explains.
    """

    amplitude: float
    rate: float
    r_squared: float


@dataclass(frozen=True)
class SensitivityResult:
    """Chunk sensitivity (arXiv 2605.21072): the error of the video when a single chunk is generated quantized.

    Attributes:
        measured: what was measured (model, config, prompts, noise), as JSON values; two measurements may be joined
            only if they agree in all of it.
        num_prompts: prompts of the whole measurement.
        frames: latent frames of every chunk.
        errors: per prompt measured so far a matrix whose entry `[k][c]` is the mean squared latent error of chunk `c`
            with only chunk `k` quantized; zero for `c < k`.
    """

    measured: Mapping[str, Any]
    num_prompts: int
    frames: tuple[int, ...]
    errors: tuple[Matrix, ...] = ()

    def with_prompt(self, errors: Sequence[Sequence[float]]) -> SensitivityResult:
        """Add the errors of one more prompt."""
        return replace(self, errors=(*self.errors, tuple(map(tuple, errors))))

    @property
    def complete(self) -> bool:
        """Whether all prompts have been measured."""
        return len(self.errors) == self.num_prompts

    @property
    def sensitivity(self) -> tuple[float, ...]:
        """`s_k`, one per chunk: mean over all final latents and all prompts measured so far."""
        if not self.errors:
            raise ValueError("no prompt has been measured yet")
        total = sum(self.frames)
        return tuple(
            math.fsum(f * e for matrix in self.errors for f, e in zip(self.frames, matrix[k], strict=True))
            / (total * len(self.errors))
            for k in range(len(self.frames))
        )

    @property
    def chunk_weights(self) -> tuple[float, ...]:
        """`s_k / mean(s)`, for `QARVDConfig.chunk_weights`.

        Raises:
            ValueError: quantizing some chunk changed nothing.
        """
        sensitivity = self.sensitivity
        zero = [k for k, s in enumerate(sensitivity) if s <= 0]
        if zero:
            raise ValueError(
                f"quantizing chunks {zero} alone changed nothing, so they have no weight: the quantized layers are "
                "exact, or take no part in these chunks"
            )
        mean = math.fsum(sensitivity) / len(sensitivity)
        return tuple(s / mean for s in sensitivity)

    @property
    def decay(self) -> Decay | None:
        """The fitted exponential; None for fewer than three chunks or a sensitivity of zero."""
        values = self.sensitivity
        if len(values) < 3 or min(values) <= 0:
            return None
        logs, middle = [math.log(s) for s in values], (len(values) - 1) / 2
        mean = math.fsum(logs) / len(logs)
        slope = math.fsum((k - middle) * y for k, y in enumerate(logs))
        slope /= math.fsum((k - middle) ** 2 for k in range(len(logs)))
        residual = math.fsum((y - mean - slope * (k - middle)) ** 2 for k, y in enumerate(logs))
        spread = math.fsum((y - mean) ** 2 for y in logs)
        return Decay(math.exp(mean - slope * middle), -slope, 1 - residual / spread if spread else 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values; sensitivity, weights and decay are for readers and follow from the errors."""
        known = bool(self.errors) and min(self.sensitivity) > 0
        return {
            "format": FORMAT,
            "complete": self.complete,
            "num_prompts": self.num_prompts,
            "sensitivity": self.sensitivity if self.errors else None,
            "chunk_weights": self.chunk_weights if known else None,
            "decay": asdict(self.decay) if known and self.decay else None,
            "measured": dict(self.measured),
            "frames": self.frames,
            "errors": self.errors,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one JSON file; see `write_json`."""
        return write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], partial: bool = False) -> SensitivityResult:
        """Read a file of `save`.

        Args:
            path: the file.
            partial: take a measurement that was interrupted, too.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, of another format, or not complete; the message names the file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such sensitivity file; `qarvd sensitivity` writes one")
        try:
            values = read_json(path)
            if values.get("format") != FORMAT:
                raise ValueError(f"format is {values.get('format')!r}, expected {FORMAT!r}")
            result = from_fields(cls, values, "it", extra=True)
            result._check_shape()
        except ValueError as error:
            raise ValueError(f"{path} is not a sensitivity file ({error}): delete it and measure again") from error
        if not (partial or result.complete):
            raise ValueError(
                f"{path} holds {len(result.errors)} of {result.num_prompts} prompts: run the measurement again, it "
                "continues"
            )
        return result

    def _check_shape(self) -> None:
        chunks = len(self.frames)
        if min((1, *self.frames)) < 1 or min((0.0, *(e for m in self.errors for row in m for e in row))) < 0:
            raise ValueError("chunks without frames, or negative errors")
        for matrix in self.errors:
            if len(matrix) != chunks or any(len(row) != chunks for row in matrix):
                raise ValueError(f"an error matrix is not {chunks} x {chunks}")
        if not chunks or len(self.errors) > self.num_prompts:
            raise ValueError(f"{len(self.errors)} of {self.num_prompts} prompts over {chunks} chunks")

    def require_same_measurement(self, measured: Mapping[str, Any], source: object) -> None:
        """Check that the measurement stored in `source` can be continued as the one described.

        Raises:
            ValueError: they differ; the message says in what.
        """
        differing = [
            f"{name}: stored {_shown(self.measured.get(name))}, now {_shown(measured.get(name))}"
            for name in sorted({*self.measured, *measured})
            if self.measured.get(name) != measured.get(name)
        ]
        if differing:
            raise ValueError(
                f"{source} holds another measurement ({'; '.join(differing)}): choose another file, or delete this "
                "one to start over"
            )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
