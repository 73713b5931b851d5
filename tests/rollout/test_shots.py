"""Shots, pinned chunks, a clamped first frame and the UniPC sampler: against the reference code of LongLive 2.0."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from tiny_wan import make_wan22_vae

from qarvd_diffusers.conversion.families import FAMILIES
from qarvd_diffusers.models import KVCache, RolloutConfig
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline
from qarvd_diffusers.schedulers import ChunkUniPCScheduler, FewStepRenoiseScheduler

STRICT = 1e-5
FIELDS = FAMILIES["longlive-2"].fields
CUTS = {
    "l2a_single_shot_5_chunks": ("a", "a", "a", "a", "a"),
    "l2b_multi_shot_cuts_at_chunk2_and_chunk5": ("a", "a", "cut b", "b", "b", "cut c", "c"),
    "l2c_i2v_first_frame_clamped": ("a", "b"),
}


class RecordingPipeline(ARVDPipeline):
    def make_cache(self, *args, **kwargs):
        self.cache = super().make_cache(*args, **kwargs)
        return self.cache

    def run_pass(self, latents, timestep, *args, **kwargs):
        flow = super().run_pass(latents, timestep, *args, **kwargs)
        info = self.infos[-1]
        if info.role == "denoise":
            self.found[f"input_chunk{info.chunk}_step{info.step}"] = latents
            self.timesteps.append(timestep)
            if info.step == 0:
                self.found[f"flow_pred_chunk{info.chunk}_first_call"] = flow
        return flow


@pytest.mark.parametrize("name", CUTS)
def test_longlive_2(golden_family, name):
    golden = golden_family("longlive2")
    data, inputs = golden.file(f"{name}.safetensors"), golden.file("inputs.safetensors")
    pipe = RecordingPipeline(golden.transformer(), **FIELDS.to_dict())
    pipe.set_progress_bar_config(disable=True)
    pipe.infos, pipe.found, pipe.timesteps = [], {}, []
    initial = inputs["initial_latent"] if "i2v" in name else None
    stream = pipe.stream(
        prompt_embeds=inputs["prompt_embeds_a"],
        latents=inputs["noise"][:, :, : data["latents"].shape[2]],
        initial_latents=initial,
        output_type="latent",
        on_pass=pipe.infos.append,
    )
    pieces, before = [], "a"
    for text in CUTS[name]:
        if text != before:
            how = "cut" if text.startswith("cut") else "keep"
            stream.set_prompt(prompt_embeds=inputs[f"prompt_embeds_{text[-1]}"], on_prompt_switch=how)
        before = text[-1]
        pieces.append(next(stream).latents)
    stream._session.loop.refresh()
    keys = pipe.cache.visible(0)[0].unflatten(1, (len(pipe.cache.frames), -1))
    # Five dimensions, and so transposed as if it were a video.
    pipe.found["final_self_attn_k_cache_block0_every4th_frame"] = keys[:, ::4].transpose(1, 2)
    pipe.found["latents"] = torch.cat(pieces, dim=2)
    for key, expected in data.items():
        torch.testing.assert_close(
            pipe.found[key], expected, atol=STRICT, rtol=0, msg=lambda m, key=key: f"{key}: {m}"
        )
    if initial is not None:
        assert pipe.timesteps[0].tolist() == [[0.0] + [999.0] * 7]
        assert pipe.timesteps[4].tolist() == [999.0]
        assert torch.equal(pieces[0][:, :, :1], initial)


def test_unipc_is_the_one_of_diffusers():
    """`set_timesteps(sigmas=...)` as LongLive 2.0 calls it, a fresh object per chunk; the table of the golden data."""
    ours = ChunkUniPCScheduler()
    assert ours.timesteps.tolist() == [999, 937, 833, 624]
    expected = [0.9997998476028442, 0.9372654557228088, 0.8330553770065308, 0.6246873736381531, 0.0]
    torch.testing.assert_close(ours.sigmas, torch.tensor(expected), atol=6e-8, rtol=0)
    generator = torch.Generator().manual_seed(0)
    for chunk in range(2):
        theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
        theirs.set_timesteps(sigmas=np.linspace(0.999, 0, 5)[:-1])
        assert torch.equal(ours.sigmas, theirs.sigmas)
        ours.set_timesteps(chunk_index=chunk)
        a = b = torch.randn(1, 4, 2, 3, 3, generator=generator)
        for timestep in ours.timesteps.tolist():
            flow = torch.randn(a.shape, generator=generator)
            a = ours.step(flow, timestep, a, return_dict=False)[0]
            b = theirs.step(flow, timestep, b, return_dict=False)[0]
            assert torch.equal(a, b)


def test_sampler_is_part_of_the_config(tiny_pipeline, tmp_path):
    components = {"transformer": tiny_pipeline.transformer, **dict.fromkeys(("vae", "text_encoder", "tokenizer"))}
    pipe = ARVDPipeline(**components, **FIELDS.to_dict())
    pipe.save_pretrained(tmp_path)
    loaded = ARVDPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, ChunkUniPCScheduler)
    assert loaded.rollout_config == FIELDS
    with pytest.raises(ValueError, match=r"disagree on \['denoising_timesteps', 'sampler'\]"):
        ARVDPipeline(**components, scheduler=FewStepRenoiseScheduler(), **FIELDS.to_dict())


def window_after(cuts, chunks, **fields):
    """`(frames, RoPE shift)` of a cache of 4 slots, 1 of them sink, behind each chunk of one frame."""
    cache, seen = KVCache(1, local_attention_frames=4, sink_frames=1, **fields), []
    for chunk in range(chunks):
        if chunk in cuts:
            cache.begin_shot(10, pin=True)
        for _ in range(2):  # all passes of a chunk find the same
            start = cache.begin_pass(chunk, 1, 2, (1, 4), torch.zeros(1))
            cache.layers[0].update(torch.full((1, 2, 1, 4), 1.0 * chunk), torch.zeros(1, 2, 1, 4), start)
        assert cache.visible(0)[0][0, ::2, 0, 0].tolist() == cache.frames
        seen.append((list(cache.frames), cache.shift))
    return seen


def test_pins_and_positions():
    absolute = window_after({2, 5}, 7)
    assert [frames for frames, _ in absolute[3:]] == [[0, 1, 2, 3], [0, 2, 3, 4], [0, 2, 4, 5], [0, 4, 5, 6]]
    assert [shift for _, shift in absolute] == [0, 0, 10, 10, 10, 20, 20]
    assert [shift for _, shift in window_after({2, 5}, 7, rope_mode="window")] == [0, 0, 10, 0, 0, 10, 0]


def test_a_cut_survives_saving(tiny_pipeline, tmp_path):
    fields = RolloutConfig(local_attention_frames=12, sink_frames=3, shot_rope_offset=5, pin_shots=True)
    pipe = ARVDPipeline(tiny_pipeline.transformer, **fields.to_dict())
    pipe.set_progress_bar_config(disable=True)
    first, second = torch.randn(2, 1, 12, 16, generator=torch.Generator().manual_seed(1))

    def stream():
        noise = torch.randn(1, 4, 18, 4, 6, generator=torch.Generator().manual_seed(2))
        generator = torch.Generator().manual_seed(3)
        return pipe.stream(prompt_embeds=first, latents=noise, generator=generator, output_type="latent")

    whole = stream()
    pieces = [next(whole).latents for _ in range(2)]
    whole.set_prompt(prompt_embeds=second, on_prompt_switch="cut")
    pieces += [next(whole).latents]
    whole.save_state(tmp_path / "state.safetensors")
    rest = torch.cat([chunk.latents for chunk in whole], dim=2)
    restored = pipe.restore_stream(tmp_path / "state.safetensors")
    assert torch.equal(torch.cat([chunk.latents for chunk in restored], dim=2), rest)
    plain = stream()
    for _ in range(2):
        next(plain)
    plain.set_prompt(prompt_embeds=second)
    assert (next(plain).latents - pieces[2]).abs().max() > 1e-3


def test_prompt_of_a_cut_gets_its_prefix(tiny_pipeline):
    pipe = ARVDPipeline(**tiny_pipeline.components, height=32, width=48, shot_prefix="The scene transitions. ")
    stream = pipe.stream("a red circle", output_type="latent")
    stream.set_prompt("a blue square", on_prompt_switch="cut")
    assert stream._session.changes[0].text["prompt"] == "The scene transitions. a blue square"
    stream.set_prompt(["The scene transitions. a"], on_prompt_switch="cut")
    assert stream._session.changes[0].text["prompt"] == ["The scene transitions. a"]


def test_clamped_start_takes_any_number_of_frames(tiny_pipeline):
    """Whole chunks are context, the rest begins chunk 0, unchanged; a picture is one frame."""
    pipe = ARVDPipeline(**{**tiny_pipeline.components, "scheduler": None}, height=32, width=48, clamped_start=True)
    pipe.set_progress_bar_config(disable=True)
    start, infos = torch.randn(1, 4, 4, 4, 6), []
    stream = pipe.stream(
        "a red circle", initial_latents=start, num_chunks=2, output_type="latent", on_pass=infos.append
    )
    pieces = [chunk.latents for chunk in stream]
    assert [piece.shape[2] for piece in pieces] == [3, 3, 3]
    assert torch.equal(torch.cat(pieces, dim=2)[:, :, :4], start)
    assert [(i.role, i.frame_offset) for i in infos[:2]] == [("context", 0), ("denoise", 3)]
    picture = torch.rand(3, 32, 48)
    assert pipe.encode_start(image=picture).shape[2] == 1
    latents = pipe("a red circle", image=picture, num_frames=9, output_type="latent").frames
    assert latents.shape[2] == 3


def test_pictures_of_the_5b_vae(tiny_pipeline):
    """LongLive 2.0's roll-out around a VAE of Wan 2.2's kind: 16x smaller, pixels shuffled; started with a picture."""
    vae = make_wan22_vae()
    components = {**tiny_pipeline.components, "scheduler": None, "vae": vae}
    pipe = ARVDPipeline(**components, **FIELDS.to_dict(), height=64, width=96, max_sequence_length=12)
    pipe.set_progress_bar_config(disable=True)
    chunks = list(pipe.stream("a red circle", image=torch.rand(3, 64, 96), num_chunks=2, output_type="pt"))
    assert [tuple(chunk.frames.shape) for chunk in chunks] == [(1, 29, 3, 64, 96), (1, 32, 3, 64, 96)]
    assert [tuple(chunk.latents.shape) for chunk in chunks] == [(1, 4, 8, 4, 6)] * 2


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"pin_shots": True, "local_attention_frames": 5, "sink_frames": 1}, "pin_shots is True"),
        ({"shot_rope_offset": -1}, "shot_rope_offset is -1"),
        ({"sampler": "euler"}, "sampler is 'euler', expected one of renoise, renoise_integer, unipc"),
        ({"clamped_start": True, "independent_first_frame": True}, "clamped_start is True"),
        ({"context_mode": "none"}, "context_mode is 'none', expected one of refresh, rebuild"),
        ({"context_mode": "rebuild"}, "local_attention_frames of two or more whole chunks"),
        (
            {"context_mode": "rebuild", "local_attention_frames": 7},
            "local_attention_frames of two or more whole chunks",
        ),
    ],
)
def test_settings_that_cannot_be(fields, match):
    with pytest.raises(ValueError, match=match):
        RolloutConfig(**fields)
    with pytest.raises(ValueError, match="positive number of latent frames"):
        dataclasses.replace(FIELDS, shot_rope_offset=-8)
