"""Worlds with a camera: rollouts of LingBot-World's public code, replayed through the public pipeline.

The recordings are not part of the project; `QARVD_GOLDEN_FAMILY_DIR` names a folder that has them.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from test_golden_rollouts import STRICT, RecordingPipeline

from qarvd_diffusers.calibration.calibrate import calibrate
from qarvd_diffusers.config import QARVDConfig
from qarvd_diffusers.conversion.families import FAMILIES
from qarvd_diffusers.conversion.names import to_diffusers_keys
from qarvd_diffusers.conversion.network import infer_config
from qarvd_diffusers.models.world import transformer_class
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline
from qarvd_diffusers.quantization.install import apply
from qarvd_diffusers.schedulers import IntegerRenoiseScheduler

NAMES = (
    "lb1_camera_constant_velocity",
    "lb2_camera_turns_from_frame_6",
    "lb3_camera_turns_window6_sink3",
    "lb4_static_camera_other_image_v2_timesteps",
    "lb5_other_image_same_camera_as_lb1",
    "lb6_wasd_actions",
    "lb7_v2_release_chunk4_window6_sink2",
)
RENOISE = {3: "renoise", 4: "renoise_chunk4"}


def settings(golden, name):
    """What the folder says of a scenario, and the family's fields that give its timesteps."""
    readme = golden.folder / "README.json"
    if not readme.exists():
        pytest.skip(f"{readme} is missing; set QARVD_GOLDEN_FAMILY_DIR to a full set")
    scenario = json.loads(readme.read_text())["scenarios"][name]
    own = {
        "num_frames_per_chunk": scenario["chunk"],
        "timestep_shift": scenario["shift"],
        **{key: scenario[key] for key in ("local_attention_frames", "sink_frames")},
    }
    for family in ("lingbot-world", "lingbot-world-2"):
        fields = dataclasses.replace(FAMILIES[family].fields, **own)
        steps = IntegerRenoiseScheduler(fields.denoising_timesteps, timestep_shift=fields.timestep_shift)
        if steps.timesteps.tolist() == scenario["timesteps"]:
            return scenario, fields
    pytest.fail(f"no family has the timesteps {scenario['timesteps']}")


def world_transformer(golden, actions=None):
    """The recorded weights; `actions` replaces the patch embedding of the controls."""
    tensors = golden.state_dict()
    if actions is not None:
        tensors["patch_embedding_wancamctrl.weight"] = actions
    tensors = to_diffusers_keys(tensors)
    config = infer_config(tensors, golden.original_config()["num_heads"])
    model = transformer_class(config)(**config)
    model.load_state_dict(tensors, strict=True)
    return model.eval()


class WorldPipeline(RecordingPipeline):
    """Keeps also the controls that a block got, and what it made of them."""

    def run_pass(self, *args, **kwargs):
        block, seen = self.transformer.blocks[1], {}
        hook = block.norm2.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
        flow = super().run_pass(*args, **kwargs)
        hook.remove()
        scale, shift = self.cache.injections[1][1].stored
        embedding = self.transformer.control_embedder(kwargs["controls"])
        info = self.infos[-1]
        self.parts.setdefault((info.chunk, info.role, info.step), (embedding, scale, shift, seen["x"]))
        return flow


def world_pipeline(golden, name, pipeline=WorldPipeline):
    """Return a pipeline of the recorded weights, and the arguments of its stream."""
    scenario, fields = settings(golden, name)
    inputs, stored = golden.file("inputs.safetensors"), golden.stored("inputs.safetensors")
    actions = stored["patch_embedding_wancamctrl.weight_for_actions"] if "actions" in name else None
    pipe = pipeline(world_transformer(golden, actions), **fields.to_dict())
    pipe.set_progress_bar_config(disable=True)
    noise = inputs["noise"]
    plucker = stored[scenario["camera"]].expand(-1, -1, noise.shape[2], -1, -1)
    pipe.infos, pipe.passes, pipe.parts = [], [], {}
    renoise = stored[RENOISE[scenario["chunk"]]]
    return pipe, {
        "prompt_embeds": inputs[scenario["prompt"]],
        "latents": noise,
        "renoise_latents": renoise[:, :, None].transpose(3, 4),
        "image_latents": inputs[scenario["image"]],
        "controls": plucker.split(scenario["chunk"], dim=2),
        "output_type": "latent",
        "on_pass": pipe.infos.append,
    }


