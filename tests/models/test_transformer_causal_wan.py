"""The causal transformer against golden data, against the stock class, and as a citizen of diffusers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from accelerate import cpu_offload
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch._dynamo.utils import counters

from qarvd_diffusers.models import CausalWanTransformer3DModel, KVCache
from qarvd_diffusers.schedulers import FewStepRenoiseScheduler

STRICT = 1e-5
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CausalWanTransformer3DModel(**CONFIG).eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 9, 4, 6, generator=generator)
    text = torch.randn(1, 5, 8, generator=generator)
    return latents, text


def assert_close(actual, expected, tolerance=STRICT):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@torch.no_grad()
def run(model, latents, text, timestep, cache=None, offset=0):
    timestep = torch.as_tensor(timestep, dtype=torch.float32).expand(latents.shape[0])
    return model(latents, timestep, text, kv_cache=cache, frame_offset=offset, return_dict=False)[0]


@torch.no_grad()
def test_golden_per_frame_timesteps(golden):
    """A4: two passes whose frames stand at different timesteps, the second attending to the first."""
    data, model, scheduler = golden.file("A4_two_calls_per_frame_timesteps.safetensors"), golden.transformer(), None
    text = golden.file("A_inputs.safetensors")["prompt_embeds"]
    cache, scheduler = KVCache(len(model.blocks)), FewStepRenoiseScheduler()
    for call in (0, 1):
        x, timestep = data[f"call{call}_x"], data[f"call{call}_timestep"]
        flow = model(x, timestep, text, kv_cache=cache, frame_offset=call * x.shape[2], return_dict=False)[0]
        assert_close(flow, data[f"call{call}_flow_pred"])
        if f"call{call}_x0_pred" in data:
            assert_close(scheduler.predict_original(flow, timestep, x), data[f"call{call}_x0_pred"])


@torch.no_grad()
def test_golden_intermediates(golden):
    """A5: what flows through the network in the first pass of chunk 1."""
    data, model = golden.file("A5_intermediates_chunk1_first_call.safetensors"), golden.transformer()
    text, rollout = (
        golden.file("A_inputs.safetensors")["prompt_embeds"],
        golden.file("A1_rollout_full_attention.safetensors"),
    )
    frames = data["call_x"].shape[2]
    cache, seen = KVCache(len(model.blocks)), {}

    def keep(name):
        return lambda module, args, output: seen.__setitem__(name, output)

    run(model, rollout["latents"][:, :, :frames], text, 0, cache)  # the refresh of chunk 0
    block = model.blocks[0]
    modules = {
        "patch_embedding_conv_out": model.patch_embedding,
        "time_sinusoid_in": model.condition_embedder.timesteps_proj,
        "time_e": model.condition_embedder.time_embedder,
        "time_e0_flat": model.condition_embedder.time_proj,
        "context_after_text_embedding": model.condition_embedder.text_embedder,
        "block0_q_rmsnormed": block.attn1.norm_q,
        "block0_k_rmsnormed": block.attn1.norm_k,
        "block0_v": block.attn1.to_v,
        "block0_self_attn_out": block.attn1,
        "block0_norm3_out": block.norm2,
        "block0_cross_attn_out": block.attn2,
        "block0_ffn_out": block.ffn,
        **{f"block{i}_out": module for i, module in enumerate(model.blocks)},
    }
    for name, module in modules.items():
        module.register_forward_hook(keep(name))
    flow = run(model, data["call_x"], text, data["call_timestep"][:, 0], cache, frames)
    assert_close(flow, data["call_flow_pred"])
    for name, output in seen.items():
        if name in data:
            assert_close(output.expand_as(data[name]), data[name])
    key, value = cache.visible(0)
    assert_close(key, data["kv_cache_block0_k_visible"])
    assert_close(value, data["kv_cache_block0_v_visible"])
    assert_close(cache.layers[0].text_key, data["crossattn_cache_block0_k"])
    assert_close(cache.layers[0].text_value, data["crossattn_cache_block0_v"])


def test_without_a_cache_equals_the_stock_forward(model, inputs):
    stock = WanTransformer3DModel(**CONFIG).eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    latents, text = inputs
    timestep = torch.tensor([833.3333])
    with torch.no_grad():
        assert torch.equal(model(latents, timestep, text)[0], stock(latents, timestep, text)[0])


def test_per_frame_timesteps_equal_per_token_ones(model, inputs):
    latents, text = inputs
    per_frame = torch.linspace(0, 900, 9)[None]
    with torch.no_grad():
        by_frame = model(latents, per_frame, text, return_dict=False)[0]
        by_token = model(latents, per_frame.repeat_interleave(6, dim=1), text, return_dict=False)[0]
    assert torch.equal(by_frame, by_token)
    with pytest.raises(ValueError, match=r"timestep has shape \(1, 5\)"):
        model(latents, torch.zeros(1, 5), text)


def test_chunks_over_a_cache_equal_one_block_causal_pass(model, inputs):
    """Truth: the stock attention over the whole video with a block-causal mask."""
    latents, text = inputs
    cache = KVCache(2)
    chunked = torch.cat([run(model, latents[:, :, i : i + 3], text, 500, cache, i) for i in (0, 3, 6)], dim=2)

    chunk = torch.arange(9).repeat_interleave(6) // 3
    mask = chunk[:, None] >= chunk[None, :]
    for block in model.blocks:
        processor = block.attn1.processor
        block.attn1.processor = lambda *args, processor=processor: processor(*args[:3], mask, *args[4:])
    model.condition_embedder.timesteps_proj.float64 = True
    with torch.no_grad():
        whole = super(CausalWanTransformer3DModel, model).forward(
            latents, torch.tensor([500.0]), text, return_dict=False
        )[0]
    assert_close(chunked, whole, 2e-6)


def test_later_passes_overwrite_and_order_is_enforced(model, inputs):
    latents, text = inputs
    once, twice = KVCache(2), KVCache(2)
    run(model, latents[:, :, :3], text, 900, twice)
    run(model, latents[:, :, :3], text, 0, twice)
    run(model, latents[:, :, :3], text, 0, once)
    assert torch.equal(once.visible(1)[0], twice.visible(1)[0])
    with pytest.raises(ValueError, match="neither follows nor repeats"):
        run(model, latents[:, :, :3], text, 0, once, 6)


def test_gradients_flow_through_the_current_chunk_only(model, inputs):
    latents, text = inputs
    cache = KVCache(2)
    run(model, latents[:, :, :3], text, 0, cache)
    chunk = latents[:, :, 3:6].clone().requires_grad_()
    for timestep in (500.0, 250.0):
        out = model(chunk, torch.tensor([timestep]), text, kv_cache=cache, frame_offset=3, return_dict=False)[0]
    with torch.no_grad():
        run(model, latents[:, :, 3:6], text, 0, cache, 3)  # overwrites the buffers before backward
    out.sum().backward()
    assert chunk.grad.abs().sum() > 0
    assert model.blocks[0].attn2.to_k.weight.grad.abs().sum() > 0


def test_rope_limit_is_named(inputs):
    model = CausalWanTransformer3DModel(**CONFIG, rope_max_seq_len=8)
    latents, text = inputs
    with pytest.raises(ValueError, match="rope_max_seq_len = 8"):
        run(model, latents[:, :, :3], text, 0, None, 6)
    with pytest.raises(ValueError, match="rope_max_seq_len = 8"):  # no re-indexing makes room for this
        run(model, latents.repeat(1, 1, 3, 1, 1)[:, :, :9], text, 0, KVCache(2), 0)


@pytest.mark.parametrize(
    ("table", "window", "sink", "storage", "shot"),
    [
        (13, 6, 3, "auto", 0),
        (13, 7, 1, "auto", 0),
        (9, 6, 0, "auto", 0),
        (12, 3, 0, "auto", 0),
        (40, -1, 0, "auto", 0),
        (13, 9, 3, "int8", 0),
        (13, 9, 3, "auto", 5),
        (13, 9, 3, "auto", 42),  # further than the table is long
    ],
)
def test_a_stream_goes_on_where_the_rope_table_ends(table, window, sink, storage, shot):
    """Exactly as under a table without end, the growing distance of the sink included."""
    torch.manual_seed(0)
    endless = CausalWanTransformer3DModel(**CONFIG).eval()
    short = CausalWanTransformer3DModel(**CONFIG, rope_max_seq_len=table).eval()
    short.load_state_dict(endless.state_dict())
    latents = torch.randn(1, 4, 60, 4, 6)
    text = torch.randn(1, 5, CONFIG["text_dim"])

    def rollout(model):
        cache = KVCache(2, window, sink, storage=storage)
        out = []
        for i in range(0, 60, 3):
            if shot and i in (18, 33):
                cache.begin_shot(shot, pin=True)
            out += [run(model, latents[:, :, i : i + 3], text, t, cache, i) for t in (900, 0)]
        return torch.stack(out), cache

    expected, _ = rollout(endless)
    got, cache = rollout(short)
    assert cache.origin > 0 and cache.frames[-1] + cache.shift - cache.origin < table
    before = 2 * (table // 3)  # passes inside the table
    assert torch.equal(got[:before], expected[:before])
    assert_close(got, expected, 2e-6 if storage == "auto" else 2e-2)


def test_upgrade_shares_parameters_and_keeps_quantization_marks():
    stock = WanTransformer3DModel(**CONFIG)
    stock.hf_quantizer, stock.is_quantized, stock.quantization_method = object(), True, "qarvd"
    model = CausalWanTransformer3DModel.from_transformer(stock)
    assert all(a is b for a, b in zip(model.parameters(), stock.parameters(), strict=True))
    assert list(model.state_dict()) == list(stock.state_dict())
    assert model.hf_quantizer is stock.hf_quantizer and model.is_quantized and model.quantization_method == "qarvd"
    assert model.config == stock.config
    assert CausalWanTransformer3DModel.from_transformer(model) is model
    with pytest.raises(TypeError, match="expected a WanTransformer3DModel"):
        CausalWanTransformer3DModel.from_transformer(torch.nn.Linear(1, 1))


def test_quantized_model_drops_dtypes_and_refuses_fusing(model):
    model.is_quantized = True
    assert model.to(torch.float16).dtype == torch.float32
    assert model.to("cpu", torch.bfloat16).dtype == torch.float32
    with pytest.raises(ValueError, match="fuse before quantizing"):
        model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="keep the adapter unfused"):
        model.fuse_lora()


def test_fused_projections_compute_the_same(model, inputs):
    latents, text = inputs
    expected = [run(model, latents[:, :, i : i + 3], text, 500, cache, i) for cache in [KVCache(2)] for i in (0, 3)]
    model.fuse_qkv_projections()
    cache = KVCache(2)
    for i, value in zip((0, 3), expected, strict=True):
        assert_close(run(model, latents[:, :, i : i + 3], text, 500, cache, i), value, 2e-6)


def test_saved_config_names_the_stock_class(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    for cls in (WanTransformer3DModel, CausalWanTransformer3DModel):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is cls
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[name])


def test_deepcopy_is_independent(model, inputs):
    latents, text = inputs
    clone = copy.deepcopy(model)
    cache, clone_cache = KVCache(2), KVCache(2)
    expected = run(model, latents[:, :, :3], text, 500, cache)
    torch.nn.init.zeros_(model.proj_out.weight)
    assert torch.equal(run(clone, latents[:, :, :3], text, 500, clone_cache), expected)


def test_foreign_cache_and_processor_are_refused(model, inputs):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    latents, text = inputs
    with pytest.raises(ValueError, match="kv_cache has 3 layers"):
        run(model, latents[:, :, :3], text, 0, KVCache(3))
    model.set_attn_processor(WanAttnProcessor())
    with pytest.raises(ValueError, match="cannot read a kv_cache"):
        run(model, latents[:, :, :3], text, 0, KVCache(2))


@pytest.mark.parametrize(("window", "storage"), [(-1, "auto"), (6, "auto"), (6, "int8")])
def test_compiled_blocks_match_eager_without_recompiling_per_chunk(model, inputs, window, storage):
    """One graph each for the first pass, the first chunk and all later ones, shared by all blocks."""
    text = inputs[1]
    latents = torch.randn(1, 4, 24, 4, 6, generator=torch.Generator().manual_seed(2))

    def rollout():
        cache = KVCache(2, window, sink_frames=0, num_frames=24, storage=storage)
        return [run(model, latents[:, :, i : i + 3], text, t, cache, i) for i in range(0, 24, 3) for t in (900, 0)]

    expected = rollout()
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for actual, value in zip(rollout(), expected, strict=True):
            assert_close(
                actual, value, 2e-6 if storage == "auto" else 2e-3
            )  # a last bit may round a code the other way
    assert counters["stats"]["unique_graphs"] <= 3


def rollout(model, inputs):
    latents, text = inputs
    cache = KVCache(2, 6, 3)
    return [run(model, latents[:, :, i : i + 3], text, t, cache, i) for i in (0, 3, 6) for t in (900, 0)]


@pytest.mark.parametrize("kind", ["sequential", "block_level", "leaf_level"])
def test_offloaded_weights_compute_the_same(model, inputs, kind):
    """The cache must survive hooks that move every argument of a forward."""
    expected = rollout(model, inputs)
    cpu = torch.device("cpu")
    if kind == "sequential":
        cpu_offload(model, cpu, offload_buffers=True)
    else:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    for actual, value in zip(rollout(model, inputs), expected, strict=True):
        assert torch.equal(actual, value)


def test_upgrade_moves_the_hooks_of_a_dispatched_model(model, inputs):
    expected = rollout(model, inputs)
    stock = WanTransformer3DModel(**CONFIG).eval()
    stock.load_state_dict(model.state_dict())
    cpu_offload(stock, torch.device("cpu"), offload_buffers=True)
    upgraded = CausalWanTransformer3DModel.from_transformer(stock)
    for actual, value in zip(rollout(upgraded, inputs), expected, strict=True):
        assert torch.equal(actual, value)


def test_attention_backend_reaches_the_processors(model, inputs):
    expected = rollout(model, inputs)
    with attention_backend("_native_math"):
        for actual, value in zip(rollout(model, inputs), expected, strict=True):
            assert_close(actual, value, 2e-6)
    model.set_attention_backend("native")
    assert {p._attention_backend for p in model.attn_processors.values()} == {AttentionBackendName.NATIVE}


def test_adapters_train_on_it(model, inputs):
    pytest.importorskip("peft", reason="pip install -e '.[test]'")
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    latents, text = inputs
    out = model(latents[:, :, :3], torch.tensor([500.0]), text, kv_cache=KVCache(2), return_dict=False)[0]
    out.sum().backward()
    assert model.blocks[0].attn1.to_k.lora_A["default"].weight.grad.abs().sum() > 0
