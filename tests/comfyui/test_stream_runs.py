"""Runs of Stream Generate: alone, finished early, shown another way; and how frames are put together."""

from __future__ import annotations

import io
import runpy
import subprocess
import sys
import time
import urllib.error
import urllib.request

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from comfy_server import PACK, Run, Server
from graphs import PROMPT, node, read_video, second_stream, stream_graph

pytestmark = pytest.mark.slow

TENSORS = runpy.run_path(str(PACK / "comfyui_nodes" / "tensors.py"))
digest, joined = TENSORS["digest"], TENSORS["joined"]

PEAK = """
import resource, runpy, sys, torch
joined = runpy.run_path(sys.argv[1])["joined"]
pieces = [torch.full((16, 1024, 1024), float(n)) for n in range(8)]  # 64 MiB each, larger than what malloc keeps
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
whole = joined(pieces)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert whole.shape == (128, 1024, 1024) and whole[::16, 0, 0].tolist() == list(range(8)) and not pieces
print((after - before) / 2**10)
"""


def wait_for_chunks(run: Run, count: int) -> None:
    end = time.monotonic() + 240
    while len(run.of("qarvd.chunk")) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def finish(server: Server, **which: str) -> list[str]:
    status, body = server.post("/qarvd/finish", which)
    assert status == 200
    return body["finishing"]


def stats_of(run: Run) -> str:
    return run.text("9")


def with_stats(graph: dict) -> dict:
    return {**graph, "9": node("PreviewAny", source=["3", 4])}


def test_pieces_are_joined_as_cat_does_and_never_held_twice():
    pieces = [torch.rand(n, 3, 2) for n in (9, 12, 1, 0)]
    expected = torch.cat(pieces)
    assert torch.equal(joined(pieces), expected)
    grown = float(
        subprocess.check_output([sys.executable, "-c", PEAK, str(PACK / "comfyui_nodes" / "tensors.py")], text=True)
    )
    assert grown < 1.5 * 64, f"{grown} MiB more for 512 MiB in pieces of 64"


def test_a_digest_tells_content_apart():
    a = {"x": [torch.arange(4.0), 1], "y": None}
    assert digest(a) == digest({"y": None, "x": [torch.arange(4.0), 1]})
    others = [
        {"x": [torch.arange(4.0).bfloat16(), 1], "y": None},
        {"x": [torch.arange(4.0).view(2, 2), 1], "y": None},
        {"x": [torch.arange(4.0), 1.0], "y": None},
        {"x": [torch.arange(4.0), 1], "y": "None"},
    ]
    assert len({digest(value) for value in [a, *others]}) == 5


def test_stream_generate_runs_with_nothing_behind_it(server):
    graph = stream_graph(chunks=1, seed=40)
    del graph["4"]
    run = server.run(graph)
    assert run.status == "success", run.error
    assert [chunk["index"] for chunk in run.history["outputs"]["3"]["qarvd_chunks"]] == [0]
    again = server.run(graph)
    assert "3" in again.cached(), "and its result is kept and told again"
    assert again.history["outputs"]["3"]["qarvd_chunks"] == run.history["outputs"]["3"]["qarvd_chunks"]


def test_finish_gives_what_exists_to_the_nodes_behind(server):
    """Images, latent, video and state end behind the chunk in progress; going on from there is the uncut video."""
    graph = with_stats(stream_graph(chunks=300, seed=41))
    graph |= second_stream(state=["3", 3])
    graph["7"] = node("QARVDDecode", pipeline=["1", 0], latent=["3", 1])
    graph["8"] = node("QARVDCompare", images_a=["3", 0], images_b=["7", 0], label_a="a", label_b="b")
    run = server.submit(graph)
    wait_for_chunks(run, 2)
    assert finish(server) == [run.of("qarvd.chunk")[0]["run"]]
    server.wait(run)
    assert run.status == "success", run.error
    made = len([chunk for chunk in run.of("qarvd.chunk") if chunk["node"] == "3"])
    assert 2 <= made < 20
    assert stats_of(run).startswith(f"{made} chunks of 300, finished early, ")
    assert run.history["outputs"]["3"]["qarvd_stream"][0] | {"run": ""} == {
        "run": "",
        "prompt": run.prompt_id,
        "workflow": None,
        "node": "3",
        "total": 300,
        "made": made,
        "state": "early",
        "finishing": True,
    }
    video, more = (read_video(server.files(run, saver)[0]) for saver in ("4", "6"))
    assert (len(video), len(more)) == (9 + 12 * (made - 1), 12)
    assert all(float(row.split()[1]) > 60 for row in run.text("8").splitlines()[1:]), (
        "the latent is that of the images"
    )
    uncut = read_video(server.files(server.run(stream_graph(chunks=made + 1, seed=41, preview="off")), "4")[0])
    assert np.abs(np.concatenate([video, more]).astype(int) - uncut).mean() < 2  # H.264 stands between


