"""Continuing from a state, latents to and from ComfyUI's own nodes, and what stays in memory."""

from __future__ import annotations

import time

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from comfy_server import Run, Server
from graphs import BUNDLED, PROMPT, node, read_video, second_stream, stream_graph
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

LATEST = "a large red circle pulsing on a navy background"


def video_of(server: Server, graph: dict, saver: str = "4") -> np.ndarray:
    run = server.run(graph)
    assert run.status == "success", run.error
    return read_video(server.files(run, saver)[0])


def continued(chunks: int, more: int, prompt: str = PROMPT, **options) -> dict:
    """A stream of `chunks` in "3" and "4", `more` chunks from its state in "5" and "6"."""
    graph = stream_graph(chunks=chunks, seed=8, preview="off")
    graph["7"] = node("QARVDEncodePrompt", pipeline=["1", 0], text=prompt)
    return graph | second_stream(positive=["7", 0], num_chunks=more, state=["3", 3], **options)


def results(server: Server, run: Run, latents: str, images: str) -> tuple[torch.Tensor, np.ndarray]:
    """What a SaveLatent and a PreviewImage of a run wrote."""
    assert run.status == "success", run.error
    entry = run.history["outputs"][latents]["latents"][0]
    tensors = load_file(server.base / entry["type"] / entry["subfolder"] / entry["filename"])
    return tensors["latent_tensor"], np.stack([imageio.imread(path) for path in server.files(run, images)])


@pytest.mark.parametrize("options", [{}, {"kv_cache": "int8", "kv_window": 6, "start_latent": ["20", 0]}])
def test_streams_from_states_are_bit_by_bit_the_uncut_one(server, options):
    """1 + 1 + 2 chunks are 4, latents and pictures; with a quantized K/V cache, a window and a start, too."""

    def graph(chunks: tuple[int, ...]) -> dict:
        graph = {**stream_graph(), "20": node("EmptyHunyuanLatentVideo", width=64, height=64, length=9, batch_size=1)}
        del graph["3"], graph["4"]
        settings = {name: value for name, value in options.items() if name != "start_latent"}
        for index, count in enumerate(chunks):
            start = {"state": [f"3{index - 1}", 3]} if index else {k: options[k] for k in options if k not in settings}
            graph[f"3{index}"] = second_stream(num_chunks=count, seed=9 * (not index), **settings, **start)["5"]
        return {
            **graph,
            "40": node("SaveLatent", samples=[f"3{index}", 1], filename_prefix="latents/state"),
            "41": node("PreviewImage", images=[f"3{index}", 0]),
        }

    before = server.log.read_text().count("encodes the frames of the state again")
    latents, pictures = results(server, server.run(graph((1, 1, 2))), "40", "41")
    whole_latents, whole_pictures = results(server, server.run(graph((4,))), "40", "41")
    assert latents.shape[2] == 6 and len(pictures) == 24
    assert torch.equal(latents, whole_latents[:, :, -6:])
    assert np.array_equal(pictures, whole_pictures[-24:])
    assert server.log.read_text().count("encodes the frames of the state again") == before


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"prompt": LATEST}, "prompt, size or kv_cache differs"),
        ({"kv_cache": "int8"}, "prompt, size or kv_cache differs"),
        ({"kv_window": 6}, "causal fields"),
        ({"timesteps": "1000, 500"}, "causal fields"),
    ],
)
def test_a_state_that_does_not_fit_is_encoded_again_with_a_note(server, changed, reason):
    """Another prompt, K/V cache, window or list of steps."""
    run = server.run(continued(1, 1, **changed))
    assert run.status == "success", run.error
    notes = [line for line in server.log.read_text().splitlines() if "encodes the frames of the state again" in line]
    assert reason in notes[-1]
    assert len(read_video(server.files(run, "6")[0])) == 12


def test_a_state_that_nothing_was_connected_to_is_encoded_again(server):
    """It does not hold the K/V cache, which takes much memory; what is made from it is almost the same."""
    exact = video_of(server, continued(2, 1), "6")
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    alone = stream_graph(chunks=2, seed=8, preview="off")
    assert server.run(alone).status == "success"
    run = server.run(continued(2, 1))
    assert "3" in run.cached()
    notes = [line for line in server.log.read_text().splitlines() if "encodes the frames of the state again" in line]
    assert "nothing was connected to the state output" in notes[-1]
    assert np.abs(read_video(server.files(run, "6")[0]).astype(int) - exact).mean() < 2


def test_a_state_can_be_used_again_and_with_another_prompt(server):
    """Continuing does not use the state up, and the prompt of the continuation counts."""
    once, again = (video_of(server, continued(2, more), "6") for more in (1, 2))
    assert np.abs(once[:12].astype(int) - again[:12]).mean() < 2
    other = video_of(server, continued(2, 2, prompt=LATEST), "6")
    assert np.abs(other.astype(int) - again).mean() > 2


def test_latents_go_out_and_come_in(server):
    """A stream that starts with another one's latents shows its frames first."""
    graph = stream_graph(chunks=1, seed=4, preview="off")
    run = server.run(graph | second_stream(start_latent=["3", 1]))
    assert run.status == "success", run.error
    first, whole = (read_video(server.files(run, saver)[0]) for saver in ("4", "6"))
    assert len(whole) == 9 + 12
    assert np.abs(whole[:9].astype(int) - first).mean() < 2


def test_a_start_of_another_size_and_two_starts_are_refused(server):
    run = server.run(continued(1, 1, width=128))
    assert run.error.splitlines() == [
        "state is 64 x 64 pixels, but the video is 128 x 64.",
        "Set width to 64 and height to 64.",
    ]
    run = server.run(continued(1, 1, start_image=["3", 0]))
    assert "are both connected" in run.error and len(run.error.splitlines()) == 2


def test_settings_of_the_rollout(server):
    """Fewer steps and a smaller window run; a window that cannot hold a chunk is refused in two lines."""
    run = server.run(stream_graph(chunks=2, timesteps="1000, 500", kv_window=6, sink=0))
    assert run.status == "success", run.error
    assert max(data["max"] for data in run.of("progress") if data["node"] == "3") == 2 * 3
    run = server.run(stream_graph(chunks=1, kv_window=2))
    assert "local_attention_frames is 2" in run.error and len(run.error.splitlines()) == 2


def test_memory_after_five_runs_is_that_after_the_first(server):
    """Every run is computed anew (another seed); what it takes comes back, also after interrupts and errors."""

    def stream(seed: int) -> None:
        assert server.run(stream_graph(chunks=3, seed=seed)).status == "success"

    stream(100)
    first = server.resident_bytes
    for seed in range(101, 105):
        stream(seed)
    run = server.submit(stream_graph(chunks=40, seed=105))
    while not run.of("qarvd.chunk"):
        time.sleep(0.05)
    server.post("/interrupt", {})
    server.wait(run)
    assert server.run(stream_graph(chunks=1, width=72)).status == "error"
    assert server.resident_bytes < 1.05 * first


def test_free_unloads_the_models_and_the_next_run_loads_them(server):
    graph = stream_graph(chunks=1, seed=200)
    assert server.run(graph).status == "success"
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    run = server.run({"1": node("QARVDLoadPipeline", model=BUNDLED), "2": node("QARVDInfo", pipeline=["1", 0])})
    assert run.status == "success" and "1" not in run.cached()
    assert server.run(graph).status == "success"
