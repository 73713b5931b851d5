"""AdaRound against the public reference implementation (golden C4), and what it does at its edges."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qarvd_diffusers.calibration.adaround import AdaRoundSettings, adaround
from qarvd_diffusers.calibration.grid import WeightGrid
from qarvd_diffusers.calibration.inputs import InputQuantizer

C4 = "C4_adaround_layer_reconstruction"


def golden_folder():
    folder = Path(os.environ.get("QARVD_GOLDEN_DIR", Path(__file__).parents[1] / "data" / "golden"))
    if not (folder / f"{C4}.safetensors").is_file():
        pytest.skip(f"{C4} is not in {folder}; set QARVD_GOLDEN_DIR to the full set")
    return folder


@pytest.fixture(scope="module")
def golden_layer():
    folder = golden_folder()
    return load_file(folder / f"{C4}.safetensors"), json.loads((folder / f"{C4}.json").read_text())


def problem(tensors, info, case):
    """Weight, grid, inputs and quantizer as the reference started from, outliers first."""
    if case == "single":
        order, count = torch.arange(tensors["single.weight"].shape[1]), 0
        groups = ("",)
    else:
        outliers, normal = (tensors[f"dual.{g}_indices_reference_order"] for g in ("outlier", "normal"))
        order, count = torch.cat([outliers, normal]), len(outliers)
        groups = ("_outlier", "_normal")

    def pair(key):
        found = [tensors[f"{case}.{key}{g}"].float().reshape(-1, 1) for g in groups]
        return torch.cat(found if len(found) == 2 else found * 2, dim=1)

    grid = WeightGrid(pair("init_weight_delta"), pair("init_weight_zero_point"), count, info["n_bits_weight"])
    quantizer = InputQuantizer(pair("init_act_delta")[0], pair("init_act_zero_point")[0].int(), count)
    return tensors[f"{case}.weight"][:, order], grid, tensors["x"][..., order], quantizer


def reconstruction_loss(weight, rounded, samples, quantizer, weights):
    error = samples @ weight.T - quantizer(samples) @ rounded.T
    return (error.square().sum(1) * weights[:, None]).mean().item()


@pytest.mark.parametrize("case", ("single", "dual"))
def test_golden_losses(golden_layer, case):
    tensors, info = golden_layer
    bounds = info["cases"][case]["bounds"]
    weight, grid, samples, quantizer = problem(tensors, info, case)
    weights = tensors["sample_weights_normalised"]
    ones = torch.ones_like(weights)
    measures = {"chunk_weighted_rec_loss": weights, "unweighted_rec_loss": ones}
    nearest = grid.dequantize(grid.quantize(weight))
    for name, w in measures.items():
        assert reconstruction_loss(weight, nearest, samples, quantizer, w) == pytest.approx(
            bounds[name]["rtn_initial"], rel=1e-4
        )
    # The reference weighs all chunks alike in its dual-scale layers.
    trained_with = weights if case == "single" else ones
    settings = AdaRoundSettings(
        weight_lr=info["lr_w"],
        input_lr=info["lr_act"],
        regularizer=info["weight"],
        warm_up=info["warmup"],
        temperature=tuple(map(float, info["b_range"])),
    )
    batches = tensors[f"{case}.batch_indices"]
    codes, learned = adaround(weight, grid, samples, trained_with, quantizer, batches, settings)
    rounded = grid.dequantize(codes)
    judged = ("chunk_weighted_rec_loss", "unweighted_rec_loss") if case == "single" else ("unweighted_rec_loss",)
    for name in judged:
        got = reconstruction_loss(weight, rounded, samples, learned, measures[name])
        assert got <= bounds[name]["x1_05_of_reference_seed"]
    groups = ("_outlier", "_normal") if case == "dual" else ("",)
    want = [info["cases"][case]["final_act_delta"][f"final_act_delta{g}"] for g in groups]
    torch.testing.assert_close(learned.scale[2 - len(want) :], torch.tensor(want), rtol=1e-2, atol=0)


@pytest.mark.parametrize("inference", (False, True))
def test_edges(inference):
    """Zero rows, empty groups, float activations, inference mode: finite codes, never worse than round-to-nearest."""
    with torch.inference_mode(inference):
        g = torch.Generator().manual_seed(0)
        weight, samples = torch.randn(6, 8, generator=g), torch.randn(5, 16, 8, generator=g)
        samples = samples @ torch.randn(
            8, 8, generator=g
        )  # rounding errors can only cancel across correlated channels
        weight[2] = 0
        grid = WeightGrid(torch.full((6, 2), 0.3), torch.full((6, 2), 8.0), 0, 4)
        batches = torch.randint(5, (200, 2), generator=g)
        losses = []
        settings = AdaRoundSettings(weight_lr=5e-2)
        codes, quantizer = adaround(
            weight, grid, samples, torch.ones(5), None, batches, settings, lambda step, loss: losses.append(loss)
        )
    assert quantizer is None and codes.dtype == torch.uint8 and int(codes.max()) <= 15 and len(losses) == 200
    assert bool((codes[2] == 8).all())

    def error(values):
        return ((weight - values) @ samples.flatten(0, 1).T).square().mean()

    assert error(grid.dequantize(codes)) < error(grid.dequantize(grid.quantize(weight)))
