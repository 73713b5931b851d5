"""The nodes in ComfyUI's own page, in a headless Chromium and in both renderers: examples open, chunks play while the
next one is made, and what a node shows stays with it.

With `QARVD_SCREENSHOTS=folder` the README's pictures are written there, and the examples are run and pictured.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import workflows
from comfy_page import (
    APP,
    STREAM,
    WAIT,
    chunks_shown,
    latest_outputs,
    open_example,
    open_in_a_new_tab,
    open_tab,
    run_stream,
    search,
    visible_video,
    wait_for_caption,
    wait_for_chunks,
    wait_for_graph,
    wait_until_idle,
)
from graphs import BUNDLED, node, quantize_graph, read_video
from make_examples import EXAMPLES

pytestmark = pytest.mark.slow

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
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


def screenshot(page, name: str) -> None:
    if folder := os.environ.get("QARVD_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_example_opens_with_every_node_known(server, page, name):
    open_example(server, page, name, vue=False)
    missing = page.evaluate(
        "() => window.comfyAPI.app.app.graph.nodes.filter(n => n.has_errors || "
        "!LiteGraph.registered_node_types[n.type]).map(n => n.type)"
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


def test_widgets_show_the_names_of_the_library_and_keep_those_of_saved_workflows(server, page):
    open_example(server, page, "compare", vue=False)
    labels = page.evaluate(
        f"Object.fromEntries({APP}.graph.nodes.flatMap(n => (n.widgets ?? []).map(w => [w.name, w.label ?? w.name])))"
    )
    expected = {
        "timesteps": "denoising_timesteps",
        "kv_window": "local_attention_frames",
        "sink": "sink_frames",
        "frame_weighting": "chunk_weights",
        "exclude_layers": "modules_to_not_convert",
        "kv_cache": "kv_cache",
    }
    assert {name: labels[name] for name in expected} == expected


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


@RENDERERS
def test_chunks_play_while_the_next_one_is_made(server, page, quantized, tmp_path, vue):
    open_example(server, page, "stream", vue)
    page.evaluate(FIT)
    page.evaluate(WATCH)
    run_stream(page)
    page.wait_for_function("window.seen.chunks.length >= 2", timeout=WAIT)
    page.wait_for_timeout(500)
    assert 2 <= chunks_shown(page) < 7
    state = visible_video(page)
    assert state["error"] is None and state["ready"] >= 2 and state["width"] == 64
    assert min(state["box"]) > 60
    screenshot(page, f"streaming_{'vue' if vue else 'canvas'}")
    wait_for_caption(page, "all 7 chunks made")
    seen = page.evaluate("window.seen")
    assert len(seen["chunks"]) == 7
    assert seen["playing"] < seen["chunks"][1], "the first chunk plays before the second is finished"
    wait_until_idle(server)
    page.wait_for_timeout(1500)
    screenshot(page, f"finished_{'vue' if vue else 'canvas'}")
    check_controls(page, tmp_path)


def check_controls(page, folder: Path) -> None:
    """Of the player that shows seven chunks."""
    page.locator(".qarvd-pause").click()
    page.wait_for_timeout(300)
    held = visible_video(page)
    page.wait_for_timeout(2000)  # longer than a chunk
    assert held["paused"] and visible_video(page) == held
    page.locator(".qarvd-pause").click()
    page.wait_for_function(
        "src => [...document.querySelectorAll('.qarvd-player video')].some(v => v.style.visibility === 'visible'"
        "&& v.src !== src && !v.paused)",
        arg=held["src"],
        timeout=10000,
    )
    with page.expect_download() as download:
        page.locator(".qarvd-save").click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    assert path.suffix == ".mp4" and len(read_video(path)) == 81
    page.locator(".qarvd-fullscreen").click()
    page.wait_for_function("document.fullscreenElement?.classList.contains('qarvd-player')", timeout=5000)
    page.evaluate("document.exitFullscreen()")
    assert page.locator(".qarvd-finish").is_hidden()
    check_preview_off(page)


def check_preview_off(page) -> None:
    """Where nothing plays there is a line of text and no box, and either lies inside its node."""
    sizes = []
    for preview in ("video", "off"):
        page.evaluate(
            f"value => {{ const w = {STREAM}.widgets.find(w => w.name === 'preview'); w.value = value; "
            f"w.callback(value); }}",
            preview,
        )
        page.wait_for_timeout(700)
        sizes.append(
            page.evaluate(
                f"() => {{ const ds = {APP}.canvas.ds, n = {STREAM}, view = "
                f"{APP}.canvas.canvas.getBoundingClientRect();"
                "const box = document.querySelector('.qarvd-player').getBoundingClientRect();"
                "const bottom = (n.pos[1] + n.size[1] + ds.offset[1]) * ds.scale + view.top;"
                "return { height: box.height / ds.scale, left: bottom - box.bottom }; }"
            )
        )
    assert sizes[0]["height"] > 150 and 20 < sizes[1]["height"] < 60
    assert all(size["left"] >= -1 for size in sizes), sizes


@RENDERERS
def test_a_stream_is_finished_from_its_player(server, page, quantized, vue):
    open_example(server, page, "stream", vue)
    run_stream(page, num_chunks=300)
    wait_for_chunks(page, 2)
    page.locator(".qarvd-finish").click()
    wait_for_caption(page, "finished early after")
    wait_until_idle(server)
    made = chunks_shown(page)
    assert 2 <= made < 20
    entry = latest_outputs(server)["4"]["images"][0]
    assert len(read_video(server.base / entry["type"] / entry["subfolder"] / entry["filename"])) == 9 + 12 * (made - 1)


def test_a_stopped_stream_says_so(server, page, quantized):
    open_example(server, page, "stream", vue=False)
    run_stream(page, num_chunks=40)
    wait_for_chunks(page, 2)
    server.post("/interrupt", {})
    wait_for_caption(page, "stopped after")
    assert page.locator(".qarvd-player img").is_hidden() and page.locator(".qarvd-finish").is_hidden()


@RENDERERS
def test_a_stream_stays_in_its_tab(server, page, quantized, vue):
    """Other tabs have a node of that id, too: of another kind or of the same."""
    open_example(server, page, "stream", vue)
    run_stream(page, num_chunks=12)
    wait_for_chunks(page, 2)
    open_in_a_new_tab(page, workflows.load("quantize"), "other kind")
    assert page.locator(".qarvd-player").count() == 0
    open_in_a_new_tab(page, workflows.load("image_to_video"), "same kind")
    wait_until_idle(server)
    page.wait_for_timeout(500)
    assert chunks_shown(page) == 0
    open_tab(page, "other kind")
    assert page.locator(".qarvd-player").count() == 0
    open_tab(page, "stream")
    wait_for_chunks(page, 12)
    wait_for_caption(page, "all 12 chunks made")
    page.wait_for_timeout(500)
    assert visible_video(page)["width"] == 64


@RENDERERS
def test_a_result_of_the_same_graph_in_another_tab_is_shown_there_too(server, page, quantized, vue):
    """ComfyUI keeps the first tab's result and hands it to the second."""
    open_example(server, page, "stream", vue)
    seed = int(time.time()) + vue
    run_stream(page, num_chunks=1, seed=seed)
    wait_for_caption(page, "all 1 chunks made")
    wait_until_idle(server)
    open_in_a_new_tab(page, workflows.load("stream"), "again")
    assert chunks_shown(page) == 0
    run_stream(page, num_chunks=1, seed=seed)
    wait_for_caption(page, "all 1 chunks made")
    open_tab(page, "stream")
    wait_for_caption(page, "all 1 chunks made")
    open_tab(page, "again")
    wait_for_caption(page, "all 1 chunks made")


