"""A real HTTP server on this machine that answers as it is told: well, late, wrongly, or with half an answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """One answer of the server; an object other than a string becomes JSON."""

    content: Any = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    # the connection is closed after this many bytes of the body
    cut_at: int | None = None
    # nothing is sent until the test is over
    never: bool = False


# how the server answers: an answer, or a function of the request's path and JSON that gives one
Step = Answer | Callable[[str, Any], Answer]


class ScriptedServer(ThreadingHTTPServer):
    """Answers the first requests by the steps, one each, and all later ones by the last; keeps what it was sent."""

    daemon_threads = True

    def __init__(self, *steps: Step) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.steps = list(steps)
        self.requests: list[Any] = []
        self.headers: list[Any] = []
        self.over = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        server = self.server
        with server.lock:
            server.requests.append(request)
            server.headers.append(self.headers)
            step = server.steps.pop(0) if len(server.steps) > 1 else server.steps[0]
        answer = step if isinstance(step, Answer) else step(self.path, request)
        if answer.never:
            server.over.wait()
            self.close_connection = True
            return
        body = (answer.content if isinstance(answer.content, str) else json.dumps(answer.content)).encode()
        self.send_response(answer.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: answer.cut_at])
        self.close_connection = answer.cut_at is not None

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(*steps: Step) -> Iterator[ScriptedServer]:
    """A server that runs while the block does."""
    with ScriptedServer(*steps) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()
