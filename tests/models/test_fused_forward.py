"""The fused pass computes what the quantized model computes, layer by layer, from the same weights."""

from __future__ import annotations

import copy
import dataclasses
import weakref

import accelerate
import pytest
import torch
from tiny_wan import CHUNKS, make_run, make_wan
from torch import nn

from qarvd_diffusers.bench.shapes import SHAPES, Shape, random_transformer
from qarvd_diffusers.bench.transformer import PassRunner
from qarvd_diffusers.bench.transformer import quantized as quantized_by_one_pass
from qarvd_diffusers.calibration.calibrate import calibrate
from qarvd_diffusers.config import QARVDConfig
from qarvd_diffusers.conversion.families import FAMILIES
from qarvd_diffusers.models import CausalWanTransformer3DModel, KVCache
from qarvd_diffusers.models.fused.cuda_graphs import CapturedSegments, CaptureError
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline
from qarvd_diffusers.quantization.install import apply
from qarvd_diffusers.quantization.linear import QARVDLinear


def quantized(scheme="w8a8", **changes):
    model = CausalWanTransformer3DModel.from_transformer(make_wan())
    config = QARVDConfig(scheme, calibration_chunks=CHUNKS, rounding="nearest", outlier_alignment=4, **changes)
    apply(model, calibrate(model, make_run(model), config))
    return model


def inputs(batch=1, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 9, 4, 4, generator=g), torch.randn(batch, 6, 24, generator=g)


@torch.no_grad()
def roll_out(model, fused, batch=1, timesteps=(700.0, 0.0), **cache):
    """Flows of every pass over three chunks, and the cache behind them."""
    latents, text = inputs(batch)
    model.fused_pass = fused
    kv_cache, flows = KVCache(len(model.blocks), **cache), []
    for offset in (0, 3, 6):
        for timestep in timesteps:
            t = torch.as_tensor(timestep, dtype=torch.float32)
            t = t.expand(batch) if t.ndim == 0 else t.expand(batch, 3)
            piece = latents[:, :, offset : offset + 3]
            flows.append(model(piece, t, text, kv_cache=kv_cache, frame_offset=offset, return_dict=False)[0])
    return torch.stack(flows), kv_cache


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# Both ways quantize the same numbers up to float32 rounding; now and then one rounds to the neighbouring code.
TOLERANCE = 2e-3


@pytest.mark.parametrize(
    ("scheme", "changes"),
    [
        ("w8a8", {}),
        ("w4a8", {}),
        ("w8a8", {"tie_inputs": False}),
        ("w8a8", {"outlier_detector": "none"}),
        ("w8a8", {"reference_compat": True}),  # asymmetric 8-bit weights: row sums
        ("w4a8", {"module_bits": {"ffn.net.2": 8, "blocks.1.attn2": 8}}),
        ("w8a8", {"activation": "static"}),
        ("w4a8", {"activation": "static", "weight_group": 0}),
        ("w4a8", {"weight_group": 0}),
        ("w8a8_dynamic", {}),
        ("w4a8_dynamic", {}),
    ],
)
def test_equals_the_model_layer_by_layer(scheme, changes):
    model = quantized(scheme, **changes)
    expected, stored = roll_out(model, fused=False)
    got, stored_fused = roll_out(model, fused=True)
    assert got.shape == expected.shape
    assert relative(got, expected) < TOLERANCE
    for layer in range(2):
        for mine, theirs in zip(stored_fused.visible(layer), stored.visible(layer), strict=True):
            assert relative(mine, theirs) < TOLERANCE


def test_is_closer_to_the_layers_than_they_are_to_float():
    """The tolerance above means something: quantization itself moves the flow by much more."""
    model = quantized("w8a8", activation="static")
    expected, _ = roll_out(model, fused=False)
    float_flow, _ = roll_out(CausalWanTransformer3DModel.from_transformer(make_wan()), fused=False)
    assert relative(expected, float_flow) > 2 * TOLERANCE


def test_batches_and_timesteps_per_frame():
    model = quantized()
    for timesteps in ((700.0,), ((700.0, 500.0, 20.0),)):
        expected, _ = roll_out(model, False, batch=2, timesteps=timesteps)
        got, _ = roll_out(model, True, batch=2, timesteps=timesteps)
        assert relative(got, expected) < TOLERANCE


