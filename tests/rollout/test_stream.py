"""What one can do to a running stream: change its prompt, pause, close, save it and go on, start it from pictures."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qarvd_diffusers import ARVDPipeline

PROMPT, OTHER = "a red circle moves left", "a blue square"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe(tiny_pipeline):
    """Window of two chunks and a sink."""
    tiny_pipeline.register_to_config(local_attention_frames=9, sink_frames=3)
    return tiny_pipeline


def latents(stream, count=None):
    chunks = list(stream) if count is None else [next(stream) for _ in range(count)]
    return torch.cat([chunk.latents for chunk in chunks], dim=2)


def caches(pipe):
    """Every cache that the pipeline makes from now on."""
    made, make_cache = [], pipe.make_cache

    def recorded(*args, **kwargs):
        made.append(make_cache(*args, **kwargs))
        return made[-1]

    pipe.make_cache = recorded
    return made


# Prompts


@pytest.mark.parametrize("how", ["keep", "recache", "new_text_only"])
def test_a_prompt_takes_effect_at_the_next_chunk(pipe, how):
    plain = latents(pipe.stream(PROMPT, num_chunks=5, generator=seeded(), output_type="latent"))
    infos = []
    stream = pipe.stream(PROMPT, num_chunks=5, generator=seeded(), output_type="latent", on_pass=infos.append)
    first = latents(stream, 3)
    stream.set_prompt(OTHER, on_prompt_switch=how)
    rest = latents(stream)
    assert torch.equal(first, plain[:, :, :9])
    assert (rest - plain[:, :, 9:]).abs().amax((0, 1, 3, 4)).min() > 1e-4
    recached = [(i.chunk, i.frame_offset, i.num_frames, i.timestep) for i in infos if i.role == "recache"]
    # Nine frames are done and fill the window: the sink is among them, and is encoded again.
    assert recached == ([(3, 0, 9, 0.0)] if how == "recache" else [])


def test_a_prompt_set_before_the_start_is_the_prompt(pipe):
    expected = latents(pipe.stream(OTHER, num_chunks=2, generator=seeded(), output_type="latent"))
    stream = pipe.stream(PROMPT, num_chunks=2, generator=seeded(), output_type="latent")
    stream.set_prompt(OTHER, on_prompt_switch="recache")
    assert torch.equal(latents(stream), expected)


def test_a_chunk_is_handed_out_before_its_refresh(pipe):
    passes = []
    stream = pipe.stream(
        PROMPT, output_type="latent", num_chunks=2, on_pass=lambda info: passes.append((info.chunk, info.role))
    )
    next(stream)
    assert passes == [(0, "denoise")] * 4
    next(stream)
    assert passes[4:] == [(0, "refresh"), *[(1, "denoise")] * 4]
    assert next(stream, None) is None and passes[9:] == [(1, "refresh")]


def test_keep_is_what_the_step_callback_does(pipe):
    other = pipe.encode_prompt(OTHER)

    def callback(pipe, step, timestep, tensors):
        return {"prompt_embeds": other} if step == 7 else {}

    expected = latents(
        pipe.stream(PROMPT, num_chunks=3, generator=seeded(), output_type="latent", callback_on_step_end=callback)
    )
    stream = pipe.stream(PROMPT, num_chunks=3, generator=seeded(), output_type="latent")
    first = latents(stream, 2)
    stream.set_prompt(prompt_embeds=other, on_prompt_switch="keep")
    got = torch.cat([first, latents(stream)], dim=2)
    # The callback's refresh of the chunk in progress already sees the new prompt: the first two chunks agree exactly.
    assert torch.equal(got[:, :, :6], expected[:, :, :6])
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0)


def test_new_text_only_forgets_the_frames(pipe):
    """What follows a cut is what a new stream makes of the same noise: positions are relative."""
    noise = torch.randn(1, 4, 12, 4, 6, generator=seeded())
    renoise = torch.randn(4, 3, 1, 4, 3, 4, 6, generator=seeded(1))
    stream = pipe.stream(PROMPT, latents=noise, renoise_latents=renoise, output_type="latent")
    latents(stream, 2)
    stream.set_prompt(OTHER, on_prompt_switch="new_text_only")
    cut = latents(stream)
    fresh = latents(pipe.stream(OTHER, latents=noise[:, :, 6:], renoise_latents=renoise[2:], output_type="latent"))
    torch.testing.assert_close(cut, fresh, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": [OTHER, OTHER]}, "2 prompts for a stream of batch size 1"),
        ({"prompt_embeds": torch.zeros(3, 12, 16)}, "3 prompts for a stream of batch size 1"),
        (
            {"prompt_embeds": torch.zeros(1, 12, 8)},
            r"prompt_embeds has shape \[1, 12, 8\], expected \[B, tokens, 16\]",
        ),
        ({}, "either prompt or prompt_embeds, got neither"),
        (
            {"prompt": OTHER, "on_prompt_switch": "forget"},
            "on_prompt_switch is 'forget', expected one of keep, recache",
        ),
    ],
)
def test_bad_prompts_are_refused_at_once(pipe, arguments, message):
    stream = pipe.stream(PROMPT, num_chunks=2, generator=seeded(), output_type="latent")
    with pytest.raises(ValueError, match=message):
        stream.set_prompt(**arguments)
    expected = latents(pipe.stream(PROMPT, num_chunks=2, generator=seeded(), output_type="latent"))
    assert torch.equal(latents(stream), expected)
    with pytest.raises(ValueError, match="the stream has ended"):
        stream.set_prompt(OTHER)


# Ends


def test_closing_returns_the_memory_and_the_pipeline(pipe):
    made = caches(pipe)
    with pipe.stream(PROMPT, generator=seeded()) as stream:
        next(stream)
        assert made[0].nbytes > 0
    assert stream.closed and made[0].nbytes == 0
    assert list(stream) == []
    stream.close()  # once more is fine
    expected = latents(pipe.stream(PROMPT, num_chunks=2, generator=seeded(), output_type="latent"))
    assert made[1].nbytes == 0  # a stream that came to its end
    assert expected.shape[2] == 6


def test_a_dropped_stream_ends_without_the_garbage_collector(pipe):
    made = caches(pipe)
    gc.disable()
    try:
        stream = pipe.stream(PROMPT, generator=seeded())
        next(stream)
        alive = weakref.ref(stream)
        del stream
        assert alive() is None and made[0].nbytes == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failures_return_the_memory_while_their_traceback_lives(pipe, error):
    made = caches(pipe)

    def fail(info):
        if info.chunk == 1 and info.step == 2:
            raise error("stop")

    stream = pipe.stream(PROMPT, generator=seeded(), on_pass=fail)
    next(stream)
    with pytest.raises(error) as caught:
        next(stream)
    assert caught.value.__traceback__ is not None and made[0].nbytes == 0
    assert pipe.current_timestep is None and list(stream) == []

    def consume():
        for _ in pipe.stream(PROMPT, generator=seeded()):
            raise error("in the consumer")

    with pytest.raises(error):
        consume()
    assert made[1].nbytes == 0
    assert latents(pipe.stream(PROMPT, num_chunks=1, generator=seeded(), output_type="latent")).isfinite().all()


def test_close_from_a_callback_ends_after_the_step(pipe):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        if step == 5:
            stream.close()
        return {}

    stream = pipe.stream(PROMPT, generator=seeded(), output_type="latent", callback_on_step_end=callback)
    assert [chunk.index for chunk in stream] == [0]
    assert steps == [0, 1, 2, 3, 4, 5]


def test_pause_and_resume_from_another_thread(pipe):
    expected = latents(pipe.stream(PROMPT, num_chunks=3, generator=seeded(), output_type="latent"))
    stream = pipe.stream(PROMPT, num_chunks=3, generator=seeded(), output_type="latent")
    out, first = [], threading.Event()

    def consume():
        for chunk in stream:
            out.append(chunk.latents)
            first.set()

    stream.pause()
    assert stream.paused
    with pytest.raises(RuntimeError, match="call resume"):
        next(stream)
    worker = threading.Thread(target=consume)
    worker.start()
    assert not first.wait(0.2) and not out
    stream.resume()
    worker.join(60)
    assert torch.equal(torch.cat(out, dim=2), expected)


def test_close_frees_a_paused_consumer(pipe):
    stream = pipe.stream(PROMPT, generator=seeded(), output_type="latent")
    next(stream)
    stream.pause()
    ended = []
    worker = threading.Thread(target=lambda: ended.append(next(stream, "end")))
    worker.start()
    stream.close()
    worker.join(60)
    assert ended == ["end"]


def test_streams_in_several_threads_give_their_own_videos(pipe):
    """Passes keep state on the modules of the model: 30 videos, two threads, half of them on a second pipeline."""
    second = type(pipe)(**pipe.components, **{k: v for k, v in pipe.config.items() if k in ("height", "width")})
    second.register_to_config(
        **{k: v for k, v in pipe.config.items() if not k.startswith("_") and k not in pipe.components}
    )
    second.set_progress_bar_config(disable=True)

    def video(host, seed, chunks):
        generator = torch.Generator().manual_seed(seed)
        options = {"generator": generator, "num_chunks": chunks, "output_type": "latent"}
        return torch.cat([chunk.latents for chunk in host.stream(PROMPT, **options)], dim=2)

    jobs = [(seed, 1 + seed % 3) for seed in range(30)]
    expected = {seed: video(pipe, seed, chunks) for seed, chunks in jobs}
    got, errors = {}, []

    def work(host, share):
        try:
            for seed, chunks in share:
                got[seed] = video(host, seed, chunks)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(host, jobs[i::2])) for i, host in enumerate((pipe, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not errors and all(torch.equal(got[seed], expected[seed]) for seed, _ in jobs)


def test_dropping_a_stream_never_waits_for_another_thread(pipe):
    """A collector may drop a stream anywhere: its end is left to the thread that makes a chunk just then."""
    dropped = pipe.stream(PROMPT, generator=seeded(), output_type="latent")
    next(dropped)
    session, entered, leave = dropped._session, threading.Event(), threading.Event()

    def hold(*_):
        entered.set()
        leave.wait(60)
        return {}

    busy = pipe.stream(PROMPT, generator=seeded(), num_chunks=1, output_type="latent", callback_on_step_end=hold)
    worker = threading.Thread(target=lambda: next(busy))
    worker.start()
    assert entered.wait(60)
    del dropped
    assert session.live is not None, "the other thread runs the model"
    leave.set()
    worker.join(60)
    assert session.live is None


# States in files


@pytest.mark.parametrize("kv_cache", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_a_saved_stream_goes_on_bit_by_bit(pipe, tmp_path, kv_cache, output_type):
    arguments = {"generator": seeded(), "output_type": output_type, "num_chunks": 6, "kv_cache": kv_cache}
    expected = [chunk.frames for chunk in pipe.stream(PROMPT, **arguments)]
    stream = pipe.stream(PROMPT, **{**arguments, "generator": seeded()})
    got = [next(stream).frames for _ in range(4)]
    stream.save_state(tmp_path / "stream.safetensors")
    stream.close()
    torch.manual_seed(99)
    restored = pipe.restore_stream(tmp_path / "stream.safetensors")
    rest = list(restored)
    assert [chunk.index for chunk in rest] == [4, 5]
    for actual, value in zip(got + [chunk.frames for chunk in rest], expected, strict=True):
        assert torch.equal(actual, value)


def test_all_of_a_stream_is_saved(pipe, tmp_path):
    """Initial latents, one generator per sample, a waiting prompt, a re-caching that reaches back before the save."""
    start = torch.randn(2, 4, 3, 4, 6, generator=seeded(5))

    def run(path=None):
        stream = pipe.stream(
            [PROMPT, OTHER],
            initial_latents=start,
            generator=[seeded(1), seeded(2)],
            output_type="latent",
            num_chunks=4,
        )
        out = [next(stream).latents for _ in range(3)]
        stream.set_prompt([OTHER, PROMPT], on_prompt_switch="recache")
        if path is not None:
            stream.save_state(path)
            stream = pipe.restore_stream(path)
        return torch.cat([*out, *(chunk.latents for chunk in stream)], dim=2)

    assert torch.equal(run(tmp_path / "s.safetensors"), run())


def test_the_global_generator_and_given_noise(pipe, tmp_path):
    path = tmp_path / "s.safetensors"
    torch.manual_seed(3)
    stream = pipe.stream(PROMPT, num_chunks=3, output_type="latent")
    next(stream)
    stream.save_state(path)
    expected = latents(stream)
    assert torch.equal(latents(pipe.restore_stream(path)), expected)
    noise = {
        "latents": torch.randn(1, 4, 9, 4, 6, generator=seeded()),
        "renoise_latents": torch.randn(3, 3, 1, 4, 3, 4, 6, generator=seeded(1)),
    }
    stream = pipe.stream(PROMPT, output_type="latent", **noise)
    next(stream)
    stream.save_state(path)
    assert torch.equal(latents(stream), latents(pipe.restore_stream(path)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.safetensors"]


def test_states_are_refused_by_name(pipe, tmp_path):
    path = tmp_path / "s.safetensors"
    stream = pipe.stream(PROMPT, num_chunks=2, generator=seeded(), output_type="latent")
    with pytest.raises(ValueError, match="has not begun"):
        stream.save_state(path)
    next(stream)
    stream.save_state(path)
    with pytest.raises(ValueError, match="without the VAE's memory"):
        pipe.restore_stream(path, output_type="np")
    list(stream)
    with pytest.raises(ValueError, match="or has ended"):
        stream.save_state(path)
    pipe.register_to_config(sink_frames=0)
    with pytest.raises(ValueError, match="another model: causal fields differ"):
        pipe.restore_stream(path)
    pipe.register_to_config(sink_frames=3)
    with torch.no_grad():
        pipe.transformer.proj_out.weight.add_(1e-3)
    with pytest.raises(ValueError, match="another model: transformer differ"):
        pipe.restore_stream(path)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no stream saved by"):
        pipe.restore_stream(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="truncated, or not a safetensors file"):
        pipe.restore_stream(tmp_path / "broken.safetensors")


def test_a_state_holds_no_prompt(pipe, tmp_path):
    """Embeddings are needed, words are private."""
    stream = pipe.stream(PROMPT, num_chunks=2, generator=seeded(), output_type="latent")
    next(stream)
    stream.save_state(tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["qarvd_stream"])
    assert "circle" not in json.dumps(facts)


# Starts from pictures


def moving(frames=9, height=32, width=48):
    video = np.zeros((frames, height, width, 3), dtype=np.uint8)
    for index in range(frames):
        video[index, 8:20, 4 * index : 4 * index + 12] = (250, 40, 40)
    return video


def test_a_video_in_any_form_is_the_same_start(pipe):
    video = moving()
    expected = pipe.encode_start(video=video)
    assert expected.shape == (1, 4, 3, 4, 6)
    floats = torch.from_numpy(video).movedim(-1, 1).float() / 255
    for form in ([PIL.Image.fromarray(frame) for frame in video], floats, video[None], list(video)):
        torch.testing.assert_close(pipe.encode_start(video=form), expected, atol=1e-5, rtol=0)
    chunks = list(pipe.stream(PROMPT, num_chunks=1, video=video, generator=seeded(), output_type="latent"))
    assert [chunk.index for chunk in chunks] == [-1, 0]
    assert torch.equal(chunks[0].latents, expected)
    given = pipe(PROMPT, num_chunks=1, initial_latents=expected, generator=seeded(), output_type="latent").frames
    assert torch.equal(torch.cat([chunk.latents for chunk in chunks], dim=2), given)


def test_lengths_of_starts(pipe):
    assert pipe.encode_start(image=PIL.Image.new("RGB", (10, 10)), batch=2).shape == (2, 4, 3, 4, 6)
    assert pipe.encode_start(image=moving()[0], height=64, width=64).shape == (1, 4, 3, 8, 8)
    longer = moving(24)
    assert torch.equal(pipe.encode_start(video=longer), pipe.encode_start(video=longer[-21:]))
    pipe.register_to_config(independent_first_frame=True)
    assert pipe.encode_start(image=moving()[0]).shape[2] == 1
    assert pipe.encode_start(video=longer).shape[2] == 4
    pipe.register_to_config(independent_first_frame=False)
    for arguments, message in (
        ({"video": moving(5)}, "a start of 5 frames is too short: this model starts with at least 9"),
        ({"video": moving(9), "image": moving()[0]}, "either image or video"),
        ({"video": []}, "has no frames"),
        ({"image": moving()}, "9 starts for a batch of 1"),
        ({"video": moving()[None].repeat(3, 0)}, "3 starts for a batch of 1"),
        ({"image": moving()[0], "initial_latents": torch.zeros(1, 4, 3, 4, 6)}, "got both"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.stream(PROMPT, num_chunks=1, **arguments)


def test_the_start_is_what_the_vae_decodes_again(pipe):
    """Encoding and streaming decode are inverse in what they normalize: mean and std are those of the latents."""
    encoded = pipe.encode_start(video=moving())
    raw = pipe.vae.encode(
        pipe.video_processor.preprocess_video(list(np.float32(moving() / 255)), 32, 48)
    ).latent_dist.mode()
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    torch.testing.assert_close(encoded * std + mean, raw, atol=1e-4, rtol=0)


# Endless


def test_a_long_stream_keeps_its_size(pipe):
    """The window full, nothing grows: buffers, noise, bookkeeping."""
    made = caches(pipe)
    stream = pipe.stream(PROMPT, generator=seeded(), kv_cache="int8", output_type="latent")
    sizes = []
    for chunk in stream:
        state = made[0]
        sizes.append((state.nbytes, len(state.frames), state.layers[0].key.shape))
        if chunk.index == 40:
            break
    assert len(set(sizes[3:])) == 1 and sizes[-1][1] == 9
    stream.close()


def endless(pipe, chunks):
    """Past the end of a short RoPE table."""
    pipe.transformer.rope.max_seq_len = 64
    return pipe.stream(PROMPT, num_chunks=chunks, generator=seeded(), kv_cache="int8", output_type="latent")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc: run it on Linux")
def test_120_chunks_take_no_more_memory_than_20(pipe):
    """The process gives free pages back before it is measured."""
    trim, memory = ctypes.CDLL(None).malloc_trim, []
    for chunk in endless(pipe, 120):
        assert chunk.latents.shape[2] == 3
        if chunk.index in (20, 30, 40, 99, 109, 119):
            gc.collect()
            trim(0)
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert statistics.median(memory[3:]) < 1.01 * statistics.median(memory[:3])


class Work(TorchDispatchMode):
    """Counts the operators that run, by name and sizes of what they give."""

    def __init__(self):
        super().__init__()
        self.done = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [tuple(t.shape) for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.done[f"{func} {sizes}"] += 1
        return result


def test_chunks_after_100_take_no_more_work_than_after_20(pipe):
    done = []
    for chunk in (20, 100):
        stream = endless(pipe, chunk + 1)
        for _ in range(chunk):
            next(stream)
        with Work() as work:
            assert next(stream).index == chunk
        done.append(work.done)
    assert done[0] == done[1] and done[0].total() > 100


@pytest.mark.parametrize("storage", ("auto", "int8"))
def test_stepped_inside_and_outside_of_inference_mode(tiny_pipeline, storage):
    options = {"num_chunks": 4, "kv_cache": storage, "output_type": "pt"}
    want = tiny_pipeline(PROMPT, generator=seeded(), **options).frames
    stream, frames = tiny_pipeline.stream(PROMPT, generator=seeded(), **options), []
    for chunk in range(4):
        with torch.inference_mode(chunk % 2 == 0):
            frames.append(next(stream).frames)
    assert torch.equal(torch.cat(frames, dim=1), want)


def test_another_default_dtype_changes_nothing(tiny_pipeline):
    videos = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            pipe = ARVDPipeline(**{**tiny_pipeline.components, "scheduler": None}, height=32, width=48)
            pipe.set_progress_bar_config(disable=True)
            videos.append(pipe(PROMPT, num_chunks=2, generator=seeded(), output_type="pt").frames)
        finally:
            torch.set_default_dtype(torch.float32)
    assert videos[1].dtype == torch.float32 and torch.equal(*videos)


def test_streams_left_open_when_the_interpreter_ends():
    """Several of them, and in a reference cycle, so that nothing has dropped them before modules are taken down."""
    code = """
import builtins
from tiny_pipeline import *
pipe = ARVDPipeline(build_transformer(), vae=build_vae(), height=32, width=48)
text = torch.zeros(1, 12, 16)
streams = [pipe.stream(prompt_embeds=text, output_type=kind) for kind in ("pt", "latent")]
for stream in streams:
    next(stream)
streams.append(streams)
builtins.kept = streams
print("done")
"""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": path}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "done\n" and "Exception ignored" not in ended.stderr and "Error" not in ended.stderr
