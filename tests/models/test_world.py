"""A transformer with controls: its blocks against the stock ones, what runs once per chunk, the fused forward."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny_wan import CHUNKS, make_wan

from qarvd_diffusers.calibration.calibrate import calibrate
from qarvd_diffusers.config import QARVDConfig
from qarvd_diffusers.models import KVCache
from qarvd_diffusers.models.world import WorldWanTransformer3DModel
from qarvd_diffusers.quantization.install import apply
from qarvd_diffusers.rollout.pass_info import PassInfo


def world(**changes) -> WorldWanTransformer3DModel:
    config = {**make_wan().config, "in_channels": 12, "control_dim": 6, **changes}
    torch.manual_seed(5)
    return WorldWanTransformer3DModel.from_config(config).eval()


def inputs(batch=1, frames=9, size=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    shapes = (batch, 12, frames, size, size), (batch, 6, 24), (1, 384, frames, size, size)
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in shapes)


@torch.no_grad()
def roll_out(model, batch=1, storage="auto", timesteps=(700.0, 0.0)):
    """Flows of every pass over three chunks, each chunk with controls of its own, and the cache after them."""
    latents, text, controls = (tensor.to(model.device, model.dtype) for tensor in inputs(batch))
    cache, flows = KVCache(len(model.blocks), storage=storage), []
    for offset in (0, 3, 6):
        steer = controls[:, :, offset : offset + 3]
        for timestep in timesteps:
            piece, t = latents[:, :, offset : offset + 3], torch.full((batch,), timestep, device=model.device)
            flows.append(
                model(piece, t, text, kv_cache=cache, frame_offset=offset, controls=steer, return_dict=False)[0]
            )
    return torch.stack(flows), cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token", [False, True])
def test_blocks_are_the_stock_ones_but_for_the_injection(dtype, per_token):
    """With scales and shifts of zero every bit is the stock model's."""
    model = world().to(dtype)
    stock = WanTransformer3DModel.from_config(model.config).eval().to(dtype)
    state = model.state_dict()
    stock.load_state_dict({name: state[name] for name in stock.state_dict()})
    latents, text, controls = inputs(dtype=dtype)
    timestep = torch.full((1, 36) if per_token else (1,), 700.0)
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.injector.scale, block.injector.shift):
                linear.weight.zero_()
                linear.bias.zero_()
        expected = stock(latents, timestep, text, return_dict=False)[0]
        for steered in ({}, {"controls": controls}):
            assert torch.equal(model(latents, timestep, text, return_dict=False, **steered)[0], expected)
            assert all(block.injection is None for block in model.blocks)


def test_once_per_chunk():
    model, seen = world(), []
    for block in model.blocks:
        block.injector.register_forward_hook(lambda *_: seen.append(1))
    model.control_embedder.register_forward_hook(lambda *_: seen.append(0))
    flows, cache = roll_out(model, timesteps=(900.0, 700.0, 500.0, 0.0))
    assert seen == [0, 1, 1] * 3
    cache.injections = None
    again, _ = roll_out(model, timesteps=(900.0, 700.0, 500.0, 0.0))
    assert torch.equal(again, flows)
    assert cache.clone().injections is None
    assert cache.nbytes == roll_out(model)[1].nbytes
    cache.clear()
    assert cache.injections is None


def test_controls_matter_and_go_to_every_sample():
    model = world()
    flows, _ = roll_out(model, batch=2)
    one, _ = roll_out(model)
    assert flows.shape[1] == 2
    latents, text, controls = inputs()
    with torch.no_grad():
        run = [
            model(latents, torch.tensor([500.0]), text, controls=steer, return_dict=False)[0]
            for steer in (controls, controls.flip(2), None)
        ]
    assert all((run[0] - other).abs().max() > 1e-3 for other in run[1:])
    assert torch.isfinite(one).all()


@pytest.mark.parametrize(
    "shape", [(1, 448, 9, 4, 4), (1, 384, 3, 4, 4), (1, 384, 9, 8, 4), (3, 384, 9, 4, 4), (384, 9, 4, 4)]
)
def test_controls_of_another_shape(shape):
    latents, text, _ = inputs(2)
    with pytest.raises(ValueError, match=r"controls have shape .*, expected \[2 or 1, 384, 9, 4, 4\]"):
        world()(latents, torch.zeros(2), text, controls=torch.zeros(shape))


def quantized(scheme):
    model = world()
    latents, text, controls = inputs()

    def run(on_pass):
        cache = KVCache(len(model.blocks))
        for chunk in range(CHUNKS):
            part = slice(3 * chunk, 3 * chunk + 3)
            for step, timestep in enumerate((900.0, 0.0)):
                on_pass(PassInfo(chunk, "denoise" if timestep else "refresh", step, timestep, 3 * chunk, 3))
                model(
                    latents[:, :, part], torch.tensor([timestep]), text, controls=controls[:, :, part],
                    kv_cache=cache, frame_offset=3 * chunk,
                )  # fmt: skip

    config = QARVDConfig(scheme, calibration_chunks=CHUNKS, rounding="nearest", outlier_alignment=4)
    with torch.no_grad():
        apply(model, calibrate(model, run, config))
    return model


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
@pytest.mark.parametrize("storage", ["auto", "int8"])
def test_fused_forward(scheme, storage):
    model = quantized(scheme)
    assert model.fusion_refusal is None
    model.fused_pass = False
    expected, _ = roll_out(model, batch=2, storage=storage)
    model.fused_pass = True
    got, _ = roll_out(model, batch=2, storage=storage)
    assert model._fused_pass is not None
    assert (got - expected).norm() / expected.norm() < 2e-3


def test_injections_in_eight_bits():
    """With K/V in 8 bits: half a step of a token at most, and a fourth of the bytes in float32."""
    model = world()
    _, exact = roll_out(model)
    flows, coarse = roll_out(model, storage="int8")
    for full, stored in zip(exact.injections[1], coarse.injections[1], strict=True):
        assert stored.stored.dtype == torch.int8 and stored.stored.nbytes * 4 == full.stored.nbytes
        error = (stored.values(torch.float32) - full.stored).abs()
        assert (error <= full.stored.abs().amax(-1, keepdim=True) / 254 * 1.001).all()
    assert torch.isfinite(flows).all()


@pytest.mark.gpu
def test_graphs_replay_the_same_pass():
    model = quantized("w8a8").to("cuda", torch.bfloat16)
    model.fused_pass = True
    results = []
    for graphs in (False, True, True):
        roll_out(model)
        model._fused_pass.cuda_graphs = graphs
        results.append(roll_out(model)[0])
    captured = [one for one in model._fused_pass._graphs._captured.values() if one is not None]
    assert captured and all(torch.equal(result, results[0]) for result in results[1:])