def test_moved_weights_are_given_up_at_once():
    model = quantized()
    expected, _ = roll_out(model, True)
    held = weakref.ref(model._fused_pass)
    model.to("cpu")  # moves nothing
    assert held() is not None
    model._apply(torch.clone)  # as a move to another device does
    assert held() is None
    assert torch.equal(roll_out(model, True)[0], expected)


def test_window_with_sink():
    model = quantized()
    expected, _ = roll_out(model, False, local_attention_frames=6, sink_frames=3)
    got, _ = roll_out(model, True, local_attention_frames=6, sink_frames=3)
    assert relative(got, expected) < TOLERANCE


@pytest.mark.parametrize("family", ("krea", "longlive-2"))
@pytest.mark.parametrize("storage", ("auto", "int8"))
def test_whole_roll_outs(tiny_pipeline, family, storage):
    """A rebuilt context, a shot's offset, a clamped start: what the pipeline does to the cache, the fused pass
    follows.
    """
    changes = {"num_frames_per_chunk": 3, "local_attention_frames": 9, "sink_frames": 0, "keep_first_frame": True}
    fields = dataclasses.replace(FAMILIES[family].fields, **changes)
    pipe = ARVDPipeline(**{**tiny_pipeline.components, "scheduler": None}, **fields.to_dict(), height=32, width=48)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = quantized()
    width = pipe.transformer.config.text_dim
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 1, 6, width, generator=g)
    noise, start = torch.randn(1, 4, 15, 4, 6, generator=g), torch.randn(1, 4, 1, 4, 6, generator=g)

    def roll_out(fused):
        pipe.transformer.fused_pass = fused
        stream = pipe.stream(
            prompt_embeds=first,
            latents=noise,
            initial_latents=start if fields.clamped_start else None,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
            kv_cache=storage,
        )
        pieces = [next(stream).latents]
        stream.set_prompt(prompt_embeds=second, on_prompt_switch="cut")
        return torch.cat([*pieces, *(chunk.latents for chunk in stream)], dim=2)

    assert relative(roll_out(True), roll_out(False)) < (0.05 if storage == "int8" else 5 * TOLERANCE)


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("storage", ("int8", "fp8"))
def test_eight_bit_cache(storage, batch):
    """The fused pass also reads the current chunk in 8 bits; the layers read it as it is."""
    model = quantized()
    expected, stored = roll_out(model, False, batch, storage=storage)
    got, stored_fused = roll_out(model, True, batch, storage=storage)
    assert stored_fused.layers[0].key_scale.shape[0] == batch
    assert stored_fused.layers[0].key.dtype.itemsize == 1
    assert relative(got, expected) < 0.05
    key, key_fused = stored.visible(0)[0], stored_fused.visible(0)[0]
    assert relative(key_fused, key) < 0.05


def test_values_with_tokens_innermost_change_nothing(monkeypatch):
    model = quantized()
    expected, stored = roll_out(model, True, storage="fp8", local_attention_frames=6)
    monkeypatch.setattr("qarvd_kernels.tokens_innermost", lambda *_: True)
    got, other = roll_out(model, True, storage="fp8", local_attention_frames=6)
    assert other.layers[0].value.stride(1) == 1 != stored.layers[0].value.stride(1)
    assert relative(got, expected) < TOLERANCE
    for plain, innermost in zip(stored.visible(0), other.visible(0), strict=True):
        assert relative(innermost, plain) < TOLERANCE


@torch.no_grad()
def test_cache_only_stores_the_same():
    model = quantized()
    model.fused_pass = True
    latents, text = inputs()
    caches = [KVCache(len(model.blocks)) for _ in range(2)]
    for cache, cache_only in zip(caches, (False, True), strict=True):
        flow = model(
            latents[:, :, :3], torch.zeros(1), text, kv_cache=cache, cache_only=cache_only, return_dict=False
        )[0]
        assert (flow is None) == cache_only
    for layer in range(2):
        for full, only in zip(caches[0].visible(layer), caches[1].visible(layer), strict=True):
            assert torch.equal(full, only)


def test_leaves_the_state_dict_as_it_was():
    model = quantized()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight = model.blocks[0].ffn.net[0].proj.weight.clone()
    roll_out(model, fused=True)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model.blocks[0].ffn.net[0].proj.weight, weight)


