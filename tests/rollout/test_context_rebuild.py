"""A context that is encoded anew before every chunk: replayed against the reference code of Krea Realtime."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKLWan

from qarvd_diffusers.config import QARVDConfig
from qarvd_diffusers.conversion.families import FAMILIES
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline
from qarvd_diffusers.vae.streaming import StreamingVAEDecoder

STRICT = 1e-5
FIELDS = FAMILIES["krea"].fields
NAMES = (
    "kr1_default_kv3_reencoded_first_frame",
    "kr2_kv6_keep_first_frame",
    "kr3_kv3_keep_first_4steps_prompt_interpolation",
    "kr4_kv6_reencoded_first_frame",
    "kr5_resume_latents_3_frames",
    "kr6_video_to_video_strength_0p6",
)


class RecordingPipeline(ARVDPipeline):
    """Keeps first flows and rebuilt keys; gives the stored latents of re-encoded frames."""

    def make_cache(self, *args, **kwargs):
        self.cache = super().make_cache(*args, **kwargs)
        return self.cache

    def run_pass(self, *args, **kwargs):
        flow = super().run_pass(*args, **kwargs)
        info = self.infos[-1]
        if info.role == "denoise" and info.step == 0:
            self.found[f"flow_pred_chunk{info.chunk}_first_call"] = flow
        if info.role == "rebuild":
            self.found[f"recompute_before_chunk{info.chunk}_k_cache_block0"] = self.cache.visible(0)[0].clone()
        return flow

    def encode_frames(self, pixels):
        assert pixels.shape[2] == 1
        return next(self.reencoded)[None]


def wan_vae():
    """Wan's VAE, 16 latent channels, narrow."""
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def steps_of(name):
    """As the reference makes them: whole positions, falling evenly from the strength to 0."""
    strength, count = (600, 5) if "strength_0p6" in name else (1000, 4 if "4steps" in name else 5)
    return tuple(int(step) for step in torch.linspace(strength, 0, count))


