"""The video transformers of diffusers, quantized without data and stored."""

from __future__ import annotations

import pytest
import torch
from stock_models import STOCK_MODELS, StockModel, aligned, relative_error
from torch import nn

from qarvd_diffusers import QARVDConfig, quantize, quantized_linears

ALL = pytest.mark.parametrize("stock", STOCK_MODELS, ids=[stock.name for stock in STOCK_MODELS])

# Relative errors of the output that are allowed; SANA-WM, whose linear attention adds up errors, is the nearest.
DATA_FREE_LIMIT, CALIBRATED_LIMIT = 0.015, 0.02
# A small error before the router of experts sends a token or two of the 16 elsewhere, which is a jump of 0.05 to 0.1.
JUMPS = {"NucleusMoEImageTransformer2DModel": 0.15}


def load(stock: StockModel, folder, **arguments) -> nn.Module:
    return aligned(stock.cls.from_pretrained(folder, **arguments)).eval()


@ALL
def test_quantizes_without_data_and_reloads_bit_for_bit(stock, tmp_path):
    float_model = stock.build()
    float_model.save_pretrained(tmp_path / "float")
    model = load(stock, tmp_path / "float", quantization_config=QARVDConfig("w8a8_dynamic"))
    assert quantized_linears(model)
    output = stock.run(model)
    assert relative_error(output, stock.run(float_model)) < JUMPS.get(stock.name, DATA_FREE_LIMIT)
    model.save_pretrained(tmp_path / "quantized")
    again = load(stock, tmp_path / "quantized")
    assert type(again) is stock.cls
    assert torch.equal(stock.run(again), output)


@ALL
def test_a_quantized_model_keeps_its_dtype(stock, tmp_path):
    stock.build().save_pretrained(tmp_path / "float")
    dtypes = []
    for config in (None, QARVDConfig("w8a8_dynamic")):
        model = stock.cls.from_pretrained(tmp_path / "float", torch_dtype=torch.bfloat16, quantization_config=config)
        dtypes.append(model.dtype)
    assert dtypes[1] == dtypes[0]
    model.save_pretrained(tmp_path / "quantized")
    assert stock.cls.from_pretrained(tmp_path / "quantized", torch_dtype=torch.bfloat16).dtype == dtypes[0]


@ALL
def test_calibrates_without_settings_and_reloads_bit_for_bit(stock, tmp_path):
    model = stock.build()
    expected = stock.run(model, seed=9)
    timesteps = (1000.0, 750.0, 500.0, 250.0) * 2  # of two chunks

    def rollout(seed: int) -> None:
        for timestep in timesteps:
            stock.run(model, timestep, seed)

    quantize(model, [lambda seed=seed: rollout(seed) for seed in range(4)], QARVDConfig("w8a8"))
    output = stock.run(model, seed=9)
    assert relative_error(output, expected) < JUMPS.get(stock.name, CALIBRATED_LIMIT)
    model.save_pretrained(tmp_path)
    assert torch.equal(stock.run(load(stock, tmp_path), seed=9), output)
