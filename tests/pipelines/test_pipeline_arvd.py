"""The pipeline as its users meet it: calls and streams, callbacks, early ends, bad input, save and load."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from qarvd_diffusers.models import CausalWanTransformer3DModel
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline
from qarvd_diffusers.schedulers import FewStepRenoiseScheduler

PROMPT = "a red circle moves left"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def latents_of(pipe, prompt=PROMPT, seed=0, **kwargs):
    return pipe(prompt, generator=seeded(seed), output_type="latent", **{"num_chunks": 3, **kwargs}).frames


def test_call_joins_the_stream(tiny_pipeline):
    """An endless stream and a call of known length agree bit by bit, decoded frames included."""
    expected = tiny_pipeline(PROMPT, num_chunks=3, generator=seeded(), output_type="pt").frames
    stream = tiny_pipeline.stream(PROMPT, generator=seeded(), output_type="pt")
    chunks = [next(stream) for _ in range(3)]
    stream.close()
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    assert [chunk.frames.shape[1] for chunk in chunks] == [9, 12, 12]
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks], dim=1), expected)
    assert all(chunk.seconds > 0 and chunk.latents.shape == (1, 4, 3, 4, 6) for chunk in chunks)


def test_output_types(tiny_pipeline):
    out = {
        kind: tiny_pipeline(PROMPT, num_chunks=1, generator=seeded(), output_type=kind).frames for kind in ("np", "pt")
    }
    assert out["np"].shape == (1, 9, 32, 48, 3) and out["np"].dtype == np.float32
    np.testing.assert_array_equal(out["np"], out["pt"].permute(0, 1, 3, 4, 2).numpy())
    pil = tiny_pipeline([PROMPT, "a blue square"], num_chunks=2, generator=seeded(), output_type="pil").frames
    assert len(pil) == 2 and len(pil[0]) == 21 and pil[0][0].size == (48, 32)
    assert tiny_pipeline(PROMPT, num_chunks=1, return_dict=False)[0].shape == (1, 9, 32, 48, 3)


@pytest.mark.parametrize(("storage", "error"), [("bf16", 0.05), ("int8", 0.05), ("fp8", 0.2)])
def test_kv_cache_storage(tiny_pipeline, storage, error):
    """The first chunk sees nothing stored and is unchanged; the rest moves a little."""
    expected = latents_of(tiny_pipeline)
    got = latents_of(tiny_pipeline, kv_cache=storage)
    assert torch.equal(got[:, :, :3], expected[:, :, :3])
    assert 0 < (got - expected).abs().max() < error * expected.std()
    tiny_pipeline.kv_cache = storage  # what calls take that do not say
    assert torch.equal(latents_of(tiny_pipeline), got)
    assert torch.equal(latents_of(tiny_pipeline, kv_cache="auto"), expected)
    with pytest.raises(ValueError, match="kv_cache is 'int2', expected one of auto"):
        tiny_pipeline.stream(PROMPT, kv_cache="int2")


def test_lengths(tiny_pipeline):
    assert latents_of(tiny_pipeline, num_chunks=None, num_frames=21).shape[2] == 6
    assert latents_of(tiny_pipeline, num_chunks=None).shape[2] == 21
    with pytest.raises(ValueError, match="num_frames = 25 asks for 7 generated latent frames"):
        tiny_pipeline(PROMPT, num_frames=25)
    with pytest.raises(ValueError, match="num_frames is 80, expected a multiple of 4 plus 1"):
        tiny_pipeline(PROMPT, num_frames=80)


def test_given_noise_equals_drawn_noise(tiny_pipeline):
    """The documented order of draws: chunk by chunk, starting noise, then one draw per re-noising step."""
    generator = seeded()
    draws = [[torch.randn(1, 4, 3, 4, 6, generator=generator) for _ in range(4)] for _ in range(3)]
    given = tiny_pipeline(
        PROMPT,
        latents=torch.cat([chunk[0] for chunk in draws], dim=2),
        renoise_latents=torch.stack([torch.stack(chunk[1:]) for chunk in draws]),
        output_type="latent",
    ).frames
    assert torch.equal(given, latents_of(tiny_pipeline))


def test_batch_equals_single_prompts(tiny_pipeline):
    prompts = [PROMPT, "a blue square"]
    both = tiny_pipeline(prompts, num_chunks=2, generator=[seeded(1), seeded(2)], output_type="latent").frames
    for sample, (prompt, seed) in enumerate(zip(prompts, (1, 2), strict=True)):
        alone = latents_of(tiny_pipeline, prompt, seed, num_chunks=2)
        torch.testing.assert_close(both[sample : sample + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("storage", ("int8", "fp8"))
def test_batch_equals_single_prompts_over_eight_bits(tiny_pipeline, storage):
    """A sample does not depend on its mates, however large their keys and values are."""
    start = torch.randn(2, 4, 3, 4, 6, generator=seeded(9))
    start[1] *= 20
    prompts, seeds = [PROMPT, "a blue square"], (1, 2)
    options = {"num_chunks": 2, "kv_cache": storage, "output_type": "latent"}
    generators = [seeded(seed) for seed in seeds]
    both = tiny_pipeline(prompts, initial_latents=start, generator=generators, **options).frames
    for sample, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        own = start[sample : sample + 1]
        alone = tiny_pipeline(prompt, initial_latents=own, generator=seeded(seed), **options).frames
        torch.testing.assert_close(both[sample : sample + 1], alone, atol=1e-4, rtol=0)


def test_initial_latents_come_first_and_condition(tiny_pipeline):
    start = torch.randn(1, 4, 3, 4, 6, generator=seeded(9))
    chunks = list(
        tiny_pipeline.stream(PROMPT, num_chunks=2, initial_latents=start, generator=seeded(), output_type="pt")
    )
    assert [chunk.index for chunk in chunks] == [-1, 0, 1]
    assert [chunk.frames.shape[1] for chunk in chunks] == [9, 12, 12]
    assert torch.equal(chunks[0].latents, start)
    other = latents_of(tiny_pipeline, num_chunks=2, initial_latents=-start)
    assert not torch.allclose(other[:, :, 3:], torch.cat([c.latents for c in chunks[1:]], dim=2))


def test_interleaved_streams_do_not_disturb_each_other(tiny_pipeline):
    expected = [
        tiny_pipeline(p, num_chunks=3, generator=seeded(s), output_type="pt").frames
        for p, s in ((PROMPT, 0), ("a blue square", 1))
    ]
    streams = [
        tiny_pipeline.stream(PROMPT, generator=seeded(0), output_type="pt"),
        tiny_pipeline.stream("a blue square", num_chunks=3, generator=seeded(1), output_type="pt"),
    ]
    pieces = [[], []]
    for _ in range(3):
        for stream, out in zip(streams, pieces, strict=True):
            out.append(next(stream).frames)
    for out, value in zip(pieces, expected, strict=True):
        assert torch.equal(torch.cat(out, dim=1), value)


def test_early_close_and_failure_leave_a_clean_pipeline(tiny_pipeline):
    expected = latents_of(tiny_pipeline)
    stream = tiny_pipeline.stream(PROMPT, generator=seeded(3))
    next(stream)
    stream.close()

    def fail(info):
        if info.chunk == 1 and info.step == 2:
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        list(tiny_pipeline.stream(PROMPT, num_chunks=3, generator=seeded(3), on_pass=fail))
    assert tiny_pipeline.current_timestep is None
    assert all(p.cache is None for p in tiny_pipeline.transformer.attn_processors.values())
    assert torch.equal(latents_of(tiny_pipeline), expected)
    assert torch.is_grad_enabled()


def test_passes_are_announced_in_order(tiny_pipeline):
    infos = []
    list(tiny_pipeline.stream(PROMPT, num_chunks=2, generator=seeded(), output_type="latent", on_pass=infos.append))
    assert [(i.chunk, i.role, i.step, i.frame_offset) for i in infos] == [
        (chunk, role, step, 3 * chunk)
        for chunk in (0, 1)
        for role, step in (*(("denoise", s) for s in range(4)), ("refresh", 0))
    ]
    assert [round(i.timestep, 3) for i in infos[:5]] == [1000, 937.5, 833.333, 625, 0]


def test_callback_counts_over_chunks_and_replaces_tensors(tiny_pipeline):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        assert set(tensors) == {"latents", "prompt_embeds"}
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 7 else tensors

    out = latents_of(
        tiny_pipeline,
        num_chunks=2,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert steps == list(range(8))
    assert out[:, :, 3:].abs().max() == 0 and out[:, :, :3].abs().max() > 0
    assert tiny_pipeline.num_timesteps == 8
    with pytest.raises(ValueError, match="expected names among"):
        tiny_pipeline(PROMPT, callback_on_step_end_tensor_inputs=["noise"])


def test_callback_changes_the_prompt(tiny_pipeline):
    other = tiny_pipeline.encode_prompt("a blue square")

    def callback(pipe, step, timestep, tensors):
        return {"prompt_embeds": other} if step == 3 else {}

    changed = latents_of(tiny_pipeline, callback_on_step_end=callback)
    plain = latents_of(tiny_pipeline)
    assert torch.equal(changed[:, :, :3], plain[:, :, :3])
    assert not torch.allclose(changed[:, :, 3:], plain[:, :, 3:])


def test_interrupt_ends_the_stream(tiny_pipeline):
    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = step == 5
        return tensors

    assert latents_of(tiny_pipeline, callback_on_step_end=callback).shape[2] == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stop_the_stream(tiny_pipeline, value):
    noise = torch.randn(1, 4, 9, 4, 6, generator=seeded())
    noise[0, 0, 4] = value
    stream = tiny_pipeline.stream(PROMPT, latents=noise, generator=seeded())
    assert next(stream).index == 0
    with pytest.raises(FloatingPointError, match=r"chunk 1, step 0 \(timestep 1000\)"):
        next(stream)


def test_embeddings_are_zero_beyond_the_prompt(tiny_pipeline):
    embeds = tiny_pipeline.encode_prompt([PROMPT, "a  red\n"])
    assert embeds.shape == (2, 12, 16)
    assert embeds[0, :6].abs().sum(-1).min() > 0 and embeds[0, 6:].abs().max() == 0
    assert torch.equal(embeds[1], tiny_pipeline.encode_prompt("a red")[0])
    alone = tiny_pipeline.encode_prompt(PROMPT)
    torch.testing.assert_close(alone, embeds[:1], atol=1e-5, rtol=0)
    assert torch.equal(latents_of(tiny_pipeline), latents_of(tiny_pipeline, None, prompt_embeds=alone))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": None}, "either prompt or prompt_embeds, got neither"),
        ({"prompt_embeds": torch.zeros(1, 12, 16)}, "got both"),
        ({"prompt": 3}, "prompt is a int"),
        ({"num_chunks": 0}, "num_chunks is 0"),
        ({"height": 40}, "height is 40, expected a multiple of 16"),
        ({"output_type": "gif"}, "output_type is 'gif'"),
        ({"latents": torch.zeros(1, 4, 7, 4, 6)}, "latents asks for 7 generated latent frames"),
        ({"latents": torch.zeros(1, 4, 6, 4, 6), "num_chunks": 3}, "different numbers of chunks"),
        ({"latents": torch.zeros(1, 5, 6, 4, 6)}, r"latents has shape \[1, 5, 6, 4, 6\]"),
        ({"initial_latents": torch.zeros(1, 4, 4, 4, 6), "num_chunks": 1}, "initial_latents has 4 latent frames"),
        ({"renoise_latents": torch.zeros(1, 3, 1, 4, 3, 4, 6), "num_chunks": 2}, "noise for 1 chunks"),
        ({"renoise_latents": torch.zeros(2, 2, 1, 4, 3, 4, 6), "num_chunks": 2}, "renoise_latents of chunk 0"),
        ({"generator": [seeded(), seeded()], "num_chunks": 1}, "2 generators for a batch of 1"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tiny_pipeline, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline.stream(**{"prompt": PROMPT, **kwargs})


def test_bad_fields_are_refused():
    for fields, message in (
        ({"local_attention_frames": 4, "sink_frames": 3}, "local_attention_frames is 4"),
        ({"denoising_timesteps": [250, 500]}, "denoising_timesteps"),
        ({"num_frames_per_chunk": 0}, "num_frames_per_chunk is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ARVDPipeline(transformer=None, **fields)
    with pytest.raises(ValueError, match="scheduler and pipeline disagree"):
        ARVDPipeline(transformer=None, scheduler=FewStepRenoiseScheduler((1000, 500)))


def test_assigned_components_are_upgraded(tiny_pipeline):
    stock = WanTransformer3DModel(**{k: v for k, v in tiny_pipeline.transformer.config.items() if k[0] != "_"})
    tiny_pipeline.transformer = stock
    assert isinstance(tiny_pipeline.transformer, CausalWanTransformer3DModel)
    assert tiny_pipeline.config.transformer == ("diffusers", "WanTransformer3DModel")
    assert isinstance(tiny_pipeline.scheduler, FewStepRenoiseScheduler)
    assert latents_of(tiny_pipeline, num_chunks=1).shape == (1, 4, 3, 4, 6)


def test_save_and_load_in_the_portable_layout(tiny_pipeline, tmp_path, caplog):
    tiny_pipeline.register_to_config(sink_frames=3, local_attention_frames=6)
    expected = latents_of(tiny_pipeline)
    folder = tmp_path / "model"
    tiny_pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert index["sink_frames"] == 3 and "_name_or_path" not in index
    assert type(WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")) is WanTransformer3DModel
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler").config.shift == 5.0
    loaded = ARVDPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents_of(loaded), expected)
    loaded.save_pretrained(folder)  # over itself
    caplog.clear()
    assert torch.equal(latents_of(ARVDPipeline.from_pretrained(folder)), expected)
    assert not caplog.records  # loads without a warning
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_plain_diffusers_loads_it_in_a_fresh_process(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    code = (
        "import sys; from diffusers import DiffusionPipeline;"
        "p = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[1], trust_remote_code=True);"
        "print(type(p).__name__, type(p.transformer).__name__)"
    )
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True, timeout=300)
    assert out.stdout.split() == ["ARVDPipeline", "CausalWanTransformer3DModel"], out.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reload_is_bit_identical(tiny_pipeline, tmp_path, dtype):
    """Decoded frames too, although weights mapped from a file lie at other addresses."""
    tiny_pipeline.to(dtype).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    loaded = ARVDPipeline.from_pretrained(tmp_path / "model", dtype=dtype)
    for name in ("transformer", "vae", "text_encoder"):
        values = getattr(loaded, name).state_dict()
        for key, value in getattr(tiny_pipeline, name).state_dict().items():
            assert torch.equal(values[key].to(dtype), value), key
    if dtype == torch.float32:
        frames = [
            p(PROMPT, num_chunks=2, generator=seeded(), output_type="pt").frames for p in (tiny_pipeline, loaded)
        ]
        assert torch.equal(*frames)


def test_custom_pipeline_loads_here_too(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    assert torch.equal(latents_of(pipe, num_chunks=1), latents_of(tiny_pipeline, num_chunks=1))


def test_from_pipe_and_deepcopy(tiny_pipeline):
    expected = latents_of(tiny_pipeline)
    assert torch.equal(latents_of(copy.deepcopy(tiny_pipeline)), expected)
    again = ARVDPipeline.from_pipe(tiny_pipeline)
    assert again.transformer is tiny_pipeline.transformer
    assert torch.equal(latents_of(again), expected)


def test_bfloat16(tiny_pipeline):
    tiny_pipeline.to(torch.bfloat16)
    out = latents_of(tiny_pipeline)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert tiny_pipeline(PROMPT, num_chunks=1, generator=seeded()).frames.shape == (1, 9, 32, 48, 3)


def test_progress_counts_all_steps(tiny_pipeline, capsys):
    tiny_pipeline.set_progress_bar_config(mininterval=0)
    latents_of(tiny_pipeline, num_chunks=2)
    assert "8/8" in capsys.readouterr().err
    stream = tiny_pipeline.stream(PROMPT, output_type="latent")  # without end: counts, but towards no total
    next(stream)
    stream.close()
    assert "4it" in capsys.readouterr().err


@pytest.mark.gpu
def test_model_offload_on_cuda_computes_the_same(tiny_pipeline):
    offloaded = copy.deepcopy(tiny_pipeline)
    offloaded.enable_model_cpu_offload()
    tiny_pipeline.to("cuda")
    frames = [p(PROMPT, num_chunks=2, generator=seeded(), output_type="pt").frames for p in (tiny_pipeline, offloaded)]
    torch.testing.assert_close(*frames, atol=1e-5, rtol=0)
    assert offloaded.transformer.device.type == "cpu"  # hooks were freed at the end