@pytest.mark.parametrize("name", NAMES)
def test_golden(golden_family, tiny_pipeline, name):
    golden = golden_family("krea_realtime")
    data, inputs = golden.file(f"{name}.safetensors"), golden.file("inputs.safetensors")
    context = 6 if "kv6" in name else 3
    fields = dataclasses.replace(
        FIELDS,
        denoising_timesteps=steps_of(name),
        local_attention_frames=context + 3,
        keep_first_frame=not name.startswith(("kr1", "kr4")),
    )
    pipe = RecordingPipeline(golden.transformer(), vae=wan_vae(), **fields.to_dict())
    pipe.set_progress_bar_config(disable=True)
    pipe.infos, pipe.found = [], {}
    # Stored as channels first, unlike every other video: what the VAE gives.
    pipe.reencoded = iter(golden.stored("inputs.safetensors")["reencoded_first_frame"])
    initial = inputs["resume_latents"] if "resume" in name else None
    given = 0 if initial is None else initial.shape[2]
    noise = inputs["noise"][:, :, given : data["latents"].shape[2]]
    if "video_to_video" in name:
        level = pipe.scheduler.timesteps[0] / 1000
        noise = (inputs["input_video_latents"] * (1 - level) + inputs["v2v_noise"] * level)[:, :, : noise.shape[2]]
    stream = pipe.stream(
        prompt_embeds=inputs["prompt_embeds"],
        latents=noise,
        renoise_latents=inputs["renoise"].unflatten(2, (1, -1)).transpose(3, 4),
        initial_latents=initial,
        output_type="latent",
        on_pass=pipe.infos.append,
    )
    pieces = []
    for chunk in range((data["latents"].shape[2]) // 3):
        if "interpolation" in name and chunk == 2:  # the reference's four steps begin with the old prompt
            stream.set_prompt(prompt_embeds=inputs["prompt_embeds_b"], over_chunks=3)
        pieces.append(next(stream).latents)
    assert next(stream, None) is None
    pipe.found["latents"] = torch.cat(pieces, dim=2)
    for key, expected in data.items():
        torch.testing.assert_close(
            pipe.found[key], expected, atol=STRICT, rtol=0, msg=lambda m, key=key: f"{key}: {m}"
        )
    roles = [(info.role, info.num_frames) for info in pipe.infos if info.chunk == 2]
    assert roles == [("rebuild", 3)] * (context // 3) + [("denoise", 3)] * len(fields.denoising_timesteps)


@pytest.fixture
def krea(tiny_pipeline):
    """A tiny pipeline that rolls out as Krea Realtime does."""
    pipe = ARVDPipeline(**{**tiny_pipeline.components, "scheduler": None}, height=32, width=48, **FIELDS.to_dict())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, **kwargs):
    noise = torch.randn(1, 4, 12, 4, 6, generator=torch.Generator().manual_seed(1))
    kwargs = {"latents": noise, "output_type": "latent", **kwargs}
    return pipe.stream("a red circle", generator=torch.Generator().manual_seed(2), **kwargs)


def test_frame_that_is_encoded_anew(krea, monkeypatch):
    """The last picture of the latent frame that has just left, whether anybody looks at pictures or not."""
    given, encode = [], krea.encode_frames
    monkeypatch.setattr(krea, "encode_frames", lambda pixels: given.append(pixels) or encode(pixels))
    latents = torch.cat([chunk.latents for chunk in generate(krea)], dim=2)
    pictures = StreamingVAEDecoder(krea.vae).decode(latents)
    for pixels, frame in zip(given, (3, 6), strict=True):  # chunk 1 sees all 3 frames; 2 and 3 lack one
        torch.testing.assert_close(pixels, pictures[:, :, 4 * frame : 4 * frame + 1], atol=1e-5, rtol=0)
    shown = list(generate(krea, output_type="pt"))
    assert torch.equal(torch.cat([chunk.latents for chunk in shown], dim=2), latents)
    assert sum(chunk.frames.shape[1] for chunk in shown) == 45


def test_goes_on_from_a_file(krea, tmp_path):
    stream = generate(krea)
    for _ in range(3):
        next(stream)
    stream.save_state(tmp_path / "state.safetensors")
    expected = next(stream).latents
    assert torch.equal(next(krea.restore_stream(tmp_path / "state.safetensors")).latents, expected)


def test_new_prompt_takes_the_old_ones_context(krea):
    """The context is encoded under the prompt that the frames were made with, or on request under the new one."""
    found = {}
    for how in ("keep", "recache"):
        infos: list = []
        stream = generate(krea, on_pass=infos.append)
        next(stream)
        stream.set_prompt("a blue square", on_prompt_switch=how)
        found[how] = next(stream).latents
        assert sum(info.role == "rebuild" for info in infos) == (1 if how == "keep" else 2)
    assert not torch.equal(found["keep"], found["recache"])


def test_passes_are_calibrated(krea):
    config = QARVDConfig(
        "w8a8", outlier_alignment=1, calibration_chunks=3, calibration_prompts=("a red circle", "a blue square")
    )
    krea.quantize(config)
    assert generate(krea, num_chunks=4).__next__().latents.isfinite().all()


def test_what_it_cannot_do(krea):
    with pytest.raises(ValueError, match="overlap_decoding cannot be combined"):
        generate(krea, overlap_decoding=True, output_type="pt")
    with pytest.raises(ValueError, match=r"needs decoded frames, .* keep_first_frame=True"):
        krea.measure_sensitivity(QARVDConfig("w8a8_dynamic", outlier_alignment=1), ["a red circle"], num_chunks=3)
    blind = ARVDPipeline(**{**krea.components, "vae": None}, **FIELDS.to_dict())
    with pytest.raises(ValueError, match="has no vae: load one, or load the model with keep_first_frame=True"):
        generate(blind)
