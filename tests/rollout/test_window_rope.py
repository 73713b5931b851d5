"""Positions counted inside the window, and a sink that averages: against the reference code of three families."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_prompt_switch import STRICT, replay

from qarvd_diffusers.conversion.families import FAMILIES
from qarvd_diffusers.models import KVCache, RolloutConfig
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline

LONGLIVE = dataclasses.replace(FAMILIES["longlive"].fields, rope_mode="window")
CASES = {
    "longlive/ll6_relative_rope_rollout": (LONGLIVE, (), ()),
    "longlive/ll7_relative_rope_switch_at_15": (LONGLIVE, (15,), ()),
    "rolling_variants/rf1_reward_forcing_ema_sink": (FAMILIES["reward-forcing"].fields, (), ()),
    "rolling_variants/ir1_infinity_rope_scene_cut_at_12_flush_at_18": (
        FAMILIES["infinity-rope"].fields,
        (12, 18),
        ("cut", "keep"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_golden(golden_family, case):
    fields, switches, hows = CASES[case]
    member, name = case.split("/")
    weights = golden_family("longlive")
    data, inputs = golden_family(member).file(f"{name}.safetensors"), weights.file("inputs.safetensors")
    got = replay(weights, inputs, fields, data["latents"].shape[2], switches, hows)
    if "final_sink_k_cache_block0" in data:
        sink = data["final_sink_k_cache_block0"].shape[1]
        got["final_sink_k_cache_block0"] = got["final_self_attn_k_cache_block0"][:, :sink]
    for key, expected in data.items():
        torch.testing.assert_close(got[key], expected, atol=STRICT, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


def generate(transformer, num_chunks, **fields):
    pipe = ARVDPipeline(transformer, **fields)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(1, 12, 16, generator=generator)
    latents = torch.randn(1, 4, 3 * num_chunks, 4, 6, generator=generator)
    return pipe(prompt_embeds=embeds, latents=latents, generator=generator, output_type="latent").frames


def test_equals_absolute_positions_until_the_window_is_full(tiny_pipeline):
    window = {"local_attention_frames": 9, "sink_frames": 3}
    absolute, relative = (
        generate(tiny_pipeline.transformer, 5, rope_mode=m, **window) for m in ("absolute", "window")
    )
    torch.testing.assert_close(relative[:, :, :9], absolute[:, :, :9], atol=1e-6, rtol=0)
    assert (relative[:, :, 9:] - absolute[:, :, 9:]).abs().max() > 1e-3


def test_state_and_int8_storage(tiny_pipeline):
    """A window stream survives 8-bit storage of un-roped keys and of the averaged sink."""
    pipe = ARVDPipeline(tiny_pipeline.transformer, **FAMILIES["reward-forcing"].fields.to_dict())
    pipe.set_progress_bar_config(disable=True)
    embeds, noise = torch.randn(1, 12, 16), torch.randn(1, 4, 15, 4, 6)

    def run(storage):
        generator = torch.Generator().manual_seed(3)
        return pipe(
            prompt_embeds=embeds, latents=noise, generator=generator, output_type="latent", kv_cache=storage
        ).frames

    exact, rough = run("auto"), run("int8")
    assert 0 < (exact - rough).norm() / exact.norm() < 0.05


def test_average_of_evicted_frames():
    cache = KVCache(1, local_attention_frames=3, sink_frames=1, rope_mode="window", sink_ema=0.75)
    values = torch.arange(1.0, 6.0)
    for frame, value in enumerate(values):
        start = cache.begin_pass(frame, 1, 2, (1, 4), torch.zeros(1))
        cache.layers[0].update(torch.full((1, 2, 1, 4), value), torch.full((1, 2, 1, 4), -value), start)
    key, value = cache.visible(0)
    sink = (1.0 * 0.75 + 2 * 0.25) * 0.75 + 3 * 0.25  # frames 1 and 2 left the window
    assert cache.frames == [0, 3, 4]
    torch.testing.assert_close(key[0, :, 0, 0], torch.tensor([sink, sink, 4, 4, 5, 5]))
    assert torch.equal(value, -key)


@pytest.mark.parametrize(
    "fields",
    [
        {"sink_ema": 0.9},
        {"sink_ema": 1.5, "rope_mode": "window", "sink_frames": 3, "local_attention_frames": 9},
        {"sink_ema": 0.9, "rope_mode": "window", "sink_frames": 2, "local_attention_frames": 9},
        {"sink_ema": 0.9, "rope_mode": "window", "sink_frames": 3, "local_attention_frames": 10},
    ],
)
def test_settings_that_cannot_average(fields):
    with pytest.raises(ValueError, match=r"sink_ema is .* sink_frames equals num_frames_per_chunk"):
        RolloutConfig(**fields)
    with pytest.raises(ValueError, match="rope_mode is 'slot', expected one of absolute, window"):
        RolloutConfig(rope_mode="slot")
