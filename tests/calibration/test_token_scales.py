"""Activations with a scale per token, outlier channels scaled apart, and 4-bit weights in groups: against float."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_wan import CHUNKS, make_run, make_wan
from torch import nn

import qarvd_kernels as ops
from qarvd_diffusers.calibration.calibrate import calibrate, quantize_weights
from qarvd_diffusers.calibration.factors import search_factors
from qarvd_diffusers.calibration.grid import WeightGrid
from qarvd_diffusers.calibration.outliers import balanced
from qarvd_diffusers.config import QARVDConfig
from qarvd_diffusers.quantization.install import apply
from qarvd_diffusers.quantization.linear import QARVDLinear
from qarvd_diffusers.quantization.result import CalibrationResult
from qarvd_diffusers.schemes import QuantizedModule


@pytest.fixture
def wan():
    return make_wan(planted=False)


def config_of(scheme="w8a8", **options):
    return QARVDConfig(scheme, **{"outlier_alignment": 4, "calibration_chunks": CHUNKS, **options})


def forward(model, seed=3):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        x, text = torch.randn(1, 4, 3, 4, 4, generator=g), torch.randn(1, 6, 24, generator=g)
        return model(x, torch.tensor([500.0]), text).sample


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


@torch.no_grad()
def plant(model, factor=32.0):
    """Scale some rows of v down and columns of o up: the same function, with outliers among o's input channels."""
    for block in model.blocks:
        for attn in (block.attn1, block.attn2):
            attn.to_v.weight[:2] /= factor
            attn.to_v.bias[:2] /= factor
            attn.to_out[0].weight[:, :2] *= factor
    return model


def test_who_gets_a_scale_per_token(wan):
    layers = calibrate(wan, make_run(wan), config_of()).layers
    for name, layer in layers.items():
        static = name.endswith("ffn.net.2")  # 64 -> 32 channels: its codes are written before a row is complete
        assert layer.description.activation == ("static" if static else "token"), name
        assert (layer.input_scale is not None) == static == (layer.channel_scale is None)
        assert layer.description.rotation == (1 if static else {32: 32, 24: 8}[len(layer.channel_order)]), name
    four = calibrate(wan, make_run(wan), config_of("w4a8", rounding="nearest")).layers
    assert {layer.description.rotation for layer in four.values()} == {1}
    assert {layer.description.group for layer in four.values()} == {16, 0}  # 24 channels are no groups of 16
    assert {
        layer.description.activation for layer in quantize_weights(wan, config_of("w8a8_dynamic")).layers.values()
    } == {"token"}


def test_scales_per_token_are_closer_to_float(wan):
    errors = {}
    for activation in ("token", "static"):
        model = copy.deepcopy(wan)
        apply(model, calibrate(model, make_run(model, prompts=2), config_of(activation=activation)))
        errors[activation] = error(forward(model), forward(wan))
    assert errors["token"] < 0.8 * errors["static"]


@pytest.mark.parametrize("scheme", ("w8a8", "w8a8_dynamic", "w4a8"))
def test_planted_outliers_cost_little(wan, scheme):
    errors = []
    for model in (wan, plant(copy.deepcopy(wan))):
        want = forward(model)
        config = config_of(scheme)
        data_free = not config.needs_calibration
        apply(model, quantize_weights(model, config) if data_free else calibrate(model, make_run(model), config))
        errors.append(error(forward(model), want))
    assert errors[1] < 2 * errors[0]  # 4.2 to 6.3 times without the scaling


def test_channels_are_balanced_only_where_they_are_far_out():
    weight, x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), torch.ones(32)
    weight[:, 3] *= 64
    x[3] /= 64  # planted: scaling by 64 undoes it
    x[5] = 0.0  # not seen in use: as loud as others, for all we know
    x[7] *= 4  # within what prompts happen to hold
    scale = balanced([weight], x, 8).channel_scale
    assert scale[[0, 5, 7]].tolist() == [1.0, 1.0, 1.0]
    assert float(scale[3]) == pytest.approx(64, rel=0.3)


