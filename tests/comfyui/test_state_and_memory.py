"""Going on where a stream stands, latents to and from ComfyUI's own nodes, and what stays in memory."""

from __future__ import annotations

import time

import numpy as np
import pytest
from comfy_server import Server
from graphs import BUNDLED, PROMPT, node, read_video, stream_graph

pytestmark = pytest.mark.slow

LATEST = "a large red circle pulsing on a navy background"


def video_of(server: Server, graph: dict, saver: str = "4") -> np.ndarray:
    run = server.run(graph)
    assert run.status == "success", run.error
    return read_video(server.files(run, saver)[0])


def save(source: list, prefix: str) -> dict:
    return node("SaveVideo", video=source, filename_prefix=f"video/{prefix}", format="auto", codec="auto")


def continued(chunks: int, more: int, prompt: str = PROMPT, **options) -> dict:
    """A stream of `chunks` in "3" and "4", `more` chunks from its state in "5" and "6"."""
    graph = stream_graph(chunks=chunks, seed=8, preview="off")
    graph["7"] = node("QARVDEncodePrompt", pipeline=["1", 0], text=prompt)
    graph["5"] = node(
        "QARVDStreamGenerate",
        **{
            "pipeline": ["1", 0],
            "positive": ["7", 0],
            "num_chunks": more,
            "seed": 0,
            "state": ["3", 3],
            "preview": "off",
        },
        **options,
    )
    graph["6"] = save(["5", 2], "more")
    return graph


def test_two_plus_two_chunks_from_a_state_are_four(server):
    whole = video_of(server, stream_graph(chunks=4, seed=8, preview="off"))
    run = server.run(continued(2, 2))
    parts = [read_video(server.files(run, saver)[0]) for saver in ("4", "6")]
    assert [len(part) for part in parts] == [21, 24]
    assert np.abs(np.concatenate(parts).astype(int) - whole).mean() < 2  # H.264 stands between


def test_a_state_can_be_used_again_and_with_another_prompt(server):
    """Continuing does not use the state up, and the prompt of the continuation counts."""
    once, again = (video_of(server, continued(2, more), "6") for more in (1, 2))
    assert np.abs(once[:12].astype(int) - again[:12]).mean() < 2
    other = video_of(server, continued(2, 2, prompt=LATEST), "6")
    assert np.abs(other.astype(int) - again).mean() > 2


def test_latents_go_out_and_come_in(server):
    """A stream that starts with another one's latents shows its frames first."""
    graph = stream_graph(chunks=1, seed=4, preview="off")
    graph["5"] = node(
        "QARVDStreamGenerate",
        pipeline=["1", 0],
        positive=["2", 0],
        num_chunks=1,
        seed=0,
        start_latent=["3", 1],
        preview="off",
    )
    graph["6"] = save(["5", 2], "started")
    run = server.run(graph)
    assert run.status == "success", run.error
    first, whole = (read_video(server.files(run, saver)[0]) for saver in ("4", "6"))
    assert len(whole) == 9 + 12
    assert np.abs(whole[:9].astype(int) - first).mean() < 2


def test_a_start_of_another_size_and_two_starts_are_refused(server):
    run = server.run(continued(1, 1, width=128))
    assert run.error.splitlines() == [
        "state is 64 x 64 pixels, the video 128 x 64.",
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
