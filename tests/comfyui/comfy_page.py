"""What tests do in ComfyUI's page, as a user would: open examples and tabs, run, search, look at the player."""

from __future__ import annotations

import time

import workflows

SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.30.0", "Comfy.Workflow.Persist": False}
WAIT = 120_000  # ms; longer than anything takes
SETTINGS["Comfy.Minimap.Visible"] = False  # it would lie over the nodes in the pictures
APP = "window.comfyAPI.app.app"
STREAM = f"{APP}.graph.nodes.find(n => n.type === 'QARVDStreamGenerate')"


def open_example(server, page, name: str, vue: bool, **settings) -> None:
    server.post("/settings", {**SETTINGS, "Comfy.VueNodes.Enabled": vue, **settings})
    page.goto(f"{server.url}/?template={name}&source=qarvd")
    wait_for_graph(page, name)


def wait_for_graph(page, name: str) -> None:
    count = len(workflows.load(name)["nodes"])
    page.wait_for_function(
        "count => (window.comfyAPI?.app?.app?.rootGraph?.nodes ?? []).length === count", arg=count, timeout=WAIT
    )
    page.wait_for_timeout(1000)


def open_in_a_new_tab(page, workflow: dict, name: str) -> None:
    page.evaluate(f"([graph, name]) => {APP}.loadGraphData(graph, true, true, name)", [workflow, name])
    page.wait_for_timeout(1000)


def open_tab(page, name: str) -> None:
    page.locator(".workflow-tab", has_text=name).first.click()
    page.wait_for_timeout(1000)


def run_stream(page, **values) -> None:
    """Set widgets of the stream node and press Run; every run is another one."""
    page.evaluate(
        f"values => {{ for (const [name, value] of Object.entries(values)) {STREAM}.widgets.find(w => w.name === name)"
        f".value = value; {APP}.queuePrompt(0); }}",
        {"seed": int(time.time() * 1000) % 2**32, **values},
    )


def wait_for_chunks(page, count: int) -> None:
    page.wait_for_function(
        "count => [...document.querySelectorAll('.qarvd-player')].some(p => +(p.dataset.chunks ?? 0) >= count)",
        arg=count,
        timeout=WAIT,
    )


def wait_for_caption(page, text: str) -> None:
    page.wait_for_function(
        "text => [...document.querySelectorAll('.qarvd-caption')].some(c => c.textContent.includes(text))",
        arg=text,
        timeout=WAIT,
    )


def wait_until_idle(server) -> None:
    end = time.monotonic() + WAIT / 1000
    while server.get("/prompt")["exec_info"]["queue_remaining"]:
        assert time.monotonic() < end
        time.sleep(0.1)


def visible_video(page) -> dict:
    return page.evaluate(
        "() => { const v = [...document.querySelectorAll('.qarvd-player video')].find(v => v.style.visibility === 'visible');"
        "const b = v.getBoundingClientRect(); return { ready: v.readyState, width: v.videoWidth, error: v.error?.message,"
        "paused: v.paused, src: v.src, box: [b.width, b.height] }; }"
    )


def latest_outputs(server) -> dict:
    return list(server.get("/history").values())[-1]["outputs"]


def chunks_shown(page) -> int:
    return page.evaluate(
        "Math.max(0, ...[...document.querySelectorAll('.qarvd-player')].map(p => +(p.dataset.chunks ?? 0)))"
    )


def search(page, text: str) -> list[str]:
    """What the search box lists; it stays open."""
    page.keyboard.press("Escape")
    page.wait_for_timeout(500)
    page.mouse.dblclick(300, 780)
    page.wait_for_selector("[role=option]")
    page.keyboard.type(text)
    page.wait_for_timeout(1500)
    return page.evaluate("[...document.querySelectorAll('[role=option]')].map(e => e.innerText.split('\\n')[0])")
