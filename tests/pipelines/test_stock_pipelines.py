"""Unmodified pipelines of diffusers that make video chunk by chunk, quantized through what they call."""

from __future__ import annotations

import pytest
import torch
from stock_models import relative_error
from stock_pipelines import STOCK_PIPELINES, StockPipeline

from qarvd_diffusers import QARVDConfig, quantize, quantized_linears

# Relative error of the pixels that is allowed; untrained models spread the error of a step to all later ones.
LIMITS = {"w8a8": 0.03, "w4a8": 0.06}


@pytest.mark.parametrize("scheme", LIMITS)
@pytest.mark.parametrize("stock", STOCK_PIPELINES, ids=[stock.name for stock in STOCK_PIPELINES])
def test_quantizes_generates_saves_and_reloads(stock: StockPipeline, scheme: str, tmp_path):
    pipe = stock.build()
    expected = stock.generate(pipe)
    quantize(pipe.transformer, stock.rollouts(pipe), QARVDConfig(scheme))
    assert quantized_linears(pipe.transformer)
    video = stock.generate(pipe)
    assert 0 < relative_error(video, expected) < LIMITS[scheme]
    pipe.save_pretrained(tmp_path)
    again = stock.load(tmp_path)
    assert type(again) is stock.cls
    assert torch.equal(stock.generate(again), video)