@pytest.mark.parametrize("bits", (4, 8))
def test_the_layer_computes_what_its_weight_says(bits):
    """Codes of tokens on their own grids, times the dequantized weight, up to float32 rounding."""
    g = torch.Generator().manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(3, 7, 64, generator=g) * 3
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.ModuleDict({"a": linear}), nn.ModuleDict({"a": nn.Linear(64, 48)})])}
    )
    scheme = f"w{bits}a8_dynamic"
    qparams = quantize_weights(model, QARVDConfig(scheme, rounding="nearest")).layers["blocks.0.a"]
    layer = QARVDLinear.from_float(linear, qparams)
    assert layer.description == QuantizedModule(0, bits, "token", 64 if bits == 8 else 1, 16 if bits == 4 else 0)
    rotated = ops.rotate(x * layer.channel_scale, layer.rotation)
    step = rotated.abs().amax(-1, keepdim=True) / 127
    grid = ops.rotate((rotated / step).round() * step, layer.rotation) / layer.channel_scale
    torch.testing.assert_close(
        layer(x), nn.functional.linear(grid, layer.dequantized(), linear.bias), rtol=1e-4, atol=1e-4
    )
    assert error(layer.dequantized(), linear.weight) < (0.01 if bits == 8 else 0.1)


def test_factors_fit_int8_and_follow_their_groups():
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 64, generator=g)
    weight[:, 16:32] *= 0.1
    weight[3] = 0
    weight[4, :16] = weight[4, :16].abs() + 1  # one-sided
    grid = search_factors(weight, 0, 16)
    codes = grid.quantize(weight)
    assert int(grid.steps(codes).abs().max()) <= 128 and int(codes.min()) >= 0 and int(codes.max()) <= 15
    assert bool((grid.factor >= 1).all()) and bool((grid.factor <= 16).all())
    low, high = weight.unflatten(1, (-1, 16)).amin(2).clamp(max=0), weight.unflatten(1, (-1, 16)).amax(2).clamp(min=0)
    step = ((high - low) / 15).repeat_interleave(16, 1)
    ideal = ((weight / step.clamp_min(1e-9)).round() * step - weight).norm()  # a float scale of every group
    assert float((grid.dequantize(codes) - weight).norm()) < 1.1 * float(ideal)
    again = WeightGrid.stored(grid.scale, grid.stored_zero_point, 0, 4)
    assert torch.equal(again.dequantize(codes), grid.dequantize(codes))


@pytest.mark.parametrize("scheme", ("w8a8", "w4a8"))
def test_results_keep_what_they_hold(wan, scheme, tmp_path):
    result = calibrate(wan, make_run(wan), config_of(scheme))
    again = CalibrationResult.load(result.save(tmp_path / "result.safetensors"))
    for name, layer in result.layers.items():
        assert layer.description == again.layers[name].description
        for key, tensor in layer.tensors().items():
            assert torch.equal(tensor, again.layers[name].tensors()[key]), (name, key)


def test_old_and_new_layouts_have_different_numbers():
    old = QARVDConfig().for_checkpoint({"a": QuantizedModule(8, 4, "static")})
    new = QARVDConfig().for_checkpoint({"a": QuantizedModule(0, 8, "token", 128)})
    grouped = QARVDConfig("w4a16").for_checkpoint({"a": QuantizedModule(8, 4, "none", group=16)})
    assert (old.format, new.format, grouped.format) == (2, 3, 3)
    assert old.to_dict()["modules"]["a"] == {"num_outliers": 8, "weight_bits": 4, "activation": "static"}
    assert QARVDConfig.from_dict(new.to_dict()) == new


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((8, 8, "token", 128), "not a valid description"),
        ((0, 8, "static", 128), "not a valid description"),
        ((0, 8, "token", 96), "not a valid description"),
        ((0, 8, "token", 128, 16), "not a valid description"),
        ((0, 4, "none", 1, 32), "not a valid description"),
    ],
)
def test_descriptions_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        QuantizedModule(*values)


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("w8a16", {"activation": "token"}, "activation is 'token', expected 'auto' for the scheme w8a16"),
        ("w8a8", {"activation": "dynamic"}, "expected 'auto', 'static', or token for the scheme w8a8"),
        ("w4a8", {"weight_group": 32}, "weight_group is 32, expected None, 0 or 16"),
    ],
)
def test_options_that_do_not_fit(scheme, options, message):
    with pytest.raises(ValueError, match=message):
        QARVDConfig(scheme, **options)