@RENDERERS
def test_a_stream_survives_a_reload(server, page, quantized, vue):
    open_example(server, page, "stream", vue, **{"Comfy.Workflow.Persist": True})
    run_stream(page, num_chunks=12)
    wait_for_chunks(page, 3)
    page.wait_for_timeout(1000)  # until ComfyUI has stored the tab
    page.goto(server.url)
    wait_for_graph(page, "stream")
    wait_for_caption(page, "all 12 chunks made")
    assert chunks_shown(page) == 12
    shown = set()
    for _ in range(40):
        page.wait_for_timeout(250)
        shown.add(visible_video(page)["src"])
    assert len(shown) > 3, "it plays on, from the first chunk again"
    page.goto(server.url)
    wait_for_graph(page, "stream")
    wait_for_caption(page, "all 12 chunks made")


@RENDERERS
def test_nodes_that_report_in_words_show_them(server, page, nodes, vue):
    graph = quantize_graph("w8a16", "words")
    graph["14"] = node("QARVDInfo", pipeline=["12", 0])
    graph["15"] = node("EmptyImage", width=64, height=64, batch_size=9, color=0)
    graph["16"] = node("QARVDCompare", images_a=["15", 0], images_b=["15", 0], label_a="a", label_b="b")
    places = {identity: (420 * (n % 3), 420 * (n // 3), 380, 380) for n, identity in enumerate([*graph, "note"])}
    open_example(server, page, "quantize", vue)
    open_in_a_new_tab(page, workflows.to_workflow(graph, places, "words", nodes), "words")
    page.evaluate(FIT)
    page.evaluate(f"{APP}.queuePrompt(0)")
    page.wait_for_function(
        "[...document.querySelectorAll('.qarvd-text')].filter(box => box.textContent).length === 3", timeout=WAIT
    )
    wait_until_idle(server)
    page.wait_for_timeout(700)

    def shown() -> set[str]:
        boxes = page.locator(".qarvd-text")
        return {boxes.nth(n).inner_text() for n in range(boxes.count()) if boxes.nth(n).is_visible()}

    outputs = latest_outputs(server)
    expected = {"\n".join(outputs[identity]["text"]) for identity in ("13", "14", "16")}
    assert len(expected) == 3 and all(expected) and shown() == expected
    screenshot(page, f"words_{'vue' if vue else 'canvas'}")
    open_tab(page, "quantize")
    open_tab(page, "words")
    assert shown() == expected


def test_nodes_are_found_by_what_people_call_them(server, page):
    if server.version < (0, 10):
        pytest.skip("this ComfyUI has no search aliases: COMFYUI_PATH may name version 0.10 or later")
    open_example(server, page, "stream", vue=False)
    entries = {"Q-ARVD Load Pipeline", "Q-ARVD Load Quantized", "Q-ARVD Stream Generate"}
    for words in ("self forcing", "causvid", "longlive", "krea realtime"):
        assert entries <= set(search(page, words)[:14]), words
    for words in ("wan", "image to video"):  # behind the nodes that have the words in their names
        assert entries <= set(search(page, words)), words


def test_a_quantize_node_from_the_menu_calibrates_once(server, page):
    """Nothing changes its seed between runs; a saved workflow's own choice is kept."""
    open_example(server, page, "stream", vue=True)
    page.evaluate(f"{APP}.graph.clear()")
    for name, x in (("Q-ARVD Calibration Prompts", 700), ("Q-ARVD Quantize", 1200)):
        search(page, name)
        page.keyboard.press("Enter")
        page.wait_for_timeout(500)
        page.mouse.click(x, 300)  # puts the node down
        page.wait_for_timeout(500)
    page.evaluate(
        f"model => {{ const g = {APP}.graph, add = type => {{ const n = LiteGraph.createNode(type); g.add(n); return "
        f"n; }};"
        "const find = type => g.nodes.find(n => n.type === type), put = (n, name, v) => n.widgets.find(w => w.name "
        "=== name).value = v;const prompts = find('QARVDCalibrationPrompts'), quantize = "
        "find('QARVDQuantize');put(prompts, 'text', 'a small green square'); put(quantize, 'scheme', 'w8a16');const "
        "load = add('QARVDLoadPipeline'), info = add('QARVDInfo'); put(load, 'model', model);load.connect(0, "
        "quantize, 'pipeline'); prompts.connect(0, quantize, 'calibration'); quantize.connect(0, info, 'pipeline');}",
        BUNDLED,
    )
    for number in range(3):
        page.evaluate(f"{APP}.queuePrompt(0)")
        page.wait_for_timeout(500)
        wait_until_idle(server)
        page.wait_for_timeout(500)
        entry = list(server.get("/history").values())[-1]
        messages = dict(entry["status"]["messages"])
        assert entry["status"]["status_str"] == "success"
        left = set(entry["prompt"][2]) - set(messages["execution_cached"]["nodes"])
        assert bool(left) == (number == 0), left
    graph = workflows.load("quantize")
    for entry in graph["nodes"]:
        if entry["type"] == "QARVDQuantize":
            entry["widgets_values"][entry["widgets_values"].index("fixed")] = "randomize"
    open_in_a_new_tab(page, graph, "saved")
    values = page.evaluate(
        f"Object.fromEntries({APP}.graph.nodes.filter(n => n.type.startsWith('QARVD')).map(n =>"
        "[n.type, n.widgets.find(w => w.name === 'control_after_generate')?.value]))"
    )
    assert (values["QARVDQuantize"], values["QARVDCalibrationPrompts"]) == ("randomize", "fixed")
