from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from qarvd_diffusers.config import (
    PACKED_FORMAT,
    PUBLISHED_SENSITIVITY,
    SCHEMES,
    QARVDConfig,
    QuantizedModule,
    Recipe,
)
from qarvd_diffusers.files.text import parse_prompts


@pytest.mark.parametrize("scheme", SCHEMES)
def test_json_round_trip(scheme):
    config = QARVDConfig(
        scheme, chunk_weights=[3, 2, 1], calibration_prompts=["a b"], modules_to_not_convert=["blocks.0"]
    )
    stored = config.for_checkpoint({"blocks.1.ffn": QuantizedModule(128, 4, "static")})
    for each in (config, stored):
        assert QARVDConfig.from_dict(json.loads(json.dumps(each.to_dict()))) == each
        assert copy.deepcopy(each) == each
    assert stored.calibration_prompts is None, "prompts may be private and never reach a checkpoint"


def test_frozen():
    config = QARVDConfig()
    with pytest.raises(AttributeError, match="replace"):
        config.scheme = "w4a8"
    with pytest.raises(AttributeError, match="replace"):
        config.update(scheme="w4a8")
    assert config.replace(scheme="w4a8").scheme == "w4a8" and config.scheme == "w8a8"


def test_unknown_key_is_named():
    with pytest.raises(ValueError, match="rank"):
        QARVDConfig.from_dict({"scheme": "w8a8", "rank": 4})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scheme", "w3a8"),
        ("outlier_detector", "magic"),
        ("outlier_alignment", 0),
        ("percentiles", ()),
        ("percentiles", (1.5,)),
        ("chunk_weights", (1.0, -1.0)),
        ("chunk_weights", (float("nan"),)),
        ("chunk_weights", "guess"),
        ("calibration_prompts", ()),
        ("calibration_prompts", ("", "a")),
        ("calibration_prompts", "one string"),
        ("calibration_chunks", 0),
        ("text_encoder", "int3"),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        QARVDConfig(**{field: value})


OTHER_TYPES = [None, True, 1, 128.5, "w8a8", [1], [None], {"a": 1}, {"a": None}, [[0.9]], float("nan"), 10**400]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(QARVDConfig)])
def test_values_of_another_type_are_named_before_they_are_compared(field):
    """Whatever JSON holds: a config, or a ValueError with the field."""
    accepted = 0
    for value in OTHER_TYPES:
        try:
            QARVDConfig(**{field: value})
            accepted += 1
        except ValueError as error:
            assert field in str(error) or "QARVDMethod" in str(error)
    assert accepted < len(OTHER_TYPES) / 2
    for values in (None, [], "w8a8", 3):
        with pytest.raises(ValueError, match="quantization_config"):
            QARVDConfig.from_dict(values)


@pytest.mark.parametrize(
    "entry", [None, 3, [], {}, {"num_outliers": 1, "weight_bits": 8, "activation": "none", "x": 1}]
)
def test_a_damaged_module_is_named(entry):
    with pytest.raises(ValueError, match=r"modules\['blocks\.0'\]"):
        QARVDConfig(modules={"blocks.0": entry}, format=PACKED_FORMAT)


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in ("num_outliers", "weight_bits") for value in (True, 8.0, "8", None, [8], -1)]
    + [("activation", value) for value in (None, 1, ["static"], "Static")],
)
def test_a_description_of_another_type_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        QuantizedModule(**{"num_outliers": 8, "weight_bits": 8, "activation": "static", field: value})


def test_sensitivity_continues_the_last_ratio_and_has_mean_one():
    weights = QARVDConfig(chunk_weights=(4.0, 2.0)).sensitivity(4)
    assert weights == pytest.approx([4 / 1.875, 2 / 1.875, 1 / 1.875, 0.5 / 1.875])
    published = QARVDConfig().sensitivity(7)
    assert sum(published) / 7 == pytest.approx(1)
    assert published[1] / published[0] == pytest.approx(PUBLISHED_SENSITIVITY[1] / PUBLISHED_SENSITIVITY[0])
    assert QARVDConfig(chunk_weights="uniform").sensitivity(3) == [1, 1, 1]


def test_reference_compat_is_asymmetric_at_8_bits():
    assert QARVDConfig("w8a8").resolved_scheme.symmetric_weights
    assert not QARVDConfig("w8a8", reference_compat=True).resolved_scheme.symmetric_weights


def test_a_recipe_takes_what_the_config_says_and_else_what_the_scheme_or_the_reference_says():
    assert QARVDConfig("w8a16").recipe == Recipe()
    by_token = {"token_scales": True, "rotation": 128}
    assert QARVDConfig("w8a8").recipe == Recipe(detector="input", **by_token)
    assert QARVDConfig("w8a8", activation="static").recipe == Recipe(detector="input")
    four = {"rounding": "gptq", "input_percentiles": QARVDConfig().percentiles}
    assert QARVDConfig("w4a8").recipe == Recipe(**four, **by_token, group=16)
    assert QARVDConfig("w4a16").recipe == Recipe(**four, group=16)
    assert QARVDConfig("w4a8", activation="static", weight_group=0).recipe == Recipe(**four)
    for scheme in SCHEMES:
        assert QARVDConfig(scheme, reference_compat=True).recipe == Recipe.reference()
    said = {"rounding": "gptq", "rounding_skips": (), "input_percentiles": (0.9,), "tie_inputs": False}
    got = QARVDConfig("w8a8", outlier_detector="iqr", reference_compat=True, **said).recipe
    assert got == dataclasses.replace(Recipe.reference(), detector="iqr", **said)


def test_prompt_files():
    assert parse_prompts(["# comment", "", " a cat "], "x.txt") == ("a cat",)
    with pytest.raises(ValueError, match=r"x\.txt"):
        parse_prompts(["# only a comment"], "x.txt")
    with pytest.warns(DeprecationWarning, match=r"qarvd_diffusers\.files\.text"):
        from qarvd_diffusers.config import parse_prompts as old
    assert old is parse_prompts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": None},
            "quantization_config.format is None, .* reads 2 and 3: .* Quantize the float model again (Wan/x).",
        ),
        ({"format": 1}, "quantization_config.format is 1, .* Quantize the float model again"),
        ({"format": 4}, "quantization_config.format is 4, .* Update qarvd_diffusers"),
    ],
)
def test_packed_tensors_of_another_layout(change, message):
    stored = QARVDConfig(base_model="Wan/x").for_checkpoint({"a": QuantizedModule(0, 8, "static")})
    assert QARVDConfig.from_dict(stored.to_dict()).format == PACKED_FORMAT
    assert stored.replace(modules=None) == QARVDConfig(base_model="Wan/x")
    values = {key: value for key, value in {**stored.to_dict(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        QARVDConfig.from_dict(values)