def test_finish_with_a_start_picture_and_without_preview(server):
    graph = stream_graph(chunks=300, seed=42, preview="off")
    graph["5"] = node("EmptyImage", width=64, height=64, batch_size=1, color=255)
    graph["3"]["inputs"]["start_image"] = ["5", 0]
    run = server.submit(graph)
    end = time.monotonic() + 240
    while not [status for status in run.of("qarvd.stream") if status["made"] >= 1]:
        assert time.monotonic() < end
        time.sleep(0.02)
    finish(server, run=run.of("qarvd.stream")[0]["run"])
    server.wait(run)
    assert run.status == "success", run.error
    assert not run.of("qarvd.chunk")
    made = run.of("qarvd.stream")[-1]["made"]
    assert len(read_video(server.files(run, "4")[0])) == 9 + 12 * made


def test_finish_of_a_run_that_is_not_there(server):
    assert finish(server) == []
    status, body = server.post("/qarvd/finish", {"run": "nothing"})
    assert status == 404 and body["error"] == "no stream 'nothing' is running"


@pytest.mark.parametrize(("ended", "state"), [("interrupt", "stopped"), ("error", "failed")])
def test_how_a_run_ended_is_told(server, ended, state):
    graph = stream_graph(chunks=40, seed=43)
    if ended == "error":
        graph["5"] = node("EmptyImage", width=64, height=64, batch_size=2, color=0)  # 2 frames are no whole chunk
        graph["3"]["inputs"]["start_image"] = ["5", 0]
    run = server.submit(graph)
    if ended == "interrupt":
        wait_for_chunks(run, 1)
        server.post("/interrupt", {})
    server.wait(run)
    assert run.of("qarvd.stream")[-1]["state"] == state
    told = server.get("/qarvd/streams")[-1]
    assert (told["state"], len(told["chunks"])) == (state, len(run.of("qarvd.chunk")))


def test_the_chunks_of_a_run_are_saved_as_one_video(server):
    run = server.run(stream_graph(chunks=3, seed=44))
    name = run.of("qarvd.chunk")[0]["run"]
    with urllib.request.urlopen(f"{server.url}/qarvd/video?run={name}") as answer:
        assert "attachment" in answer.headers["Content-Disposition"]
        data = answer.read()
    frames = np.stack(list(imageio.imiter(io.BytesIO(data), plugin="pyav")))
    whole = read_video(server.files(run, "4")[0])
    assert frames.shape == whole.shape == (33, 64, 64, 3)
    assert np.abs(frames.astype(int) - whole).mean() < 3
    assert imageio.immeta(data, plugin="pyav", extension=".mp4")["fps"] == pytest.approx(16, abs=0.1)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{server.url}/qarvd/video?run=nothing")


def test_what_only_changes_how_a_result_is_shown_does_not_make_it_again(server):
    """Preview and frames per second: same latent and images to the bit, and no pass of the model."""
    if server.version < (0, 4):
        pytest.skip("this ComfyUI drops earlier results too soon: COMFYUI_PATH may name version 0.4 or later")
    first = server.run(with_stats(stream_graph(chunks=2, seed=45, preview="off")))
    seconds = stats_of(first).splitlines()[1]
    for options, chunks in (({}, 2), ({"preview": "frames"}, 0), ({"fps": 8.0}, 2)):
        run = server.run(with_stats(stream_graph(chunks=2, seed=45, **options)))
        assert run.status == "success", run.error
        assert "3" not in run.cached() and len(run.of("qarvd.chunk")) == chunks
        assert stats_of(run).splitlines()[1] == seconds, "the times of the run that made it"
    assert imageio.immeta(server.files(run, "4")[0], plugin="pyav")["fps"] == pytest.approx(8, abs=0.1)
    for options in ({"seed": 46}, {"kv_cache": "int8"}, {"num_chunks": 3}):
        graph = with_stats(stream_graph(chunks=2, seed=45))
        graph["3"]["inputs"] |= options
        assert stats_of(server.run(graph)).splitlines()[1] != seconds
    graph = with_stats(stream_graph(chunks=2, seed=45, prompt=f"{PROMPT}, again"))
    assert stats_of(server.run(graph)).splitlines()[1] != seconds


def test_sizes_go_in_steps_that_the_model_takes(nodes):
    inputs = nodes["QARVDStreamGenerate"]["input"]["optional"]
    assert inputs["width"][1]["step"] == inputs["height"][1]["step"] == 16
