"""Memory from shapes alone, held against what the real parts occupy; choices and refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from qarvd_diffusers import ARVDPipeline, QARVDConfig
from qarvd_diffusers.cli import main
from qarvd_diffusers.memory.estimate import RESERVE, MemoryChoice, estimate
from qarvd_diffusers.memory.plan import choose, parse_budget
from qarvd_diffusers.memory.shapes import ModelShapes, live_bytes

PROMPT = "a red circle"


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    tiny_pipeline.register_to_config(local_attention_frames=12, sink_frames=3)
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def parameter_bytes(model):
    return sum(parameter.nbytes for parameter in model.parameters())


def test_live_bytes_of_a_known_computation():
    x = torch.empty(1000, device="meta")

    def run():
        y = x + 1  # 4000 bytes
        z = y * 2  # 8000: the peak
        del y
        z.add_(1)
        view = z[:10]
        del z, view
        return torch.empty(100)

    assert live_bytes(run) == (8000, 0)


@pytest.mark.parametrize("storage", ["auto", "int8"])
def test_components_are_what_the_parts_occupy(tiny_pipeline, folder, storage):
    plan = estimate(ModelShapes.read(folder), MemoryChoice(kv_cache=storage), dtype=torch.float32)
    parts = plan.components
    assert parts["transformer weights"] == parameter_bytes(tiny_pipeline.transformer)
    assert parts["VAE decoder and encoder weights"] == parameter_bytes(tiny_pipeline.vae)
    assert parts["text encoder weights"] == parameter_bytes(tiny_pipeline.text_encoder)
    caches, decoders = [], []
    make_cache, make_decoder = tiny_pipeline.make_cache, tiny_pipeline.make_decoder
    tiny_pipeline.make_cache = lambda *a, **k: caches.append(make_cache(*a, **k)) or caches[-1]
    tiny_pipeline.make_decoder = lambda: decoders.append(make_decoder()) or decoders[-1]
    stream = tiny_pipeline.stream(PROMPT, kv_cache=storage)
    for _ in range(5):
        next(stream)
    assert parts["K/V cache"] == sum(layer.key.nbytes + layer.value.nbytes for layer in caches[0].layers)
    assert parts["K/V of the prompt"] == sum(x.text_key.nbytes + x.text_value.nbytes for x in caches[0].layers)
    memory = sum(tensor.nbytes for tensor in decoders[-1].state_dict().values())
    assert memory <= parts["VAE memory of earlier frames"] <= 1.02 * memory
    assert parts["VAE decoding"] > 0 and plan.allocated == max(plan.phases.values())


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w4a16"])
def test_quantized_weights(tiny_pipeline, folder, tmp_path, scheme):
    shapes = ModelShapes.read(folder)
    expected = estimate(shapes, MemoryChoice(scheme=scheme), dtype=torch.float32).components["transformer weights"]
    tiny_pipeline.quantize(QARVDConfig(scheme, outlier_detector="none", rounding="nearest"))
    assert parameter_bytes(tiny_pipeline.transformer) == pytest.approx(expected, rel=2e-3)
    tiny_pipeline.save_pretrained(tmp_path / "quantized")
    stored = ModelShapes.read(tmp_path / "quantized")
    assert stored.quantization.scheme == scheme
    assert estimate(stored, MemoryChoice(), dtype=torch.float32).components["transformer weights"] == expected


WAN = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "patch_size": [1, 2, 2],
    "cross_attn_norm": True,
}


def real_shapes(name="1.3B", **index):
    """Wan2.1-T2V-1.3B with umt5-xxl."""
    encoder = {"model_type": "umt5", "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
    encoder |= {"vocab_size": 256384, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    index = {"height": 480, "width": 832, "max_sequence_length": 512, **index}
    return ModelShapes(name, index, WAN, {"base_dim": 96, "z_dim": 16}, encoder)


def test_presets_at_the_1_3b_shape():
    """Known sizes: 6.04 GB of K/V in bfloat16 over 21 frames, 11.4 GB of text encoder."""
    shapes = real_shapes()
    plans = {memory: choose(shapes, memory) for memory in ("8GB", "12GB", "16GB", "max")}
    for memory, plan in plans.items():
        assert plan.fits and (memory == "max" or plan.total <= float(memory[:-2]) * 1e9)
    most = plans["max"]
    assert most.choice == MemoryChoice()
    assert most.components["K/V cache"] == pytest.approx(6.04e9, rel=0.01)
    assert most.components["text encoder weights"] == pytest.approx(11.4e9, rel=0.02)
    assert most.components["transformer weights"] == pytest.approx(2.9e9, rel=0.03)
    assert plans["8GB"].choice.kv_cache == "int8" and plans["8GB"].choice.scheme == "w8a8_dynamic"
    assert plans["16GB"].choice.kv_cache == "auto" and plans["16GB"].choice.window == 21
    with pytest.raises(ValueError, match=r"1.3B does not fit into 4GB: .*needs [5-7]\.\d GB"):
        choose(shapes, "4GB")


@pytest.mark.parametrize(("layers", "heads", "gigabytes"), [(30, 12, 0.86), (40, 40, 3.8)])
def test_controls_of_a_world(layers, heads, gigabytes):
    """Scales and shifts of every block for a chunk of 3 frames, in bfloat16, and half of it beside an 8-bit cache."""
    plain = real_shapes()
    config = {**WAN, "num_layers": layers, "num_attention_heads": heads, "in_channels": 36}
    world = dataclasses.replace(plain, transformer={**config, "control_dim": 6})
    parts = estimate(world, MemoryChoice("w8a8")).components
    assert parts["controls of a chunk"] == pytest.approx(gigabytes * 1e9, rel=0.02)
    assert estimate(world, MemoryChoice("w8a8", "int8")).components["controls of a chunk"] * 2 == pytest.approx(
        parts["controls of a chunk"]
    )
    assert "controls of a chunk" not in estimate(plain, MemoryChoice("w8a8")).components
    without = dataclasses.replace(plain, transformer=config)
    added = parts["transformer weights"] - estimate(without, MemoryChoice("w8a8")).components["transformer weights"]
    width = 128 * heads
    linears = 4 * layers + 2
    assert added == 2 * (linears * (width * width + width) + 384 * 4 * width + width)  # injectors stay in bfloat16
    assert parts["VAE decoding"] == estimate(plain, MemoryChoice("w8a8")).components["VAE decoding"]


def test_a_preset_sets_the_pipeline_up(folder):
    plan = choose(ModelShapes.read(folder), "max", dtype=torch.float32)
    pipe = ARVDPipeline.from_pretrained(folder, memory="max")
    assert pipe.kv_cache == "auto" and pipe.window is None and pipe.text_encoder_offload == "keep"
    budget = f"{(plan.total - 1000) / 1e9:.9f}GB"
    pipe = ARVDPipeline.from_pretrained(folder, memory=budget)
    assert pipe.text_encoder_offload == "cpu"
    assert pipe(PROMPT, num_chunks=1).frames.shape == (1, 9, 32, 48, 3)
    with pytest.raises(ValueError, match=r"does not fit into 0\.4GB"):
        ARVDPipeline.from_pretrained(folder, memory="0.4GB")
    with pytest.raises(ValueError, match="memory is '8 gigs', expected a size such as"):
        ARVDPipeline.from_pretrained(folder, memory="8 gigs")
    assert parse_budget("8GB") == 8_000_000_000 and parse_budget("max") is None and RESERVE > 0


@pytest.mark.gpu
def test_a_preset_on_cuda_computes_the_same(folder):
    plain = ARVDPipeline.from_pretrained(folder, dtype=torch.float32).to("cuda")
    budget = f"{(choose(ModelShapes.read(folder), 'max', dtype=torch.float32).total - 1000) / 1e9:.9f}GB"
    preset = ARVDPipeline.from_pretrained(folder, memory=budget, dtype=torch.float32)
    assert preset.text_encoder.device.type == "cpu" and preset.transformer.device.type == "cuda"
    frames = [
        pipe(PROMPT, num_chunks=3, generator=torch.Generator().manual_seed(0), output_type="pt").frames
        for pipe in (plain, preset)
    ]
    torch.testing.assert_close(*frames, atol=1e-3, rtol=0)


def test_a_window_at_run_time(tiny_pipeline):
    tiny_pipeline.register_to_config(local_attention_frames=12, sink_frames=3)
    expected = tiny_pipeline(PROMPT, num_chunks=4, generator=torch.Generator().manual_seed(0), output_type="latent")
    tiny_pipeline.window = 6
    got = tiny_pipeline(PROMPT, num_chunks=4, generator=torch.Generator().manual_seed(0), output_type="latent")
    assert torch.equal(got.frames[:, :, :6], expected.frames[:, :, :6])
    assert not torch.allclose(got.frames[:, :, 6:], expected.frames[:, :, 6:])
    assert tiny_pipeline.config.local_attention_frames == 12
    tiny_pipeline.window = 5
    with pytest.raises(ValueError, match=r"local_attention_frames is 5, expected -1 \(all\) or at least sink_frames"):
        tiny_pipeline.stream(PROMPT)


def test_plan_command(folder, capsys):
    assert main(["plan", str(folder), "--vram", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["choice"]["kv_cache"] == "auto" and report["total_bytes"] < 8e9
    assert main(["plan", str(folder)]) == 0
    assert "peak while" in capsys.readouterr().out
    assert main(["plan", str(folder), "--vram", "0.1"]) == 1
    assert "does not fit into 0.1GB" in capsys.readouterr().err
