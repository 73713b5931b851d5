"""Steering a world model in ComfyUI: by lines in the node, by its route while it runs, by keys in its player."""

from __future__ import annotations

import json
import os
import shutil
import time

import numpy as np
import pytest
import workflows
from comfy_page import APP, SETTINGS, WAIT, run_stream, wait_for_chunks
from graphs import node, read_video, stream_graph
from PIL import Image
from tiny_pipeline import build_world

pytestmark = pytest.mark.slow

LINES = '{"keys": "w"}\n{"chunk": 1, "keys": "d arrowup"}'
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def graph(server):
    build_world().save_pretrained(server.base / "models" / "qarvd" / "world")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(server.base / "input" / "start.png")

    def build(**options):
        source = node("QARVDLoadPipeline", model="world")
        options = {"width": 48, "height": 32, "start_image": ["7", 0], **options}
        return {**stream_graph(source, prompt="a red circle", **options), "7": node("LoadImage", image="start.png")}

    return build


def video(server, run):
    assert run.status == "success", run.error
    return read_video(server.files(run, "4")[0])


def test_lines_of_controls(server, graph):
    still, steered = (video(server, server.run(graph(controls=text))) for text in ("", LINES))
    assert still.shape == steered.shape and not np.array_equal(still, steered)
    assert "3" in server.run(graph(controls=LINES)).cached()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"controls": '{"keys": "w"}\n{"keys": "x"}'}, "controls, line 2: keys are 'x'"),
        ({"controls": '{"chunk": 5, "keys": "w"}'}, "controls has controls for chunk 5, the video has 2 chunks"),
        ({"controls": '{"event": "rain"}'}, "controls of chunk 0 have the event 'rain', but the pipeline has no text"),
        ({"start_image": None}, "goes on from a picture"),
    ],
)
def test_errors_by_name(server, graph, options, problem):
    prompt = graph(**options)
    if options.get("start_image", 0) is None:
        del prompt["3"]["inputs"]["start_image"]
    run = server.run(prompt)
    assert run.status == "error" and problem in run.error


def test_a_model_that_takes_none(server):
    run = server.run(stream_graph(controls='{"keys": "w"}', chunks=1))
    assert run.status == "error" and "this model takes none" in run.error


def test_the_route_steers_a_running_stream(server, graph):
    run = server.submit(graph(chunks=300, seed=5, preview="off"))
    end = time.monotonic() + 120
    while not (going := [s for s in run.of("qarvd.stream") if s["made"] >= 1 and s.get("keys")]):
        assert time.monotonic() < end
        time.sleep(0.02)
    (name,) = {status["run"] for status in going}
    assert "arrowleft" in going[0]["keys"]
    assert server.post("/qarvd/controls", {"run": name, "keys": "w", "mouse": [5, 0]}) == (200, {"keys": "w"})
    status, body = server.post("/qarvd/controls", {"run": name, "keys": "x"})
    assert status == 400 and "keys are 'x'" in body["error"]
    server.post("/qarvd/finish", {"run": name})
    server.wait(run)
    assert run.status == "success", run.error
    status, body = server.post("/qarvd/controls", {"run": name, "keys": "w"})
    assert status == 404 and "can be steered" in body["error"]


def test_keys_in_the_player(server, graph, nodes):
    """A held key is told to the server, and shown; letting it go is too."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium, or set CHROMIUM to a browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[comfyui-test]'")
    prompt = graph(chunks=300)
    places = {key: (60 + 400 * i, 100, 360, 600) for i, key in enumerate([*prompt, "note"])}
    editor = workflows.to_workflow(prompt, places, "", nodes)
    sent = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 2600, "height": 900})
        page.on("request", lambda r: sent.append(json.loads(r.post_data)) if "/qarvd/controls" in r.url else None)
        server.post("/settings", {**SETTINGS, "Comfy.VueNodes.Enabled": False})
        page.goto(server.url)
        page.wait_for_function("() => window.comfyAPI?.app?.app?.graph", timeout=WAIT)
        page.wait_for_timeout(1000)
        page.evaluate(f"graph => {APP}.loadGraphData(graph)", editor)
        page.wait_for_timeout(1000)
        run_stream(page)
        wait_for_chunks(page, 2)
        page.evaluate("() => document.querySelector('.qarvd-player').focus()")
        for key, caption in (("w", "· w"), ("ArrowLeft", "· w arrowleft")):
            page.keyboard.down(key)
            page.wait_for_function(
                "text => document.querySelector('.qarvd-caption').textContent.endsWith(text)", arg=caption
            )
        page.keyboard.up("w")
        page.keyboard.up("ArrowLeft")
        page.wait_for_timeout(300)
        if folder := os.environ.get("QARVD_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/steered.png")
        page.evaluate("() => document.querySelector('.qarvd-finish').click()")
        browser.close()
    assert [one["keys"] for one in sent] == ["w", "w arrowleft", "arrowleft", ""]
