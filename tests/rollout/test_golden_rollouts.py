"""Whole rollouts of the reference code, replayed through the public pipeline: family members differ in config only."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from qarvd_diffusers.conversion.families import FAMILIES
from qarvd_diffusers.models import RolloutConfig
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline
from qarvd_diffusers.schedulers import FewStepRenoiseScheduler

STRICT = 1e-5
CF = "causal_forcing_framewise"
FOUR_STEPS = (1000, 750, 500, 250)


class RecordingPipeline(ARVDPipeline):
    """Keeps every flow, its input, and the cache."""

    def make_cache(self, *args, **kwargs):
        self.cache = super().make_cache(*args, **kwargs)
        return self.cache

    def run_pass(self, latents, *args, **kwargs):
        flow = super().run_pass(latents, *args, **kwargs)
        self.passes.append((latents, flow))
        return flow


def rollout(golden, fields, inputs, *, noise, renoise, initial=None):
    """Stream everything; `(latents, {(chunk, role, step): [(input, flow), ...]}, cache)`."""
    pipe = RecordingPipeline(golden.transformer(), **fields.to_dict())
    pipe.set_progress_bar_config(disable=True)
    pipe.passes, infos = [], []
    stream = pipe.stream(
        prompt_embeds=inputs["prompt_embeds"],
        latents=noise,
        renoise_latents=renoise,
        initial_latents=initial,
        output_type="latent",
        on_pass=infos.append,
    )
    pieces = []
    for chunk in stream:
        pieces.append(chunk.latents)
        stream._session.loop.refresh()
        cache = pipe.cache.clone()  # a stream that ends empties its own
    latents = torch.cat(pieces, dim=2)
    by_role: dict = {}
    for info, recorded in zip(infos, pipe.passes, strict=True):
        by_role.setdefault((info.chunk, info.role, info.step), []).append(recorded)
    return latents, by_role, cache


def rolled(renoise, batch):
    """Stored re-noise `[chunks, steps, B * F, C, H, W]` -> `[chunks, steps, B, C, F, H, W]`."""
    return renoise.unflatten(2, (batch, -1)).transpose(3, 4)


def compare(data, result, scheduler, first_chunk=0):
    """Every stored tensor of a scenario against the replay; `first_chunk` is the stored number of our chunk 0."""
    latents, passes, cache = result
    checked = 0
    for key, expected in data.items():
        if key == "latents":
            actual = latents
        elif key == "final_self_attn_k_cache_block0":
            actual = cache.visible(0)[0]
        elif match := re.fullmatch(r"flow_pred_chunk(\d+)_(first_call|cache_refresh_t0)", key):
            role = "denoise" if match[2] == "first_call" else "refresh"
            actual = passes[int(match[1]) - first_chunk, role, 0][0][1]
        elif match := re.fullmatch(r"flow_pred_(?:initial_|chunk0_start_)\D*(\d*)_?cache_call_t0", key):
            actual = passes[-1, "context", 0][int(match[1] or 0)][1]
        elif match := re.fullmatch(r"noisy_input_chunk0_step(\d+)", key):
            actual = passes[0, "denoise", int(match[1])][0][0]
        elif match := re.fullmatch(r"x0_pred_chunk0_step(\d+)", key):
            step = int(match[1])
            sample, flow = passes[0, "denoise", step][0]
            actual = scheduler.predict_original(flow, scheduler.timesteps[step], sample)
        else:
            pytest.fail(f"{key} is not compared")
        torch.testing.assert_close(actual, expected, atol=STRICT, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
        checked += 1
    assert checked


@pytest.mark.parametrize(
    "name",
    [
        "A1_rollout_full_attention",
        "A2a_rollout_local6_sink0",
        "A2b_rollout_local9_sink3",
        "A2c_rollout_local6_sink3",
        "A3_rollout_initial_latent3",
    ],
)
def test_self_forcing(golden, name):
    data, inputs = golden.file(f"{name}.safetensors"), golden.file("A_inputs.safetensors")
    window = re.search(r"local(\d+)_sink(\d+)", name)
    stored = golden.original_config()
    steps = golden.file("B_scheduler.safetensors")["denoising_step_list_raw"].tolist()
    fields = dataclasses.replace(
        FAMILIES["self-forcing"].fields,
        denoising_timesteps=steps,
        num_frames_per_chunk=stored.get("num_frame_per_block", 3),
        independent_first_frame=stored.get("independent_first_frame", False),
        local_attention_frames=int(window[1]) if window else -1,
        sink_frames=int(window[2]) if window else 0,
    )
    initial = inputs["initial_latent"] if "initial_latent" in name else None
    generated = data["latents"].shape[2] - (0 if initial is None else initial.shape[2])
    result = rollout(
        golden,
        fields,
        inputs,
        noise=inputs["noise"][:, :, :generated],
        renoise=rolled(inputs["renoise"], len(inputs["noise"])),
        initial=initial,
    )
    compare(data, result, FewStepRenoiseScheduler(steps))


@pytest.mark.parametrize(
    "name",
    [
        "cf1_framewise_4step",
        "cf2_framewise_2step_first_chunk_4step",
        "cf3_framewise_1step_first_chunk_4step",
        "cf4_i2v_one_clean_frame_4step",
        "cf5_i2v_one_clean_frame_2step_first_chunk_4step",
        "cf6_i2v_two_clean_frames_4step",
        "cf7_framewise_4step_local3_sink1",
        "cf8_chunkwise3_independent_first_frame_t2v",
        "cf9_chunkwise3_independent_first_frame_i2v",
    ],
)
def test_causal_forcing(golden_family, name):
    golden = golden_family(CF)
    data, inputs = golden.file(f"{name}.safetensors"), golden.file("inputs.safetensors")
    steps = re.search(r"([12])step_first_chunk", name)
    fields = FAMILIES[f"causal-forcing-framewise-{steps[1]}step" if steps else "causal-forcing-framewise"].fields
    if window := re.search(r"local(\d+)_sink(\d+)", name):
        fields = dataclasses.replace(fields, local_attention_frames=int(window[1]), sink_frames=int(window[2]))
    if "chunkwise3" in name:
        fields = dataclasses.replace(FAMILIES["causal-forcing"].fields, independent_first_frame=True)
    given = sum(key.startswith("flow_pred_initial_frame") for key in data)
    batch, frames = data["latents"].shape[0], data["latents"].shape[2]
    noise = torch.cat([inputs["noise"], inputs["noise_extra_frame"]], dim=2)[:, :, : frames - given]
    renoise = list(rolled(inputs["renoise"], batch))
    if "chunkwise3" in name:
        renoise = [*(renoise[:1] if not given else []), *rolled(inputs["renoise_chunk3"], batch)]
    initial = inputs["initial_latent"][:, :, :given] if given else None
    result = rollout(golden, fields, inputs, noise=noise, renoise=renoise, initial=initial)
    scheduler = FewStepRenoiseScheduler(fields.denoising_timesteps, fields.first_chunk_timesteps)
    compare(data, result, scheduler)


@pytest.mark.parametrize("name", ["cv1_t2v_3step_shift8", "cv2_start_latents_3_frames", "cv3_warped_4step_config"])
def test_causvid(golden_family, name):
    golden = golden_family("causvid")
    data, inputs = golden.file(f"{name}.safetensors"), golden.file("inputs.safetensors")
    fields: RolloutConfig = FAMILIES["causvid"].fields
    if "warped" in name:
        fields = dataclasses.replace(fields, denoising_timesteps=FOUR_STEPS, warp_timesteps=True)
    initial = inputs["start_latents"] if "start_latents" in name else None
    # CausVid's start latents use up the noise of the chunks they replace.
    skip = 0 if initial is None else initial.shape[2]
    first = skip // fields.num_frames_per_chunk
    result = rollout(
        golden,
        fields,
        inputs,
        noise=inputs["noise"][:, :, skip : data["latents"].shape[2]],
        renoise=rolled(inputs["renoise"], len(inputs["noise"]))[first:],
        initial=initial,
    )
    compare(data, result, FewStepRenoiseScheduler(), first_chunk=first)


def test_longlive(golden_family):
    golden, name = golden_family("longlive"), "ll1_long_rollout_local12_sink3"
    data, inputs = golden.file(f"{name}.safetensors"), golden.file("inputs.safetensors")
    fields = FAMILIES["longlive"].fields
    noise = inputs["noise"][:, :, : data["latents"].shape[2]]
    result = rollout(golden, fields, inputs, noise=noise, renoise=rolled(inputs["renoise"], len(noise))[:7])
    compare(data, result, FewStepRenoiseScheduler())
