"""The page of runs that go on, served on this machine only; it reads the runs' files and writes none."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ddpo_fast.report import page
from ddpo_fast.report.run_records import METRICS, SETTINGS

HOST = "127.0.0.1"
# names by which a browser on this machine asks for the page; another one would be a page elsewhere that looks in here
OWN_NAMES = (HOST, "localhost")
# what is watched of a run's folder
WATCHED = (METRICS, SETTINGS, "*_after.png", "samples/*/*.json")


class Watch(ThreadingHTTPServer):
    """A server of the page about the runs in `folders`, on the loopback interface.

    Args:
        port: 0 for any that is free.
    """

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], port: int = 0) -> None:
        self.folders = list(folders)
        self._lock = threading.Lock()
        self._page: tuple[str, bytes] = "", b""
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise OSError(f"port {port} cannot be served ({error.strerror}): choose another with --port") from None

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def version(self) -> str:
        """Another text whenever one of the runs has written something that the page shows."""
        seen = [
            (str(path), status.st_size, status.st_mtime_ns)
            for folder in self.folders
            for pattern in WATCHED
            for path in sorted(folder.glob(pattern))
            if (status := _status(path)) is not None
        ]
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]

    def page(self) -> bytes:
        """The page as the runs are now."""
        with self._lock:
            # the version first: what is written meanwhile makes it an old one
            version = self.version()
            if version != self._page[0]:
                self._page = version, page.render(self.folders, is_live=True, version=version).encode()
            return self._page[1]


class _Handler(BaseHTTPRequestHandler):
    server: Watch

    def do_GET(self) -> None:
        name = (self.headers.get("Host") or "").rpartition(":")[0]
        if name not in OWN_NAMES:
            self.send_error(403, "only for this machine")
        elif self.path == "/":
            try:
                self._answer("text/html; charset=utf-8", self.server.page())
            except ValueError as error:
                # the run's folder has been moved or emptied
                self.send_error(503, str(error)[:200])
        elif self.path == "/version":
            self._answer("text/plain", self.server.version().encode())
        else:
            self.send_error(404)

    def _answer(self, kind: str, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        try:
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            # the browser has gone on to something else
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""


def watch(folders: Sequence[Path], port: int) -> None:
    """Serves the page until Ctrl-C. Raises what `page.render` raises if there is no run to begin with."""
    server = Watch(folders, port)
    with server:
        server.page()
        print(f"{server.address} shows the run and follows it; Ctrl-C ends this", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
