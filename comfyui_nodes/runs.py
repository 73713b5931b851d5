"""Keep the runs of Stream Generate for the page, and serve its routes: list, finish early, save."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import uuid
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import av
import comfy.model_management
import folder_paths
from aiohttp import web
from server import PromptServer

from .steering import pressed

STREAM_EVENT = "qarvd.stream"
KEPT = 64  # runs that the page can request


class Run:
    """Describe one run of a node.

    Args:
        node_id: the node's unique id; inside a subgraph it has the form `29:12`.
        workflow: id of the graph in the page; None if the prompt came without one. A node id alone is ambiguous: every
            open tab has a node 3.
        total: chunks to generate.

    Attributes:
        id: id of the run.
        prompt: id of the prompt.
        chunks: what `ChunkFeed` wrote.
        made: chunks generated so far.
        state: running, done, early (finished before all were made), stopped or failed.
        finishing: the user asked to finish after the current chunk.
        keys: keys that steer the run, empty if nothing does.
        steer: takes controls for the next chunks, or None.
    """

    def __init__(self, node_id: str, workflow: str | None, total: int) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.prompt = PromptServer.instance.last_prompt_id
        self.node_id, self.workflow, self.total = node_id, workflow, total
        self.chunks: list[dict[str, Any]] = []
        self.made = 0
        self.state = "running"
        self.finishing = False
        self.keys: list[str] = []
        self.steer: Callable[[Any], None] | None = None

    def status(self) -> dict[str, Any]:
        """Return the run as JSON types, for the page."""
        return {
            "run": self.id,
            "prompt": self.prompt,
            "workflow": self.workflow,
            "node": self.node_id,
            "total": self.total,
            "made": self.made,
            "state": self.state,
            "finishing": self.finishing,
            "keys": self.keys,
        }

    def announce(self) -> None:
        """Send the run's status to the page."""
        send(STREAM_EVENT, self.status())

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Register the run, and record and announce how the work in the `with` block ended."""
        _remember(self.id, self)
        self.announce()
        try:
            yield
            self.state = "early" if self.made < self.total else "done"
        except comfy.model_management.InterruptProcessingException:
            self.state = "stopped"
            raise
        finally:
            if self.state == "running":
                self.state = "failed"
            self.steer = None  # it holds the stream
            self.announce()


_runs: dict[str, Run] = {}


def _remember(key: str, run: Run) -> None:
    """Register a run, and forget the oldest ones beyond `KEPT`."""
    _runs[key] = run
    for old in list(_runs)[:-KEPT]:
        del _runs[old]


def workflow_id(extra_pnginfo: dict[str, Any] | None) -> str | None:
    """Return the id of the graph that a prompt came from, out of what ComfyUI writes into pictures."""
    return ((extra_pnginfo or {}).get("workflow") or {}).get("id")


def send(event: str, data: dict[str, Any]) -> None:
    """Send an event to the browser that queued the prompt."""
    server = PromptServer.instance
    server.send_sync(event, data, server.client_id)


def register() -> None:
    """Add the routes to ComfyUI's server."""
    routes = PromptServer.instance.routes
    if any(route.path == "/qarvd/streams" for route in routes):
        return  # the pack is installed twice; a second route of this name would keep the server from starting
    routes.get("/qarvd/streams")(_streams)
    routes.post("/qarvd/cached")(_cached)
    routes.post("/qarvd/finish")(_finish)
    routes.post("/qarvd/controls")(_controls)
    routes.get("/qarvd/video")(_video)


async def _streams(request: web.Request) -> web.Response:
    """Return the runs, oldest first, with their chunks; `?workflow=` leaves out those of other graphs."""
    workflow = request.query.get("workflow")
    wanted = [run for run in list(_runs.values()) if workflow in (None, run.workflow)]
    return web.json_response([{**run.status(), "chunks": run.chunks} for run in wanted])


async def _cached(request: web.Request) -> web.Response:
    """Assign a cached result, which another prompt made, to the graph of this prompt as well.

    The page alone cannot tell which of its tabs a result belongs to.
    """
    asked = await request.json()
    queue = PromptServer.instance.prompt_queue
    items = [*queue.currently_running.values(), *(entry["prompt"] for entry in queue.history.values())]
    extra = next((item[3] for item in items if item[1] == asked.get("prompt")), {})
    workflow = workflow_id(extra.get("extra_pnginfo"))
    run = copy.copy(_runs.get(asked.get("run")))
    if run is not None and workflow != run.workflow:
        run.workflow = workflow
        _remember(f"{run.id} {workflow}", run)
    return web.json_response({"workflow": workflow})


async def _finish(request: web.Request) -> web.Response:
    """End one run, or all running ones, after the chunk in progress; the chunks made so far become the outputs."""
    wanted = (await request.json()).get("run") if request.can_read_body else None
    found = [run for run in list(_runs.values()) if run.state == "running" and wanted in (None, run.id)]
    if wanted is not None and not found:
        return web.json_response({"error": f"no stream {wanted!r} is running"}, status=404)
    for run in found:
        run.finishing = True
        run.announce()
    return web.json_response({"finishing": [run.id for run in found]})


async def _controls(request: web.Request) -> web.Response:
    """Steer a running stream from its next chunk on, by the keys that are held and by the mouse."""
    values = await request.json()
    run = _runs.get(values.get("run"))
    if run is None or run.steer is None:
        return web.json_response({"error": f"no stream {values.get('run')!r} that can be steered runs"}, status=404)
    try:
        run.steer(pressed(values))
    except (ValueError, TypeError) as error:
        return web.json_response({"error": str(error)}, status=400)
    return web.json_response({"keys": values.get("keys", "")})


async def _video(request: web.Request) -> web.Response:
    """Return the chunks of a run made so far as one mp4 file."""
    run = _runs.get(request.query.get("run", ""))
    folder = folder_paths.get_temp_directory()
    paths = [os.path.join(folder, chunk["subfolder"], chunk["filename"]) for chunk in run.chunks] if run else []
    if not paths or not all(os.path.isfile(path) for path in paths):
        return web.json_response({"error": "the chunks of this run no longer exist; run it again"}, status=404)
    name = {"Content-Disposition": f'attachment; filename="qarvd_{run.id}.mp4"'}
    return web.Response(body=await asyncio.to_thread(_one_video, paths), content_type="video/mp4", headers=name)


def _one_video(paths: list[str]) -> bytes:
    """Concatenate videos of one encoder, without encoding them again."""
    file = BytesIO()
    with av.open(file, "w", format="mp4") as target:
        track, begin = None, 0
        for path in paths:
            with av.open(path) as source:
                part = source.streams.video[0]
                track = track or target.add_stream_from_template(part)
                for packet in source.demux(part):
                    if packet.dts is None:  # marks the end
                        continue
                    packet.pts, packet.dts = packet.pts + begin, packet.dts + begin
                    packet.stream = track
                    target.mux(packet)
                begin += part.duration
    return file.getvalue()
