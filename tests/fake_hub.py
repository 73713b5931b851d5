"""A Hub on loopback that keeps repositories in memory: enough of the HTTP API to create, upload, list and download.

The real `huggingface_hub` client talks to it (`HF_ENDPOINT`), so what is tested is what users run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """`with FakeHub() as hub:` serves; `hub.files[repo][path]` are the bytes that arrived, `hub.requests` the log."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that point a fresh process's client here."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_fake",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, body: object = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return answer(self, body, *match.groups())
        return self.reply({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        self.hub.files.setdefault(repo, {})
        self.reply({"url": f"{self.hub.url}/{repo}", "name": repo, "id": "0"})

    def preupload(self, body: bytes, repo: str) -> None:
        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        self.reply({"files": modes})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.hub.url}/upload/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        self.reply({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.reply({})

    def commit(self, body: bytes, repo: str) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[repo][value["path"]] = self.hub.objects[value["oid"]]
        self.reply(
            {"commitUrl": f"{self.hub.url}/{repo}/commit/{_COMMIT}", "commitOid": _COMMIT, "pullRequestUrl": None}
        )

    def info(self, body: bytes, repo: str) -> None:
        if repo not in self.hub.files:
            return self.reply({"error": "no such repository"}, 404, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": name} for name in sorted(self.hub.files[repo])]
        return self.reply(
            {
                "_id": "0",
                "id": repo,
                "modelId": repo,
                "sha": _COMMIT,
                "private": False,
                "tags": [],
                "siblings": siblings,
            }
        )

    def tree(self, body: bytes, repo: str) -> None:
        self.reply(
            [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in sorted(self.hub.files[repo].items())
            ]
        )

    def resolve(self, body: bytes, repo: str, name: str) -> None:
        data = self.hub.files.get(repo, {}).get(name)
        if data is None:
            return self.reply({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": _COMMIT, "Accept-Ranges": "bytes"}
        return self.reply(data, headers=headers)


_REPO = r"([^/]+/[^/]+)"
_ROUTES = [
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), rf"/api/models/{_REPO}/preupload/[^/]+", _Handler.preupload),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/upload/([0-9a-f]+)", _Handler.upload),
    (("POST",), rf"/api/models/{_REPO}/commit/[^/]+", _Handler.commit),
    (("GET",), rf"/api/models/{_REPO}/tree/[^/]+", _Handler.tree),
    (("GET",), rf"/api/models/{_REPO}(?:/revision/[^/]+)?", _Handler.info),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/[^/]+/(.+)", _Handler.resolve),
    (("POST",), r"/api/validate-yaml", lambda handler, body: handler.reply({"errors": [], "warnings": []})),
]
