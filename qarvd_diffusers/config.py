"""Decide what is quantized and how: `QARVDConfig` (frozen, checked at construction) and its `Recipe`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from .files.schema import check_fields, check_value
from .schemes import GROUP, NEW_FORMAT, SCHEMES, QuantizedModule, Scheme, format_of
from .schemes import PACKED_FORMAT as PACKED_FORMAT


class QARVDMethod(str, Enum):
    """Name the method for diffusers, which reads `.value` and hashes a str: hence a `str` enum."""

    QARVD = "qarvd"


ROUNDINGS = ("auto", "nearest", "gptq", "adaround")
OUTLIER_DETECTORS = ("auto", "input", "mad_zscore", "iqr", "none")
SCALES = ("auto", "static", "dynamic", "token")
ROTATION = 128
PERCENTILES = (0.999, 0.9999, 0.99999)
_NAME_LISTS = ("modules_to_not_convert", "modules_to_convert", "rounding_skips")
_SEQUENCES = ("percentiles", "input_percentiles", "calibration_prompts", *_NAME_LISTS)

# Published chunk sensitivities of Self-Forcing at W4A8 (arXiv 2605.21072), share of the total error per chunk.
PUBLISHED_SENSITIVITY = (0.5462, 0.1668, 0.1189, 0.0789, 0.0534, 0.0263, 0.0096)


@dataclass(frozen=True)
class Recipe:
    """List every choice of calibration; nothing is left to `auto` or `reference_compat`."""

    detector: str = "mad_zscore"  # of outlier channels: `input`, `mad_zscore`, `iqr` or `none`
    rounding: str = "nearest"  # or `gptq` or `adaround`
    rounding_skips: tuple[str, ...] = ()  # layers that are rounded to nearest anyway: names, or whole parts of them
    input_percentiles: tuple[float, ...] = (1.0,)  # candidates for the range of static activations
    token_scales: bool = False  # one scale per token where a kernel holds a whole row when it writes the codes
    group: int = 0  # channels of 4-bit weights that share an integer factor and a zero-point; 0: a whole row
    rotation: int = 1  # largest block of channels that is rotated before 8-bit layers with a scale per token
    symmetric_8_bit: bool = True  # zero-points of 8-bit weights are in the middle of the code range
    clamp_zero_points: bool = True  # ranges are extended to include zero
    tie_inputs: bool = True  # layers that read the same tensor share outliers and activation quantizer
    equal_counts: bool = True  # the same layer of every block gets the same number of outliers
    outliers_outside_blocks: bool = True  # look for them outside the numbered blocks, too
    mad_floor: float | None = 1e-3  # least MAD, as a share of the median norm; None: no outliers where the MAD is 0
    ordered_groups: bool = True  # channels ascend within each group, which keeps gathers local; else norms do
    observer: str = "histogram"  # fixed memory; `samples` keeps every tensor
    observe_rounded: bool = False  # activations are observed while the weights are rounded already
    weigh_dual_scale: bool = True  # chunk weights apply to layers with outliers, too
    cached_in_chunk_0: bool = False  # sensitivity of chunk 0 includes the layers whose output is cached there

    @classmethod
    def reference(cls, percentiles: tuple[float, ...] = PERCENTILES) -> Recipe:
        """The choices of the public reference implementation."""
        return cls(
            rounding="adaround",
            rounding_skips=("text_embedder", "attn2.to_k", "attn2.to_v"),
            input_percentiles=percentiles,
            symmetric_8_bit=False,
            clamp_zero_points=False,
            tie_inputs=False,
            equal_counts=False,
            outliers_outside_blocks=False,
            mad_floor=None,
            ordered_groups=False,
            observer="samples",
            observe_rounded=True,
            weigh_dual_scale=False,
            cached_in_chunk_0=True,
        )

    @classmethod
    def of(cls, config: QARVDConfig) -> Recipe:
        """Resolve a config: what it leaves open is chosen by its scheme, or as the reference chooses."""
        scheme = SCHEMES[config.scheme]
        if config.reference_compat:
            recipe = cls.reference(config.percentiles)
        elif scheme.weight_bits == 4:
            recipe = cls(rounding="gptq", input_percentiles=config.percentiles)
        else:
            recipe = cls(detector="input" if scheme.needs_calibration else "mad_zscore")
        chosen: dict[str, Any] = {
            "detector": None if config.outlier_detector == "auto" else config.outlier_detector,
            "rounding": None if config.rounding == "auto" else config.rounding,
            "rounding_skips": config.rounding_skips,
            "input_percentiles": config.input_percentiles,
            "tie_inputs": None if config.tie_inputs else False,
        }
        by_default = config.activation == "auto" and scheme.activation != "none" and not config.reference_compat
        if config.activation == "token" or by_default:
            chosen |= {"token_scales": True, "rotation": ROTATION}
        if scheme.weight_bits == 4 and not config.reference_compat:
            chosen["group"] = GROUP
        if config.weight_group is not None:
            chosen["group"] = config.weight_group
        changes = {name: value for name, value in chosen.items() if value is not None}
        return dataclasses.replace(recipe, **changes)


@dataclass  # not frozen=True: Python forbids it below diffusers' unfrozen base; __setattr__ does the freezing
class QARVDConfig(QuantizationConfigMixin):
    """Configure Q-ARVD quantization (arXiv 2605.21072); JSON both ways, unknown keys raise an error.

    Args:
        scheme: one of `w8a8`, `w4a8`, `w8a16`, `w4a16`, `w8a8_dynamic`, `w4a8_dynamic`.
        reference_compat: reproduce the public reference code, its choices included: see `Recipe.reference`.
        outlier_detector: `mad_zscore` (modified z-score of the input channels' weight norms), `iqr`, `none`, or
            `input`: the split with the smallest expected rounding error of static activations, from weights and
            calibration rollouts. `auto` takes `input` for 8-bit weights with static activations, else, and under
            `reference_compat`, `mad_zscore`.
        outlier_alignment: outlier counts are rounded up to a multiple of this (and capped at half the channels).
        tie_inputs: layers that read the same tensor (q, k and v) share one outlier set and one activation quantizer,
            so that a kernel quantizes their input once.
        percentiles: candidates of the range search.
        input_percentiles: those of static activations. None takes `percentiles` for 4-bit weights and under
            `reference_compat`, and the whole observed range for 8-bit weights.
        rounding: how weights become integers once their ranges are known. `nearest` needs no data; `gptq` minimises
            the chunk-weighted output error of every layer in closed form; `adaround` does so by gradient descent and
            also learns the activation step. `auto` takes `gptq` for 4-bit weights and `nearest` for 8-bit ones; under
            `reference_compat` it takes `adaround`.
        rounding_inputs: `float`: layers are rounded for the inputs they get in the float model; `quantized`: for those
            they get after the blocks quantized before them.
        rounding_iterations: steps of `adaround`.
        rounding_skips: names (or whole parts of them) of layers that are rounded to nearest anyway; None skips none,
            or, under `reference_compat`, those that read the prompt alone.
        chunk_weights: sensitivity per chunk, any positive scale, weighting every calibration loss; a shorter or longer
            rollout continues the last ratio. `"published"` takes the published numbers, `"uniform"` weighs all alike.
        activation: scales of the activations. `static`: calibrated, one per tensor and group of channels
            (arXiv 2605.21072). `token`: one per token at run time, of blocks of channels that a Hadamard transform has
            mixed; layers with fewer outputs than inputs stay `static` in a calibrated scheme, as their codes are
            written before a row is complete. `dynamic`: one per token and group. `auto` takes `token`, and `static`
            under `reference_compat`.
        weight_group: neighbouring channels of 4-bit weights that share an integer factor and a zero-point: 16, or 0
            for one zero-point per row and group of outliers. None takes 16, and 0 under `reference_compat`.
        calibration_prompts: prompts of the calibration rollouts; None takes the set bundled with the package. Never
            stored in a checkpoint.
        calibration_chunks: chunks per calibration rollout.
        calibration_seed: seed of the calibration noise.
        modules_to_not_convert: names (or whole parts of them) of Linears that stay float, besides those outside the
            repeated blocks, and routers.
        modules_to_convert: names (or whole parts of them) of Linears that are quantized wherever they are.
        module_bits: name (or whole parts of it) of Linears -> 4 or 8 bits for their weights, in place of the scheme's;
            of several that fit a layer the longest counts, and layers that read one tensor must agree. All else
            (rounding, percentiles, detector) stays as the scheme says. `ARVDPipeline.choose_bits` finds suitable ones.
        text_encoder: `"int8"` quantizes the text encoder's weights with optimum-quanto at load time; None leaves it.
        base_model: Hub id of the float model; written by quantization.
        calibration_adapters: name -> scale of the adapters (LoRA) that were active in the calibration rollouts;
            written by quantization. The checkpoint holds the base model alone: load them again.
        modules: written by quantization, read by loading: name -> `QuantizedModule` (or its dict).
        format: layout of the tensors of `modules`, `PACKED_FORMAT`; written by quantization. Others raise an error.

    Raises:
        ValueError: a field has an invalid value; the message says which, what it is and what was expected.
    """

    scheme: str = "w8a8"
    reference_compat: bool = False
    outlier_detector: str = "auto"
    outlier_alignment: int = 128
    tie_inputs: bool = True
    percentiles: tuple[float, ...] = PERCENTILES
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
    modules_to_convert: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    activation: str = dataclasses.field(default="auto", kw_only=True)
    weight_group: int | None = dataclasses.field(default=None, kw_only=True)
    module_bits: Mapping[str, int] | None = None
    text_encoder: str | None = None
    base_model: str | None = None
    calibration_adapters: Mapping[str, float] | None = None
    modules: Mapping[str, QuantizedModule] | None = None
    format: int | None = None
    # The base class has it as its first field, and as an enum of its own.
    quant_method: str = dataclasses.field(default=QARVDMethod.QARVD, kw_only=True)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name in _SEQUENCES:
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"QARVDConfig.{name} must be a sequence of values, got the single string {value!r}")
            if isinstance(value, Iterable) and not isinstance(value, Mapping):
                setattr(self, name, tuple(value))
        check_fields(self)
        self.quant_method = QARVDMethod(self.quant_method)
        if not isinstance(self.chunk_weights, str):
            self.chunk_weights = tuple(float(weight) for weight in self.chunk_weights)
        if self.modules is None:
            self.format = None
        self._check()
        self.__dict__["_frozen"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "_frozen" in self.__dict__:
            raise AttributeError(f"QARVDConfig is frozen: use config.replace({name}=...), which returns a new config")
        super().__setattr__(name, value)

    def _check(self) -> None:
        for name, choices in (
            ("scheme", tuple(SCHEMES)),
            ("outlier_detector", OUTLIER_DETECTORS),
            ("rounding", ROUNDINGS),
            ("rounding_inputs", ("float", "quantized")),
            ("activation", SCALES),
        ):
            self._require(getattr(self, name) in choices, name, f"one of {', '.join(choices)}")
        self._require(
            self.outlier_detector != "input" or SCHEMES[self.scheme].needs_calibration,
            "outlier_detector",
            f"another one: the scheme {self.scheme} has no static activations",
        )
        scheme = SCHEMES[self.scheme].activation
        self._require(
            self.activation in ("auto", scheme) or (self.activation == "token" and scheme != "none"),
            "activation",
            f"'auto'{'' if scheme == 'none' else f', {scheme!r}, or token'} for the scheme {self.scheme}",
        )
        self._require(self.weight_group in (None, 0, GROUP), "weight_group", f"None, 0 or {GROUP}")
        for name in ("outlier_alignment", "rounding_iterations", "calibration_chunks"):
            self._require(getattr(self, name) >= 1, name, "a positive integer")
        for name in ("percentiles", "input_percentiles"):
            values = getattr(self, name)
            valid = values is None or (len(values) > 0 and all(0.5 < p <= 1 for p in values))
            self._require(valid, name, "at least one number in (0.5, 1]")
        weights = self.chunk_weights
        self._require(
            weights in ("published", "uniform")
            if isinstance(weights, str)
            else len(weights) > 0 and all(math.isfinite(w) and w > 0 for w in weights),
            "chunk_weights",
            "'published', 'uniform' or positive finite numbers, one per chunk",
        )
        four_or_eight = all(bits in (4, 8) for bits in (self.module_bits or {}).values())
        self._require(four_or_eight, "module_bits", "4 or 8 bits for each name")
        self._require(self.text_encoder in (None, "int8"), "text_encoder", "None or 'int8'")
        self._check_prompts()
        self._check_format()

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"QARVDConfig.{name} is {getattr(self, name)!r}, expected {expected}")

    def _check_prompts(self) -> None:
        prompts = self.calibration_prompts
        if prompts is None:
            return
        nonempty = len(prompts) > 0 and all(prompt.strip() for prompt in prompts)
        self._require(nonempty, "calibration_prompts", "None or at least one non-empty prompt")
        expected = "prompts that differ (all of them are the same: one is enough)"
        self._require(len(prompts) == 1 or len(set(prompts)) > 1, "calibration_prompts", expected)

    def _check_format(self) -> None:
        if self.modules is None or self.format in (PACKED_FORMAT, NEW_FORMAT):
            return
        older = self.format is None or self.format < PACKED_FORMAT
        remedy = "quantize the float model again" if older else "update qarvd_diffusers"
        raise ValueError(
            f"the checkpoint's quantization_config.format is {self.format!r}, this version of qarvd_diffusers reads "
            f"{PACKED_FORMAT} and {NEW_FORMAT}: its packed layers are made in another way. {remedy.capitalize()}"
            f"{f' ({self.base_model})' if older and self.base_model else ''}."
        )

    @property
    def recipe(self) -> Recipe:
        """Every choice of calibration, resolved."""
        return Recipe.of(self)

    @property
    def resolved_scheme(self) -> Scheme:
        """The `Scheme` of this config; the reference quantizes 8-bit weights asymmetrically."""
        scheme = SCHEMES[self.scheme]
        symmetric = scheme.symmetric_weights and self.recipe.symmetric_8_bit
        return dataclasses.replace(scheme, symmetric_weights=symmetric)

    def scheme_of(self, name: str) -> Scheme:
        """The `Scheme` of one Linear: `resolved_scheme` with the bits that `module_bits` gives it."""
        scheme, module_bits = self.resolved_scheme, self.module_bits or {}
        fitting = [pattern for pattern in module_bits if named_by(name, pattern)]
        # The longest, not the last: JSON files sort their keys.
        bits = module_bits[max(fitting, key=lambda p: (len(p), p))] if fitting else scheme.weight_bits
        if bits == scheme.weight_bits:
            return scheme
        symmetric = bits == 8 and self.recipe.symmetric_8_bit
        return dataclasses.replace(scheme, weight_bits=bits, symmetric_weights=symmetric)

    @property
    def resolved_outlier_detector(self) -> str:
        """`input`, `mad_zscore`, `iqr` or `none`."""
        return self.recipe.detector

    @property
    def resolved_input_percentiles(self) -> tuple[float, ...]:
        """Candidates for the range of static activations."""
        return self.recipe.input_percentiles

    @property
    def resolved_rounding(self) -> str:
        """`nearest`, `gptq` or `adaround`."""
        return self.recipe.rounding

    @property
    def resolved_rounding_skips(self) -> tuple[str, ...]:
        """Names, or parts of names, of layers that are always rounded to nearest."""
        return self.recipe.rounding_skips

    @property
    def needs_calibration(self) -> bool:
        """Whether quantization has to run the model."""
        return self.resolved_scheme.needs_calibration or self.resolved_rounding != "nearest"

    def sensitivity(self, num_chunks: int) -> list[float]:
        """Weigh `num_chunks` chunks, scaled to mean 1; beyond the end of `chunk_weights` its last ratio continues."""
        if num_chunks < 1:
            raise ValueError(f"num_chunks is {num_chunks}, expected at least 1")
        if self.chunk_weights == "uniform":
            return [1.0] * num_chunks
        weights = list(PUBLISHED_SENSITIVITY if isinstance(self.chunk_weights, str) else self.chunk_weights)
        ratio = weights[-1] / weights[-2] if len(weights) > 1 else 1.0
        while len(weights) < num_chunks:
            weights.append(weights[-1] * ratio)
        mean = sum(weights[:num_chunks]) / num_chunks
        return [weight / mean for weight in weights[:num_chunks]]

    def replace(self, **changes: Any) -> QARVDConfig:
        """Copy the config with some fields changed, and check it again."""
        return dataclasses.replace(self, **changes)

    def for_checkpoint(self, modules: Mapping[str, QuantizedModule]) -> QARVDConfig:
        """Make the config to store: it names the quantized modules and drops the prompts, which may be private."""
        return self.replace(modules=modules, format=format_of(modules.values()), calibration_prompts=None)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON types."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        since: dict[str, Any] = {"modules_to_convert": [], "activation": "auto", "weight_group": None}
        for name, default in since.items():  # files and hashes are those of versions without these fields
            if values[name] == default:
                del values[name]
        for module in (values["modules"] or {}).values():
            for name, unset in (("rotation", 1), ("group", 0)):
                if module[name] == unset:
                    del module[name]
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """List the fields that differ from their defaults, plus the method; used by diffusers' repr."""
        defaults = QARVDConfig().to_dict()
        return {k: v for k, v in self.to_dict().items() if k == "quant_method" or v != defaults.get(k)}

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> QARVDConfig | tuple[QARVDConfig, dict[str, Any]]:
        """Build from a dict such as `config.json`'s `quantization_config`; unknown keys raise an error."""
        check_value(config_dict, Mapping[str, Any], "quantization_config")
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
        """Raise an error: the config is frozen."""
        raise AttributeError("QARVDConfig is frozen: use config.replace(name=value), which returns a new config")


def named_by(name: str, pattern: str) -> bool:
    """Tell whether `pattern` is the dotted name or some whole parts of it (`attn1`, `blocks.0`, `to_q`)."""
    return f".{pattern}." in f".{name}."
