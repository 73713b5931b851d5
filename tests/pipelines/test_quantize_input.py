"""What `quantize` says to rollouts and models that it cannot use, and that it changes nothing then."""

from __future__ import annotations

import pytest
import torch
from stock_pipelines import STOCK_PIPELINES

from qarvd_diffusers import QARVDConfig, quantize


def _blocks(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _hooks(model: torch.nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__
    ]


@pytest.fixture(scope="module")
def wan():
    stock = next(stock for stock in STOCK_PIPELINES if stock.name == "WanPipeline")
    return stock, stock.build()


def _stops_in_the_middle(stock, pipe):
    calls = []

    def interrupt(module, args):
        calls.append(module)
        if len(calls) == 2:
            raise KeyError("the disk of the user is full")

    def rollout():
        with pipe.transformer.blocks[1].register_forward_pre_hook(interrupt):
            stock.generate(pipe, output_type="latent")

    return rollout


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda stock, pipe: lambda: None, ValueError, ["rollout", "WanTransformer3DModel"]),
        (lambda stock, pipe: lambda: stock.generate(stock.build()), ValueError, ["rollout", "WanTransformer3DModel"]),
        (_stops_in_the_middle, KeyError, ["the disk of the user is full"]),
    ],
    ids=["never calls it", "calls another one", "raises in the middle"],
)
def test_a_bad_rollout_leaves_the_transformer_as_it_was(wan, make, error, words):
    stock, pipe = wan
    before = _blocks(pipe.transformer)
    with pytest.raises(error) as raised:
        quantize(pipe.transformer, [make(stock, pipe)], QARVDConfig("w8a8"))
    assert all(word in str(raised.value) for word in words), raised.value
    after = pipe.transformer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not _hooks(pipe.transformer)
    assert "quantization_config" not in pipe.transformer.config


class _Untimed(torch.nn.Module):
    """A model whose passes say nothing about time."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(64, 64)) for _ in range(2)])

    def forward(self, hidden_states):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class _NoBlocks(torch.nn.Module):
    """A model in which nothing repeats."""

    def __init__(self):
        super().__init__()
        self.into, self.out = torch.nn.Linear(64, 32), torch.nn.Linear(32, 64)

    def forward(self, hidden_states, timestep):
        return self.out(self.into(hidden_states))


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (_Untimed(), {}, ["timestep", "pass_info"]),
        (_NoBlocks(), {"timestep": torch.ones(1)}, ["repeated", "_NoBlocks"]),
    ],
    ids=["no timestep", "no repeated blocks"],
)
def test_a_model_that_cannot_be_read_is_named(model, inputs, words):
    before = _blocks(model)
    with pytest.raises(ValueError) as raised:
        quantize(model, [lambda: model(torch.randn(8, 64), **inputs)], QARVDConfig("w8a8"))
    assert all(word in str(raised.value) for word in words), raised.value
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not _hooks(model)
