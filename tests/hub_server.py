"""A stand-in for the Hub's HTTP interface on this machine: repositories are made, and files are committed to them.

Files in safetensors go by Git LFS's batch interface, the others within the commit, as the Hub has it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "q" * 34


class HubServer(ThreadingHTTPServer):
    """Keeps `files` by repository and name, whether a repository is `private`, and the `requests` as (method, path).

    Args:
        failures: the status of the first answers to requests whose path has a key of the mapping in it.
    """

    daemon_threads = True

    def __init__(self, failures: dict[str, list[int]] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.failures = failures or {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, Any] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.refused: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        with self.server.lock:
            self.server.requests.append((method, path))
            failing = next((left for part, left in self.server.failures.items() if part in path and left), [])
            status = failing.pop(0) if failing else 200
        # a link to the store of large files is signed, and has no token
        if not path.startswith("/store/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        try:
            content = self._content(path, body) if status == 200 else {"error": "made to fail"}
        except KeyError:
            status, content = 404, {"error": "not found"}
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _content(self, path: str, body: bytes) -> Any:
        hub = self.server
        if path == "/api/whoami-v2":
            return {"name": "ann", "type": "user"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.startswith("/store/"):
            oid = path.removeprefix("/store/")
            assert hashlib.sha256(body).hexdigest() == oid
            hub.large[oid] = body
            return {}
        asked = json.loads(body) if body and not path.endswith("/commit/main") else None
        if path == "/api/repos/create":
            name = f"{asked.get('organization') or 'ann'}/{asked['name']}"
            hub.files.setdefault(name, {})
            # one or the other, by huggingface_hub's version
            hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return {"url": f"{hub.url}/{name}"}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in asked["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]}
        if path.endswith("/info/lfs/objects/batch"):
            links = [{"upload": {"href": f"{hub.url}/store/{object_['oid']}"}} for object_ in asked["objects"]]
            known = [object_["oid"] in hub.large for object_ in asked["objects"]]
            found = zip(asked["objects"], links, known, strict=True)
            return {
                "transfer": "basic",
                "objects": [o | ({} if is_there else {"actions": a}) for o, a, is_there in found],
            }
        if path.endswith("/commit/main"):
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[name][value["path"]] = hub.large[value["oid"]]
            return {"commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        raise KeyError(path)

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""


@contextmanager
def serving(failures: dict[str, list[int]] | None = None) -> Iterator[HubServer]:
    server = HubServer(failures)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
