"""The nodes in ComfyUI's own page, in a headless Chromium: examples open, and chunks play while the next one is made.

With `QARVD_SCREENSHOTS=folder` the README's pictures are written there, and the examples are run and pictured.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import workflows
from make_examples import EXAMPLES

pytestmark = pytest.mark.slow

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.30.0", "Comfy.Workflow.Persist": False}
SETTINGS["Comfy.Minimap.Visible"] = False  # it would lie over the nodes in the pictures
CANVAS = {"x": 60, "y": 100, "width": 1540, "height": 730}  # without the bars around it
# When each chunk arrived, and when the first was seen to play.
WATCH = """
() => {
  window.seen = { chunks: [], playing: null };
  window.comfyAPI.api.api.addEventListener("qarvd.chunk", () => window.seen.chunks.push(performance.now()));
  document.addEventListener("playing", () => { window.seen.playing ??= performance.now(); }, true);
}
"""
FIT = """
() => {
  const app = window.comfyAPI.app.app, canvas = app.canvas, nodes = app.graph.nodes ?? app.graph._nodes;
  const left = Math.min(...nodes.map((n) => n.pos[0])), top = Math.min(...nodes.map((n) => n.pos[1])) - 40;
  const right = Math.max(...nodes.map((n) => n.pos[0] + n.size[0]));
  const bottom = Math.max(...nodes.map((n) => n.pos[1] + n.size[1]));
  const box = canvas.canvas.getBoundingClientRect();
  const free = { x: 70, y: 110, width: box.width - 90, height: box.height - 180 };
  const scale = Math.min(free.width / (right - left), free.height / (bottom - top));
  canvas.ds.scale = scale;
  canvas.ds.offset[0] = free.x / scale - left + (free.width / scale - (right - left)) / 2;
  canvas.ds.offset[1] = free.y / scale - top;
  canvas.setDirty(true, true);
}
"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium, or set CHROMIUM to a browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[comfyui-test]'")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1600, "height": 900})
    opened = context.new_page()
    yield opened
    context.close()


@pytest.fixture(scope="module")
def quantized(server, nodes):
    """The model that the example "stream" wants; without calibration, as what it looks like is tested elsewhere."""
    prompt = workflows.to_prompt(workflows.load("quantize"), nodes)
    if not os.environ.get("QARVD_SCREENSHOTS"):
        prompt["3"]["inputs"] |= {"scheme": "w8a8_dynamic"}
    assert server.run(prompt).status == "success"


def open_example(server, page, name: str, vue: bool) -> None:
    server.post("/settings", {**SETTINGS, "Comfy.VueNodes.Enabled": vue})
    page.goto(f"{server.url}/?template={name}&source=qarvd")
    count = len(workflows.load(name)["nodes"])
    page.wait_for_function(
        "count => (window.comfyAPI?.app?.app?.graph?.nodes ?? []).length === count", arg=count, timeout=60000
    )
    page.wait_for_timeout(1000)


def screenshot(page, name: str) -> None:
    if folder := os.environ.get("QARVD_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def chunks_shown(page) -> int:
    return page.evaluate(
        "Math.max(0, ...[...document.querySelectorAll('.qarvd-player')].map(p => +(p.dataset.chunks ?? 0)))"
    )


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_example_opens_with_every_node_known(server, page, name):
    open_example(server, page, name, vue=False)
    missing = page.evaluate(
        "() => window.comfyAPI.app.app.graph.nodes.filter(n => n.has_errors || !LiteGraph.registered_node_types[n.type])"
        ".map(n => n.type)"
    )
    assert missing == []
    prompt = page.evaluate("async () => (await window.comfyAPI.app.app.graphToPrompt()).output")
    graph = EXAMPLES[name][0]
    assert set(prompt) == set(graph)
    for identity, entry in graph.items():
        assert prompt[identity]["class_type"] == entry["class_type"]
        for key, value in entry["inputs"].items():
            assert prompt[identity]["inputs"][key] == value, (identity, key)
    if os.environ.get("QARVD_SCREENSHOTS"):
        take_picture(server, page, name)


def take_picture(server, page, name: str) -> None:
    """The example as it looks when it has run, beside its file."""
    if name == "stream":
        server.run(workflows.to_prompt(workflows.load("quantize"), server.get("/object_info")))
        open_example(server, page, name, vue=False)
    done = len(server.get("/history"))
    page.evaluate("() => { window.comfyAPI.app.app.queuePrompt(0); }")
    while len(server.get("/history")) == done:
        page.wait_for_timeout(500)
    page.wait_for_timeout(4000)
    page.evaluate(FIT)
    page.wait_for_timeout(1000)
    page.screenshot(path=workflows.EXAMPLES / f"{name}.jpg", type="jpeg", quality=85, clip=CANVAS)


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_chunks_play_while_the_next_one_is_made(server, page, quantized, vue):
    open_example(server, page, "stream", vue)
    page.evaluate(FIT)
    page.evaluate(WATCH)
    seed = int(time.time()) + vue
    page.evaluate(
        "seed => { const a = window.comfyAPI.app.app, n = a.graph.nodes.find(n => n.type === 'QARVDStreamGenerate');"
        "n.widgets.find(w => w.name === 'seed').value = seed; a.queuePrompt(0); }",
        seed,
    )
    page.wait_for_function("window.seen.chunks.length >= 2", timeout=240000)
    page.wait_for_timeout(500)
    shown = chunks_shown(page)
    assert 2 <= shown < 7
    state = page.evaluate(
        "() => { const v = [...document.querySelectorAll('.qarvd-player video')].find(v => v.style.visibility === 'visible');"
        "const b = v.getBoundingClientRect();"
        "return { ready: v.readyState, width: v.videoWidth, error: v.error?.message, box: [b.width, b.height] }; }"
    )
    assert state["error"] is None and state["ready"] >= 2 and state["width"] == 64
    assert min(state["box"]) > 60
    screenshot(page, f"streaming_{'vue' if vue else 'canvas'}")
    page.wait_for_function(
        "[...document.querySelectorAll('.qarvd-player')].some(p => +p.dataset.chunks === 7)", timeout=240000
    )
    seen = page.evaluate("window.seen")
    assert len(seen["chunks"]) == 7
    assert seen["playing"] < seen["chunks"][1], "the first chunk plays before the second is finished"
    page.wait_for_timeout(1500)
    screenshot(page, f"finished_{'vue' if vue else 'canvas'}")