def replay(golden, name):
    """Return latents, flows and caches after each chunk under the stored names."""
    pipe, arguments = world_pipeline(golden, name)
    stream = pipe.stream(**arguments)
    got, pieces = {}, []
    for chunk in stream:
        pieces.append(chunk.latents)
        stream._session.loop.refresh()
        for block in (0, 1):
            for part, tensor in zip("kv", pipe.cache.visible(block), strict=True):
                got[f"{part}_cache_block{block}_after_chunk{chunk.index}"] = tensor.clone()
    got["latents"] = torch.cat(pieces, dim=2)
    for info, (_, flow) in zip(pipe.infos, pipe.passes, strict=True):
        what = {("denoise", 0): "first_call", ("refresh", 0): "cache_refresh_t0"}.get((info.role, info.step))
        got[f"flow_pred_chunk{info.chunk}_{what}"] = flow
        if what == "first_call":
            parts = pipe.parts[info.chunk, info.role, info.step]
            for part, tensor in zip(
                ("cam_embedding", "cam_scale", "cam_shift", "x_after_injection"), parts, strict=True
            ):
                got[f"block1_{part}_chunk{info.chunk}_first_call"] = tensor
    return got


@pytest.mark.parametrize("name", NAMES)
def test_golden(golden_family, name):
    golden = golden_family("lingbot_world")
    data, got = golden.file(f"{name}.safetensors"), replay(golden, name)
    for key, expected in data.items():
        torch.testing.assert_close(got[key], expected, atol=STRICT, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


def test_a_later_turn_changes_no_earlier_frame(golden_family):
    golden = golden_family("lingbot_world")
    straight, turning = (replay(golden, name)["latents"] for name in NAMES[:2])
    assert torch.equal(straight[:, :, :6], turning[:, :, :6])
    assert (straight[:, :, 6:9] - turning[:, :, 6:9]).abs().max() > 0.01


# scheme, storage of K/V -> largest error of the latents, relative to their norm, in any of these scenarios
QUANTIZED = {("w8a8", "auto"): 0.02, ("w8a8", "int8"): 0.02, ("w4a8", "auto"): 0.08, ("w4a8", "int8"): 0.08}


def quantized_error(golden, name, scheme, storage):
    """Return the error of a quantized rollout against the recorded float one; calibrated on another camera."""
    pipe, arguments = world_pipeline(golden, name, ARVDPipeline)
    other = NAMES[2] if name == NAMES[4] else NAMES[4]
    tuned, calibration = world_pipeline(golden, other, ARVDPipeline)
    config = QARVDConfig(scheme, calibration_chunks=4, outlier_alignment=4)

    def run(on_pass):
        latents = torch.randn(calibration["latents"].shape, generator=torch.Generator().manual_seed(0))
        for _ in tuned.stream(**{**calibration, "latents": latents, "on_pass": on_pass}):
            pass

    result = calibrate(tuned.transformer, run, config)
    apply(pipe.transformer, result)
    got = torch.cat([chunk.latents for chunk in pipe.stream(**arguments, kv_cache=storage)], dim=2)
    expected = golden.file(f"{name}.safetensors")["latents"]
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "storage"), QUANTIZED)
@pytest.mark.parametrize("name", (NAMES[0], NAMES[2], NAMES[4]))
def test_quantized(golden_family, scheme, storage, name):
    assert quantized_error(golden_family("lingbot_world"), name, scheme, storage) < QUANTIZED[scheme, storage]
