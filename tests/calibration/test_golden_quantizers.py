"""Outliers, weight ranges and activation ranges against the public reference implementation's numbers (C1, C2, C3)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qarvd_diffusers.calibration.outliers import find_outliers
from qarvd_diffusers.calibration.ranges import RangeHistogram, search_rows, search_samples
from qarvd_diffusers.config import Recipe
from qarvd_diffusers.quantization import affine as P

GOLDEN = Path(os.environ.get("QARVD_GOLDEN_DIR", Path(__file__).parents[1] / "data" / "golden"))
PERCENTILES = (0.999, 0.9999, 0.99999)
C12, C3 = "C12_weight_outliers_and_quantizers", "C3_activation_quantizer_init"
if not all((GOLDEN / f"{name}.safetensors").is_file() for name in (C12, C3)):
    pytest.skip(f"{C12} and {C3} are not in {GOLDEN}; set QARVD_GOLDEN_DIR to the full set", allow_module_level=True)

weights, weights_info = load_file(GOLDEN / f"{C12}.safetensors"), json.loads((GOLDEN / f"{C12}.json").read_text())
inputs, inputs_info = load_file(GOLDEN / f"{C3}.safetensors"), json.loads((GOLDEN / f"{C3}.json").read_text())
MATRICES = sorted(weights_info["matrices"])
CASES = sorted(inputs_info["cases"])


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("method", ("mad_zscore", "iqr"))
def test_outliers(name, method):
    weight, want = weights[f"{name}.weight"], weights_info["matrices"][name][method]
    found = find_outliers([weight], method, alignment=32, recipe=Recipe.reference())
    assert found.num_outliers == want["n_outlier"]
    assert found.threshold == pytest.approx(want["threshold"], rel=1e-4)
    assert torch.equal(found.channel_order.sort().values, torch.arange(weight.shape[1], dtype=torch.int32))
    if want["n_outlier"] and want["index_set_well_defined"]:
        order = found.channel_order.long()
        outliers, normal = order[: found.num_outliers], order[found.num_outliers :]
        assert torch.equal(outliers.sort().values, weights[f"{name}.{method}.outlier_indices_sorted"])
        assert torch.equal(outliers, weights[f"{name}.{method}.outlier_indices_reference_order"])
        assert torch.equal(normal, weights[f"{name}.{method}.normal_indices_reference_order"])


def check_rows(key, x, bits):
    """Scale, zero-point and de-quantized values of one matrix; the tolerances are the golden set's own."""
    scale, zero_point = search_rows(x, bits, PERCENTILES, clamp=False)
    decided = weights[f"{key}.pct_choice_rel_gap"] > 1e-4
    torch.testing.assert_close(scale[decided], weights[f"{key}.delta"][decided], rtol=1e-5, atol=0)
    assert torch.equal(zero_point[decided], weights[f"{key}.zero_point"][decided])
    return P.fake_quantize(x, scale, zero_point, bits), scale, decided


def check_values(got, want, scale, decided):
    error = (got - want).abs()[decided]
    off = error > 1e-5
    assert off.sum().item() <= 1e-3 * error.numel()
    assert bool((error <= scale[decided] * 1.0001 + 1e-5).all())


RANGES = [  # the golden data holds quantizers of these
    (name, bits)
    for name in MATRICES
    for bits in (4, 8)
    if {f"{name}.w{bits}.single.delta", f"{name}.w{bits}.dual.dequant"} & weights.keys()
]


@pytest.mark.parametrize(("name", "bits"), RANGES)
def test_weight_ranges(name, bits):
    x, key = weights[f"{name}.weight"], f"{name}.w{bits}"
    if f"{key}.single.delta" in weights:
        got, scale, decided = check_rows(f"{key}.single", x, bits)
        check_values(got, weights[f"{key}.single.dequant"], scale, decided)
    if f"{key}.dual.dequant" in weights:
        found = find_outliers([x], "mad_zscore", alignment=32, recipe=Recipe.reference())
        want, order = weights[f"{key}.dual.dequant"], found.channel_order.long()
        parts = (("outlier", order[: found.num_outliers]), ("normal", order[found.num_outliers :]))
        for group, columns in parts:
            got, scale, decided = check_rows(f"{key}.{group}", x[:, columns], bits)
            check_values(got, want[:, columns], scale, decided)


def golden_case(case):
    name, bits, weighting = case.rsplit(".", 2)
    x = inputs[f"{name}.x"]
    sensitivity = torch.tensor(inputs_info["sensitivity"])
    if weighting == "uniform":
        sensitivity = torch.ones_like(sensitivity)
    calls_per_chunk = max(1, len(inputs["sample_weights_normalised"]) // len(sensitivity))
    chunk = torch.arange(len(x)) // calls_per_chunk
    return x, (sensitivity / sensitivity.mean())[chunk], int(bits[1:])


def test_sample_weights():
    _, sample_weights, _ = golden_case(next(c for c in CASES if c.endswith("weighted") and len(golden_case(c)[0]) > 1))
    torch.testing.assert_close(sample_weights, inputs["sample_weights_normalised"])


@pytest.mark.parametrize("case", CASES)
def test_activation_ranges(case):
    x, sample_weights, bits = golden_case(case)
    scale, zero_point = search_samples(x, sample_weights, bits, PERCENTILES, clamp=False)
    want_scale, want_zero_point = inputs[f"{case}.delta"][0], inputs[f"{case}.zero_point"][0]
    torch.testing.assert_close(scale, want_scale, rtol=1e-3, atol=0)
    moved = not torch.isclose(scale, want_scale, rtol=1e-6, atol=0)
    assert abs(zero_point - want_zero_point) <= int(moved)
    if not moved:
        got = P.fake_quantize(x[:1], scale, zero_point, bits)
        check_values(
            got, inputs[f"{case}.dequant_first_sample"], scale.expand_as(got), torch.ones(1, dtype=torch.bool)
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("clamp", (False, True))
def test_streaming_histogram_finds_the_exact_range(case, clamp):
    """One sample at a time, nothing kept, and yet the range of the search over all samples."""
    x, sample_weights, bits = golden_case(case)
    want_scale, want_zero_point = search_samples(x, sample_weights, bits, PERCENTILES, clamp=clamp)
    histogram = RangeHistogram()
    for sample, weight in zip(x, sample_weights.tolist(), strict=True):
        histogram.add(sample, weight)
    scale, zero_point = histogram.search(bits, PERCENTILES, clamp=clamp)
    torch.testing.assert_close(scale, want_scale, rtol=1e-3, atol=0)
    assert abs(zero_point - want_zero_point) <= 1
