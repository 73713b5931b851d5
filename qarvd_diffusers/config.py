"""`QARVDConfig`: everything that decides what a quantized model is, frozen and checked at construction."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin


class QARVDMethod(str, Enum):
    """Name under which diffusers knows this method: a `str` enum, since diffusers reads `.value` and hashes a str."""

    QARVD = "qarvd"


@dataclass(frozen=True)
class Scheme:
    """How one quantized Linear computes.

    Attributes:
        weight_bits: 4 or 8.
        activation: `"static"` (int8, calibrated per tensor and group), `"dynamic"` (int8 per token and group, at run
            time) or `"none"` (float activations, weights de-quantized).
        symmetric_weights: zero-point in the middle of the code range; saves the row sums of an 8-bit GEMM.
    """

    weight_bits: int
    activation: str
    symmetric_weights: bool

    @property
    def needs_calibration(self) -> bool:
        return self.activation == "static"


SCHEMES: dict[str, Scheme] = {
    "w8a8": Scheme(8, "static", symmetric_weights=True),
    "w4a8": Scheme(4, "static", symmetric_weights=False),
    "w8a16": Scheme(8, "none", symmetric_weights=True),
    "w4a16": Scheme(4, "none", symmetric_weights=False),
    "w8a8_dynamic": Scheme(8, "dynamic", symmetric_weights=True),
    "w4a8_dynamic": Scheme(4, "dynamic", symmetric_weights=False),
}
ROUNDINGS = ("auto", "nearest", "gptq", "adaround")
OUTLIER_DETECTORS = ("auto", "input", "mad_zscore", "iqr", "none")

PACKED_FORMAT = 2
"""Layout of packed tensors, in checkpoints and in results of calibration. 2: 8-bit codes are stored as the signed operand of
the integer product. Before it there was none that said its number."""

# Published chunk sensitivities of Self-Forcing at W4A8 (arXiv 2605.21072), share of the total error per chunk.
PUBLISHED_SENSITIVITY = (0.5462, 0.1668, 0.1189, 0.0789, 0.0534, 0.0263, 0.0096)


@dataclass(frozen=True)
class QuantizedModule:
    """What the checkpoint's config must say of one quantized Linear so that its empty module can be built.

    Attributes:
        num_outliers: number of outlier input channels, stored first.
        weight_bits: bits of a weight code.
        activation: see `Scheme.activation`.
    """

    num_outliers: int
    weight_bits: int
    activation: str

    def __post_init__(self) -> None:
        if (
            self.weight_bits not in (4, 8)
            or self.activation not in ("static", "dynamic", "none")
            or self.num_outliers < 0
        ):
            raise ValueError(f"{self} is not a valid description of a quantized module")


@dataclass  # not frozen=True: Python forbids it below diffusers' unfrozen base; __setattr__ does the freezing
class QARVDConfig(QuantizationConfigMixin):
    """Configuration of Q-ARVD quantization (arXiv 2605.21072); JSON both ways, unknown keys refused.

    Args:
        scheme: one of `w8a8`, `w4a8`, `w8a16`, `w4a16`, `w8a8_dynamic`, `w4a8_dynamic`.
        reference_compat: reproduce the public reference code, its choices included (asymmetric 8-bit weights,
            unclamped zero-points, chunk weights ignored on dual-scale layers).
        outlier_detector: `mad_zscore` (modified z-score of the input channels' weight norms), `iqr`, `none`, or `input`: the
            split that promises static activations the least rounding error, from weights and calibration rollouts. `auto`
            takes `input` for 8-bit weights with static activations, else, and under `reference_compat`, `mad_zscore`.
        outlier_alignment: outlier counts are rounded up to a multiple of this (and capped at half the channels).
        tie_inputs: layers that read the same tensor (q, k and v) share one outlier set and one activation quantizer,
            so that a kernel quantizes their input once.
        percentiles: candidates of the range search.
        input_percentiles: those of static activations; None takes the `percentiles` beside 4-bit weights and under
            `reference_compat`, and the whole range that was seen beside 8-bit weights.
        rounding: how weights become integers once their ranges are known. `nearest` needs no data; `gptq` minimises the
            chunk-weighted output error of every layer in closed form; `adaround` does so by gradient descent and also learns
            the activation step. `auto` takes `gptq` for 4-bit weights and `nearest` for 8-bit ones; under
            `reference_compat` it takes `adaround`.
        rounding_inputs: `float`: layers are rounded for the inputs they get in the float model; `quantized`: for those
            they get behind the blocks quantized before them.
        rounding_iterations: steps of `adaround`.
        rounding_skips: names (or whole parts of them) of layers that are rounded to nearest anyway; None skips none,
            under `reference_compat` those that read the prompt alone.
        chunk_weights: sensitivity per chunk, any positive scale, weighting every calibration loss; a shorter or longer
            rollout continues the last ratio. `"published"` takes the published numbers, `"uniform"` weighs all alike.
        calibration_prompts: prompts of the calibration rollouts; None takes the set bundled with the package. Never
            stored in a checkpoint.
        calibration_chunks: chunks per calibration rollout.
        calibration_seed: seed of the calibration noise.
        modules_to_not_convert: names (or their leading or trailing parts) of Linears that stay float, besides the time
            embedding, the patch embedding and the output head.
        module_bits: name (or whole parts of it) of Linears -> 4 or 8 bits for their weights, in place of the scheme's; of
            several that fit a layer the longest counts, and layers that read one tensor must agree. All else (rounding,
            percentiles, detector) stays as the scheme says. `ARVDPipeline.choose_bits` finds some.
        text_encoder: `"int8"` quantizes the text encoder's weights with optimum-quanto at load time; None leaves it.
        base_model: Hub id of the float model; written by quantization.
        calibration_adapters: name -> scale of the adapters (LoRA) that were active in the calibration rollouts; written by
            quantization. The checkpoint holds the base model alone: load them again to get what was calibrated.
        modules: written by quantization, read by loading: name -> `QuantizedModule` (or its dict).
        format: layout of the tensors of `modules`, `PACKED_FORMAT`; written by quantization, another one is refused.
    """

    scheme: str = "w8a8"
    reference_compat: bool = False
    outlier_detector: str = "auto"
    outlier_alignment: int = 128
    tie_inputs: bool = True
    percentiles: tuple[float, ...] = (0.999, 0.9999, 0.99999)
    input_percentiles: tuple[float, ...] | None = None
    rounding: str = "auto"
    rounding_inputs: str = "float"
    rounding_iterations: int = 2000
    rounding_skips: tuple[str, ...] | None = None
    chunk_weights: str | tuple[float, ...] = "published"
    calibration_prompts: tuple[str, ...] | None = None
    calibration_chunks: int = 7
    calibration_seed: int = 0
    modules_to_not_convert: tuple[str, ...] = ()
    module_bits: Mapping[str, int] | None = None
    text_encoder: str | None = None
    base_model: str | None = None
    calibration_adapters: Mapping[str, float] | None = None
    modules: Mapping[str, QuantizedModule] | None = None
    format: int | None = None
    quant_method: str = dataclasses.field(default=QARVDMethod.QARVD, kw_only=True)  # the base puts it first

    def __post_init__(self) -> None:
        self.quant_method = QARVDMethod(self.quant_method)
        for name in (
            "percentiles",
            "input_percentiles",
            "calibration_prompts",
            "modules_to_not_convert",
            "rounding_skips",
        ):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"QARVDConfig.{name} must be a sequence of values, got the single string {value!r}")
            setattr(self, name, None if value is None else tuple(value))
        if not isinstance(self.chunk_weights, str):
            self.chunk_weights = tuple(float(weight) for weight in self.chunk_weights)
        if self.modules is not None:
            self.modules = {
                name: entry if isinstance(entry, QuantizedModule) else QuantizedModule(**entry)
                for name, entry in self.modules.items()
            }
        else:
            self.format = None
        self._check()
        self.__dict__["_frozen"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "_frozen" in self.__dict__:
            raise AttributeError(f"QARVDConfig is frozen: use config.replace({name}=...), which returns a new config")
        super().__setattr__(name, value)

    def _check(self) -> None:
        def require(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"QARVDConfig.{name} is {getattr(self, name)!r}, expected {expected}")

        require(self.scheme in SCHEMES, "scheme", f"one of {', '.join(SCHEMES)}")
        require(
            self.outlier_detector in OUTLIER_DETECTORS, "outlier_detector", f"one of {', '.join(OUTLIER_DETECTORS)}"
        )
        require(self.outlier_alignment >= 1, "outlier_alignment", "a positive integer")
        require(
            self.outlier_detector != "input" or SCHEMES[self.scheme].activation == "static",
            "outlier_detector",
            f"another one: the scheme {self.scheme} has no static activations",
        )
        for name in ("percentiles", "input_percentiles"):
            values = getattr(self, name)
            valid = values is None or (len(values) > 0 and all(0.5 < p <= 1 for p in values))
            require(valid, name, "at least one number in (0.5, 1]")
        require(self.rounding in ROUNDINGS, "rounding", f"one of {', '.join(ROUNDINGS)}")
        require(self.rounding_inputs in ("float", "quantized"), "rounding_inputs", "'float' or 'quantized'")
        require(self.rounding_iterations >= 1, "rounding_iterations", "a positive integer")
        weights = self.chunk_weights
        require(
            weights in ("published", "uniform")
            if isinstance(weights, str)
            else len(weights) > 0 and all(math.isfinite(w) and w > 0 for w in weights),
            "chunk_weights",
            "'published', 'uniform' or positive finite numbers, one per chunk",
        )
        require(
            self.calibration_prompts is None
            or (len(self.calibration_prompts) > 0 and all(p.strip() for p in self.calibration_prompts)),
            "calibration_prompts",
            "None or at least one non-empty prompt",
        )
        require(
            self.calibration_prompts is None
            or len(self.calibration_prompts) == 1
            or len(set(self.calibration_prompts)) > 1,
            "calibration_prompts",
            "prompts that differ (all of them are the same: one is enough)",
        )
        if self.modules is not None and self.format != PACKED_FORMAT:
            older = self.format is None or self.format < PACKED_FORMAT
            remedy = "quantize the float model again" if older else "update qarvd_diffusers"
            raise ValueError(
                f"the checkpoint's quantization_config.format is {self.format!r}, this version of qarvd_diffusers reads "
                f"{PACKED_FORMAT}: its packed weights are laid out in another way. {remedy.capitalize()}"
                f"{f' ({self.base_model})' if older and self.base_model else ''}."
            )
        require(self.calibration_chunks >= 1, "calibration_chunks", "a positive integer")
        require(
            all(bits in (4, 8) for bits in (self.module_bits or {}).values()),
            "module_bits",
            "4 or 8 bits for each name",
        )
        require(self.text_encoder in (None, "int8"), "text_encoder", "None or 'int8'")

    @property
    def resolved_scheme(self) -> Scheme:
        """The `Scheme` of this config; the reference quantizes 8-bit weights asymmetrically."""
        scheme = SCHEMES[self.scheme]
        return dataclasses.replace(scheme, symmetric_weights=False) if self.reference_compat else scheme

    def scheme_of(self, name: str) -> Scheme:
        """The `Scheme` of one Linear: `resolved_scheme` with the bits that `module_bits` gives it."""
        scheme = self.resolved_scheme
        fitting = [pattern for pattern in self.module_bits or {} if named_by(name, pattern)]
        # Not the last: JSON files sort their keys.
        bits = self.module_bits[max(fitting, key=lambda each: (len(each), each))] if fitting else scheme.weight_bits
        if bits == scheme.weight_bits:
            return scheme
        symmetric = bits == 8 and not self.reference_compat
        return dataclasses.replace(scheme, weight_bits=bits, symmetric_weights=symmetric)

    @property
    def resolved_outlier_detector(self) -> str:
        """`input`, `mad_zscore`, `iqr` or `none`."""
        if self.outlier_detector != "auto":
            return self.outlier_detector
        scheme = self.resolved_scheme
        static = scheme.activation == "static" and scheme.weight_bits == 8 and not self.reference_compat
        return "input" if static else "mad_zscore"

    @property
    def resolved_input_percentiles(self) -> tuple[float, ...]:
        """Candidates for the range of static activations."""
        if self.input_percentiles is not None:
            return self.input_percentiles
        clipped = self.reference_compat or self.resolved_scheme.weight_bits == 4
        return self.percentiles if clipped else (1.0,)

    @property
    def resolved_rounding(self) -> str:
        """`nearest`, `gptq` or `adaround`."""
        if self.rounding != "auto":
            return self.rounding
        if self.reference_compat:
            return "adaround"
        return "gptq" if self.resolved_scheme.weight_bits == 4 else "nearest"

    @property
    def resolved_rounding_skips(self) -> tuple[str, ...]:
        """Names, or parts of names, of layers that are always rounded to nearest."""
        if self.rounding_skips is not None:
            return self.rounding_skips
        return ("text_embedder", "attn2.to_k", "attn2.to_v") if self.reference_compat else ()

    @property
    def needs_calibration(self) -> bool:
        """Whether quantization has to run the model."""
        return self.resolved_scheme.needs_calibration or self.resolved_rounding != "nearest"

    def sensitivity(self, num_chunks: int) -> list[float]:
        """Weights of `num_chunks` chunks, scaled to mean 1; beyond the given list its last ratio continues."""
        if num_chunks < 1:
            raise ValueError(f"num_chunks is {num_chunks}, expected at least 1")
        if self.chunk_weights == "uniform":
            return [1.0] * num_chunks
        given = list(PUBLISHED_SENSITIVITY if self.chunk_weights == "published" else self.chunk_weights)
        ratio = given[-1] / given[-2] if len(given) > 1 else 1.0
        while len(given) < num_chunks:
            given.append(given[-1] * ratio)
        mean = sum(given[:num_chunks]) / num_chunks
        return [weight / mean for weight in given[:num_chunks]]

    def replace(self, **changes: Any) -> QARVDConfig:
        """A copy with the named fields changed and checked again."""
        return dataclasses.replace(self, **changes)

    def for_checkpoint(self, modules: Mapping[str, QuantizedModule]) -> QARVDConfig:
        """The config that is stored: names the quantized modules, drops the prompts (they may be private)."""
        return self.replace(modules=modules, format=PACKED_FORMAT, calibration_prompts=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_diff_dict(self) -> dict[str, Any]:
        """Fields that differ from their defaults, plus the method; diffusers' repr asks for it."""
        defaults = QARVDConfig().to_dict()
        return {k: v for k, v in self.to_dict().items() if k == "quant_method" or v != defaults[k]}

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> QARVDConfig | tuple[QARVDConfig, dict[str, Any]]:
        """Build from a dict such as `config.json`'s `quantization_config`; an unknown key is refused by name."""
        known = {field.name for field in dataclasses.fields(cls)}
        values = {**config_dict, **{key: kwargs.pop(key) for key in list(kwargs) if key in known}}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"quantization_config has unknown keys {unknown}; this version knows {sorted(known)}. "
                "A checkpoint written by a newer version needs a newer qarvd_diffusers."
            )
        config = cls(**values)
        return (config, kwargs) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        raise AttributeError("QARVDConfig is frozen: use config.replace(name=value), which returns a new config")


def named_by(name: str, pattern: str) -> bool:
    """Whether `pattern` is the dotted name or some whole parts of it (`attn1`, `blocks.0`, `to_q`)."""
    return f".{pattern}." in f".{name}."


# Byte order mark and zero-width space, for `str.translate`: unseen in an editor, and yet tokens of a prompt.
INVISIBLE = dict.fromkeys((0xFEFF, 0x200B))


def parse_prompts(lines: Sequence[str], source: str) -> tuple[str, ...]:
    """Non-empty, stripped lines that do not start with `#`; an empty result is an error that names `source`."""
    lines = [line.translate(INVISIBLE) for line in lines]
    prompts = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not prompts:
        raise ValueError(f"{source} contains no prompt: one prompt per line is expected")
    return prompts
