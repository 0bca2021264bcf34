"""`ddpo-fast report` as a command: the file that it writes, its mistakes, and the page that --watch serves."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from recorded_run import epoch_records, write_run
from report_page import Page
from run_process import finish

from ddpo_fast import cli
from ddpo_fast.report import serve


def command(*words: object, cwd: Path | None = None):
    return finish([sys.executable, "-m", "ddpo_fast.cli", "report", *map(str, words)], cwd=cwd)


def test_the_command_writes_a_page(tmp_path):
    run = write_run(tmp_path / "runs" / "run")
    done = command(run, "--output", "page.html", cwd=tmp_path)
    assert re.fullmatch(r"wrote page\.html \(\d\.\d MB\)\n", done.stdout), done.stderr
    assert (tmp_path / "page.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "runs"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "run is 'missing', which is no folder"),
        (["empty"], "run is 'empty', which has no metrics.jsonl"),
        (["run", "--output", "notes.txt"], "output is 'notes.txt', which exists and is no report"),
        (["run", "--output", "empty"], "output is 'empty', which is a folder"),
        (["run", "--output", "none/page.html"], "there is no folder 'none'"),
        (["run", "--watch", "--output", "a.html"], "--watch serves the page and writes no file"),
        (["run", "--port", "80"], "--port is 80, which only --watch uses"),
        (["run", "--watch", "--port", "99999"], "99999 is no port"),
        (["run", "--watched"], "did you mean --watch?"),
    ],
)
def test_mistakes_are_said_in_one_sentence(tmp_path, monkeypatch, capsys, words, message):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


# live


@pytest.fixture
def server(tmp_path):
    folder = write_run(tmp_path / "run", epoch_records(3))
    server = serve.Watch([folder])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def get(server, path="", **headers) -> str:
    request = urllib.request.Request(server.address + path, headers=headers)
    return urllib.request.urlopen(request, timeout=20).read().decode()


def test_a_running_run_is_served(server):
    (folder,) = server.folders
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
    shown = Page(get(server))
    assert "the 3 epochs so far" in shown.text
    version = get(server, "version")
    assert ("body", {"data-version": version}) in shown.tags
    assert get(server, "version") == version
    # nothing in the run's folder has changed, and nothing is new
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
    assert after == before
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(epoch_records(4)[-1]) + "\n")
    assert get(server, "version") != version
    assert "the 4 epochs so far" in Page(get(server)).text


def test_only_this_machine_is_served(server):
    assert server.server_address[0] == "127.0.0.1"
    for path, headers, status in (
        ("../../etc/passwd", {}, 404),
        ("config.json", {}, 404),
        # a page elsewhere whose name leads to this machine
        ("", {"Host": "evil.example:80"}, 403),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(server, path, **headers)
        assert refused.value.code == status
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(urllib.request.Request(server.address, data=b"x", method="POST"), timeout=20)


def test_a_port_in_use_is_said(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} cannot be served .*: choose another with --port"):
            serve.Watch([write_run(tmp_path / "run")], port)
