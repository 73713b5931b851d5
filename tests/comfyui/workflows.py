"""Between ComfyUI's two forms of a workflow: the API's prompt and the editor's graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "example_workflows"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")


def _inputs(definition: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> (type, options) of a node's inputs, in order."""
    found = {}
    for kind in ("required", "optional"):
        for name, spec in definition["input"].get(kind, {}).items():
            found[name] = (spec[0], spec[1] if len(spec) > 1 else {})
    return found


def _is_widget(kind: Any, options: dict[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput")


def widget_names(definition: dict[str, Any]) -> list[str | None]:
    """The widget each saved value belongs to; None is the seed's "what to do after a run"."""
    names: list[str | None] = []
    for name, (kind, options) in _inputs(definition).items():
        if _is_widget(kind, options):
            names.append(name)
            if options.get("control_after_generate") or (kind == "INT" and name in ("seed", "noise_seed")):
                names.append(None)
    return names


def to_prompt(workflow: dict[str, Any], nodes: dict[str, Any]) -> dict[str, Any]:
    """The API's prompt of an editor graph; `nodes` is the server's `/object_info`."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        names = widget_names(nodes[node["type"]])
        inputs = {name: value for name, value in zip(names, node.get("widgets_values", []), strict=False) if name}
        inputs |= {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot.get("link") is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def load(name: str) -> dict[str, Any]:
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


def to_workflow(
    prompt: dict[str, Any], places: dict[str, tuple[int, int, int, int]], note: str, nodes: dict[str, Any]
) -> dict[str, Any]:
    """An editor graph of an API prompt.

    Args:
        prompt: node id -> class and inputs.
        places: node id -> x, y, width, height; the note's under "note".
        note: text beside the graph.
        nodes: the server's `/object_info`.
    """
    links: list[list] = []
    graph = {
        identity: _node(identity, entry, places[identity], nodes[entry["class_type"]])
        for identity, entry in prompt.items()
    }
    for identity, entry in prompt.items():
        for slot, socket in enumerate(graph[identity]["inputs"]):
            source = entry["inputs"].get(socket["name"])
            if isinstance(source, list):
                link = len(links) + 1
                output = graph[source[0]]["outputs"][source[1]]
                links.append([link, int(source[0]), source[1], int(identity), slot, output["type"]])
                socket["link"] = link
                output["links"].append(link)
    x, y, width, height = places["note"]
    last = max(map(int, prompt)) + 1
    graph["note"] = {
        "id": last,
        "type": "MarkdownNote",
        "pos": [x, y],
        "size": [width, height],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [note],
    }
    return {
        "last_node_id": last,
        "last_link_id": len(links),
        "nodes": list(graph.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _node(
    identity: str, entry: dict[str, Any], place: tuple[int, int, int, int], definition: dict[str, Any]
) -> dict[str, Any]:
    values, sockets = [], []
    names = widget_names(definition)
    inputs = _inputs(definition)
    for name in names:
        values.append("fixed" if name is None else entry["inputs"].get(name, inputs[name][1].get("default")))
    for name, (kind, options) in inputs.items():
        if not _is_widget(kind, options):
            sockets.append({"name": name, "type": kind, "link": None})
    return {
        "id": int(identity),
        "type": entry["class_type"],
        "pos": list(place[:2]),
        "size": list(place[2:]),
        "flags": {},
        "order": int(identity),
        "mode": 0,
        "inputs": sockets,
        "outputs": [
            {"name": name, "type": kind, "links": [], "slot_index": slot}
            for slot, (name, kind) in enumerate(zip(definition["output_name"], definition["output"], strict=True))
        ],
        "properties": {"Node name for S&R": entry["class_type"]},
        "widgets_values": values,
    }
