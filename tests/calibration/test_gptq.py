"""Closed-form rounding against exhaustive search, AdaRound's golden layer, and its own definition."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from test_adaround import C4, golden_folder, problem, reconstruction_loss

from qarvd_diffusers.calibration.gptq import (
    compensate,
    dampen_hessian,
    descended_codes,
    gptq_codes,
    refitted_grid,
)
from qarvd_diffusers.calibration.grid import WeightGrid


def layer(rows=8, columns=12, num_outliers=4, bits=4, seed=0):
    """A weight with outlier columns, the second moments of correlated inputs, and a grid of nearest rounding."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g)
    weight[:, :num_outliers] *= 8
    x = torch.randn(200, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    parts = weight.tensor_split([num_outliers], dim=1)
    peaks = [part.abs().amax(1, keepdim=True) if part.numel() else torch.ones(rows, 1) for part in parts]
    half = 2 ** (bits - 1)
    grid = WeightGrid(torch.cat(peaks, 1) / (half - 1), torch.full((rows, 2), float(half)), num_outliers, bits)
    return weight, x.T @ x, grid


def output_error(weight, values, hessian):
    """Squared output error per row, `[N]`."""
    error = weight - values
    return ((error @ hessian) * error).sum(1)


def test_output_error_is_what_it_says():
    weight, _, grid = layer()
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    values = grid.dequantize(grid.quantize(weight))
    want = (x @ (weight - values).T).square().sum(0)
    torch.testing.assert_close(output_error(weight, values, x.T @ x), want)


@pytest.mark.parametrize("num_outliers", (0, 4, 6))
def test_every_step_lowers_the_error(num_outliers):
    weight, moments, grid = layer(num_outliers=num_outliers)
    moments = dampen_hessian(moments)
    codes = grid.quantize(weight)
    errors = [output_error(weight, grid.dequantize(codes), moments)]
    codes = gptq_codes(weight, moments, grid)
    assert output_error(weight, grid.dequantize(codes), moments).sum() < 0.8 * errors[0].sum()
    errors = [output_error(weight, grid.dequantize(codes), moments)]
    for _ in range(3):
        grid = refitted_grid(codes, weight, moments, grid)
        errors.append(output_error(weight, grid.dequantize(codes), moments))
        codes = descended_codes(codes, weight, moments, grid)
        errors.append(output_error(weight, grid.dequantize(codes), moments))
    assert all(bool((later <= before * 1.0001 + 1e-4).all()) for before, later in itertools.pairwise(errors))
    assert codes.min() >= 0 and codes.max() <= 15 and torch.equal(codes, codes.round())


def test_close_to_the_best_codes_there_are():
    """Four columns of two bits: on average little is lost against the best of all 256 combinations."""
    weight, moments, grid = layer(rows=40, columns=4, num_outliers=0, bits=2)
    moments = dampen_hessian(moments)
    every = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.float32)
    values = (every[None] - grid.zero_point[:, 1, None, None]) * grid.scale[:, 1, None, None]
    errors = weight[:, None] - values
    best = ((errors @ moments) * errors).sum(2).amin(1)
    codes = descended_codes(gptq_codes(weight, moments, grid), weight, moments, grid)
    got = output_error(weight, grid.dequantize(codes), moments)
    assert bool((got >= best * 0.999).all())
    assert got.sum() < 1.5 * best.sum()


def test_uncorrelated_inputs_leave_nearest_rounding():
    weight, _, grid = layer()
    codes = gptq_codes(weight, torch.eye(12), grid)
    assert torch.equal(codes, grid.quantize(weight))
    assert torch.equal(descended_codes(codes, weight, torch.eye(12), grid), codes)


def test_more_columns_than_a_block():
    weight, moments, grid = layer(rows=4, columns=300, num_outliers=130)
    codes, refitted = compensate(weight, moments, grid)
    nearest = output_error(weight, grid.dequantize(grid.quantize(weight)), moments)
    assert bool((output_error(weight, refitted.dequantize(codes), moments) < 0.5 * nearest).all())


@pytest.mark.parametrize("case", ("nothing seen", "one channel never used", "two channels alike", "zero row"))
def test_degenerate_input(case):
    weight, moments, grid = layer()
    if case == "nothing seen":
        moments = torch.zeros_like(moments)
    elif case == "one channel never used":
        moments[3], moments[:, 3] = 0, 0
    elif case == "two channels alike":
        moments[5], moments[:, 5] = moments[6], moments[:, 6]
        moments[5, 5] = moments[6, 6]
    else:
        weight[2] = 0
    codes, refitted = compensate(weight, moments, grid)
    assert codes.dtype == torch.uint8 and int(codes.max()) <= 15
    assert bool((refitted.scale > 0).all()) and bool(refitted.scale.isfinite().all())
    if case == "zero row":
        assert bool((refitted.dequantize(codes)[2] == 0).all())


@pytest.mark.parametrize("case", ("single", "dual"))
def test_better_than_the_reference_on_its_own_layer(case):
    folder = golden_folder()
    tensors, info = load_file(folder / f"{C4}.safetensors"), json.loads((folder / f"{C4}.json").read_text())
    weight, grid, samples, quantizer = problem(tensors, info, case)
    weights = tensors["sample_weights_normalised"]
    seen = quantizer(samples)
    codes, grid = compensate(weight, torch.einsum("stk,stl,s->kl", seen, seen, weights), grid)
    got = reconstruction_loss(weight, grid.dequantize(codes), samples, quantizer, weights)
    assert got < info["cases"][case]["bounds"]["chunk_weighted_rec_loss"]["reference_seed_value"]