def test_copies_and_moved_weights_are_laid_out_anew():
    model = quantized()
    expected, _ = roll_out(model, fused=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].ffn.net[2].weight_scale.mul_(2)
        twin.load_state_dict(twin.state_dict())
    changed, _ = roll_out(twin, fused=True)
    assert relative(changed, expected) > 0.01
    again, _ = roll_out(model, fused=True)
    assert torch.equal(again, expected)
    assert relative(roll_out(model.to(torch.float64).to(torch.float32), fused=True)[0], expected) < TOLERANCE


def test_weights_are_held_once():
    """Fused q, k and v are views of one tensor, and no packed weight exists beside the parameters."""
    model = quantized()
    roll_out(model, fused=True)
    attn = model.blocks[0].attn1
    parts = [layer.weight_packed for layer in (attn.to_q, attn.to_k, attn.to_v)]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert parts[0].untyped_storage().nbytes() == sum(part.nbytes for part in parts)


def test_refusals_say_why():
    model = quantized()
    assert model.fusion_refusal is None
    handle = model.blocks[0].register_forward_hook(lambda *args: None)
    assert "hook" in model.fusion_refusal
    handle.remove()
    model.blocks[1].ffn.net[2] = nn.Linear(64, 32)
    assert "Linear" in model.fusion_refusal
    assert "dynamic activations" in quantized("w8a8_dynamic", activation="dynamic").fusion_refusal
    assert "training mode" in quantized().train().fusion_refusal


def test_refused_models_still_run():
    model = quantized("w8a8_dynamic", activation="dynamic")
    assert torch.equal(roll_out(model, fused=True)[0], roll_out(model, fused=False)[0])


def test_a_layer_that_could_overflow_runs_layer_by_layer(caplog):
    model = quantized()
    layer = next(m for m in model.blocks[1].modules() if isinstance(m, QARVDLinear) and m.num_outliers > 0)
    with torch.no_grad():
        layer.weight_scale[:, 0] = 1e6 * layer.weight_scale[:, 1]
    expected, _ = roll_out(model, fused=False)
    with caplog.at_level("WARNING"):
        got, _ = roll_out(model, fused=True)
    assert "in block 1" in caplog.text and "integer sum" in caplog.text
    assert torch.equal(got, expected)


def test_rows_in_another_order_change_nothing():
    model = quantized()
    layer: QARVDLinear = model.blocks[0].attn1.to_q
    x = torch.randn(5, layer.in_features)
    expected, state = layer(x), copy.deepcopy(layer.state_dict())
    order = torch.randperm(layer.out_features).to(torch.int32)
    stored = layer.weight_packed.clone()
    layer.store_rows_in(order)
    assert torch.equal(layer.weight_packed, stored[order.long()])
    assert torch.equal(layer(x), expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in layer.state_dict().items())
    layer.store_rows_in(order.flip(0))
    layer.load_state_dict(state)
    assert torch.equal(layer.weight_packed, stored) and torch.equal(layer(x), expected)


def test_weights_put_back_as_they_were_before_a_fused_pass_are_read_right():
    """As ComfyUI does it: it keeps parameters and buffers, sets copies in their place, and later sets the kept ones
    again.
    """
    model = quantized()
    expected, state = roll_out(model, True)[0], copy.deepcopy(model.state_dict())
    layers = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    for _ in range(2):
        for module, parameters, buffers in layers:
            for name, kept in parameters.items():
                if kept is not None:
                    setattr(module, name, nn.Parameter(kept.clone(), requires_grad=False))
            for name, kept in buffers.items():
                module.register_buffer(name, kept.clone(), persistent=name not in module._non_persistent_buffers_set)
        assert torch.equal(roll_out(model, True)[0], expected)
        for module, parameters, buffers in layers:
            for name, kept in {**parameters, **buffers}.items():
                setattr(module, name, kept)
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert relative(roll_out(model, False)[0], expected) < TOLERANCE


def test_offloading_after_a_fused_pass_reads_the_rows_in_the_order_it_stores():
    """accelerate takes the weights out of the state dict, and puts them back layer by layer."""
    model = quantized()
    expected, _ = roll_out(model, True)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert relative(roll_out(model, False)[0], expected) < TOLERANCE


REPLACED = (
    "attn2.to_out.0.bias",
    "ffn.net.0.proj.weight_scale",
    "scale_shift_table",
    "norm2.weight",
    "attn1.norm_k.weight",
)


