"""A fake Hugging Face Hub: the endpoints that its client uses to create a repository and to send and read files."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def asked_private(created: dict[str, Any]) -> bool:
    """Whether a private repository was requested; the key that the client sends depends on its version."""
    return created.get("visibility") == "private" or created.get("private") is True


@dataclass
class Hub:
    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """Committed contents, by `repository@branch/path`."""
    requests: list[str] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    public: set[str] = field(default_factory=set)
    broken: str | None = None
    """Requests with this text in their path are answered with status 500."""
    uploads: dict[str, bytes] = field(default_factory=dict)

    def post(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            name = "{organization}/{name}".format(**self.created[-1])
            known = name in self.public or self.created[:-1] != []
            return (409 if known else 200), {"url": f"{self.address}/{name}", "error": "exists"}
        if path == "/api/validate-yaml":
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.address}/upload/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        repository, action, branch = "/".join(parts[2:4]), parts[4], parts[5]
        if action == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": modes}
        if action == "branch":
            return 201, {}
        if action == "commit":
            for line in map(json.loads, body.splitlines()):
                value, place = line["value"], f"{repository}@{branch}"
                if line["key"] == "file":
                    self.files[f"{place}/{value['path']}"] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[f"{place}/{value['path']}"] = self.uploads[value["oid"]]
            return 200, {"commitUrl": f"{self.address}/{repository}/commit/{COMMIT}", "commitOid": COMMIT}
        return 404, {}

    def get(self, path: str) -> tuple[int, bytes]:
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            repository = "/".join(parts[2:4])
            names = [name.partition("/")[2] for name in self.paths(repository)]
            answer = {
                "id": repository,
                "sha": COMMIT,
                "private": repository not in self.public,
                "siblings": [{"rfilename": name} for name in names],
            }
            if "tree" in parts:
                answer = [
                    {"type": "file", "path": n, "oid": COMMIT, "size": len(self.read(repository, n))} for n in names
                ]
            return 200, json.dumps(answer).encode()
        repository, name = "/".join(parts[:2]), "/".join(parts[4:])
        content = self.read(repository, name)
        return (404, b"") if content is None else (200, content)

    def paths(self, repository: str) -> list[str]:
        return [key.partition("@")[2] for key in self.files if key.startswith(f"{repository}@")]

    def read(self, repository: str, name: str) -> bytes | None:
        return self.files.get(f"{repository}@main/{name}")


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that runs until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def handle_any(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if hub.broken is not None and hub.broken in path:
                return self.answer(500, b'{"error": "out of order"}')
            if self.command == "PUT":
                hub.uploads[path.removeprefix("/upload/")] = body
                assert sha256(body).hexdigest() == path.removeprefix("/upload/")
                return self.answer(200, b"")
            if self.command in ("GET", "HEAD"):
                status, content = hub.get(path)
                tag = sha256(content).hexdigest()
                return self.answer(status, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                message = "Invalid credentials in Authorization header"
                return self.answer(401, json.dumps({"error": message}).encode(), {"X-Error-Message": message})
            status, answer = hub.post(path, body)
            self.answer(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        hub.address = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield hub
        http.shutdown()
        thread.join()