@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_parameter_is_noticed(name):
    """Everything that a fused pass computed from parameters is computed anew."""
    model = quantized()
    before, _ = roll_out(model, True)
    owner, _, leaf = name.rpartition(".")
    owner = model.blocks[1].get_submodule(owner)
    setattr(owner, leaf, nn.Parameter(2 * getattr(owner, leaf).detach(), requires_grad=False))
    got, want = (roll_out(model, fused)[0] for fused in (True, False))
    assert relative(got, want) < TOLERANCE < relative(before, want)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ("w8a8", "w4a8", "w8a16"))
def test_group_offload_on_a_stream(scheme):
    """Weights laid out for fused kernels leave the GPU between passes; the flow is that of layer by layer."""
    device, shape = torch.device("cuda"), SHAPES["toy"]
    model = quantized_by_one_pass(random_transformer(shape, device, torch.bfloat16), shape, scheme)
    runner = PassRunner(model, shape)  # inputs on the GPU
    runner(0)
    model.fused_pass = False
    runner.reset()
    expected = [runner(chunk) for chunk in range(2)]
    model.fused_pass = None
    model.to("cpu")
    offload = {"onload_device": device, "offload_device": torch.device("cpu"), "offload_type": "block_level"}
    model.enable_group_offload(**offload, num_blocks_per_group=1, use_stream=True, record_stream=True)
    runner.reset()
    for chunk, flow in enumerate(expected):
        assert torch.equal(runner(chunk), flow)
    assert model.blocks[0].attn1.to_q.weight_packed.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ("w8a8", "w4a8"))
@pytest.mark.parametrize("storage", ("auto", "fp8", "int8"))
def test_on_the_gpu(scheme, storage):
    """Compiled kernels against the layer-by-layer model, in the dtype that users run."""
    device, shape = torch.device("cuda"), SHAPES["toy"]
    model = quantized_by_one_pass(random_transformer(shape, device, torch.bfloat16), shape, scheme)
    flows = []
    for fused in (False, True):
        model.fused_pass = fused
        runner = PassRunner(model, shape, storage)
        flows.append(torch.stack([runner(chunk) for chunk in range(3)]).float())
    assert relative(flows[1], flows[0]) < (0.02 if storage == "auto" else 0.06)


def wide_model(scheme="w8a8"):
    """Two heads and three blocks on the GPU: sizes that every compiled kernel takes."""
    shape = Shape(heads=2, ffn=512, layers=3)
    return quantized_by_one_pass(random_transformer(shape, torch.device("cuda"), torch.bfloat16), shape, scheme), shape


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ("w8a8", "w4a8"))
@pytest.mark.parametrize("storage", ("auto", "fp8"))
def test_graphs_replay_the_same_pass(scheme, storage):
    """Bit by bit, at every chunk, after a new stream, another prompt and a pass that only stores."""
    model, shape = wide_model(scheme)
    model.fused_pass = True
    runs = []
    for graphs in (False, True):
        runner, flows = PassRunner(model, shape, storage), []
        flows.append(runner(0).clone())
        model._fused_pass.cuda_graphs = graphs
        for chunk in (0, 1, 1, 2):
            flows.append(runner(chunk).clone())
            runner(chunk, cache_only=True)
        runner._text = runner._text.flip(1)
        runner._cache.reset_text()
        flows.append(runner(2).clone())
        runner.reset()
        flows.append(runner(0).clone())
        runs.append(torch.stack(flows))
    assert torch.isfinite(runs[0]).all()
    assert torch.equal(*runs)
    captured = [one for one in model._fused_pass._graphs._captured.values() if one is not None]
    assert len(captured) == 1 and len(captured[0]._graphs) == shape.layers + 1
    assert not torch.equal(runs[0][-2], runs[0][-3])  # the prompt matters


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_segment_that_cannot_be_captured_runs_without_a_graph(monkeypatch, caplog):
    model, shape = wide_model()
    model.fused_pass = True
    runner = PassRunner(model, shape)
    expected = runner(0).clone()

    def refuse(self, index):
        raise CaptureError("no room")

    monkeypatch.setattr(CapturedSegments, "_capture", refuse)
    assert torch.equal(runner(0), expected)
    assert "kernel by kernel" in caplog.text and "no room" in caplog.text
    assert torch.equal(runner(0), expected)
