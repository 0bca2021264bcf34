from __future__ import annotations

import base64
import io
import logging
import random
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripted_server import Answer, ScriptedServer, serving

from ddpo_fast.rewards import score
from ddpo_fast.rewards.optional_packages import require_packages
from ddpo_fast.rewards.remote import RemoteReward

EXAMPLE = Path(__file__).parent.parent / "docs" / "reward_server.py"
NEVER = Answer(never=True)
BUSY = Answer("busy", status=503)
GRAY = torch.full((1, 3, 8, 8), 0.5)


def remote(server: ScriptedServer, **settings) -> RemoteReward:
    return RemoteReward(**{"url": server.url, "timeout": 30, **settings})


def decoded(request: dict) -> list[np.ndarray]:
    return [np.array(Image.open(io.BytesIO(base64.b64decode(image)))) for image in request["images"]]


@pytest.fixture(scope="module")
def example_url():
    """The example of a server, in a process of its own."""
    with subprocess.Popen([sys.executable, EXAMPLE, "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().strip()
        process.terminate()


def test_the_example_server_scores_simple_images_highest(example_url):
    images = torch.stack([torch.zeros(3, 64, 64), torch.rand(3, 64, 64)])
    reward = RemoteReward(url=example_url, batch_size=1)
    rewards, info = score(reward, images, ("", "word " * 300), ({}, {"number": 2}))
    assert 0 > rewards[0] > -1 > rewards[1]
    assert info == {}


def test_the_example_server_says_what_is_wrong(example_url):
    import urllib3

    answer = urllib3.request("POST", example_url, json={"pictures": []})
    assert answer.status == 400
    assert answer.json() == {"error": "KeyError: 'images'"}


@pytest.mark.parametrize("size", [1, 64, 1024])
def test_images_prompts_and_metadata_are_sent_in_batches(size):
    levels = torch.arange(5.0).view(5, 1, 1, 1) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    images = (levels / 255).expand(5, 3, size, size)

    def scored(path, request):
        assert path == "/score"
        shown = decoded(request)
        assert all((image == image[0, 0, 0] * np.array([1, 2, 3])).all() for image in shown)
        return Answer({"scores": [float(image[0, 0, 0]) for image in shown]})

    prompts, metadata = tuple("abcde"), ({"id": 0}, None, [1, "x"], "text", {})
    with serving(scored) as server:
        rewards, info = remote(server, url=f"{server.url}/score", batch_size=2)(images, prompts, metadata)
    assert rewards.tolist() == [0, 1, 2, 3, 4]
    assert info == {}
    sent = sorted((request["prompts"], request["metadata"]) for request in server.requests)
    assert sent == [(["a", "b"], [{"id": 0}, None]), (["c", "d"], [[1, "x"], "text"]), (["e"], [{}])]


def test_values_beyond_the_range_are_clamped_and_the_rest_rounded():
    image = torch.tensor([-1.0, 2.0, 0.499 / 255]).view(1, 3, 1, 1)
    with serving(Answer({"scores": [1]})) as server:
        remote(server)(image, ("",), ({},))
    assert decoded(server.requests[0])[0].tolist() == [[[0, 255, 0]]]


def test_batches_are_sent_at_the_same_time():
    together = threading.Barrier(3, timeout=60)

    def scored(path, request):
        together.wait()
        return Answer({"scores": [1]})

    with serving(scored) as server:
        reward = remote(server, batch_size=1, concurrency=3)
        assert reward(GRAY.expand(3, -1, -1, -1), ("a",) * 3, ({},) * 3)[0].tolist() == [1] * 3


@pytest.mark.parametrize(
    "trouble",
    [
        NEVER,
        Answer("busy", status=429, headers={"Retry-After": "1"}),
        BUSY,
        Answer("broken", status=500),
        Answer({"scores": [1]}, cut_at=5),
        Answer({"scores": [1]}, cut_at=0),
    ],
)
def test_a_request_that_fails_is_repeated(trouble):
    with serving(trouble, Answer({"scores": [5]})) as server:
        rewards, _ = remote(server, timeout=2)(GRAY, ("a cat",), ({},))
    assert rewards.tolist() == [5]
    assert len(server.requests) >= 2


def test_a_run_draws_the_same_prompts_although_requests_fail(monkeypatch):
    """Python's global generator draws them. The second wait is the first that has a jitter."""
    monkeypatch.setattr("urllib3.util.retry.time.sleep", lambda seconds: None)
    before = random.getstate()
    with serving(BUSY, BUSY, BUSY, Answer({"scores": [5]})) as server:
        remote(server)(GRAY, ("a cat",), ({},))
    assert len(server.requests) == 4
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("trouble", "words", "requests"),
    [
        (Answer({"scores": [1]}, cut_at=5), "failed in up to 2 tries: ProtocolError.*IncompleteRead", 2),
        (Answer("busy", status=503), "answered with status 503: 'busy'", 2),
        (Answer("no such page", status=404), "answered with status 404: 'no such page'", 1),
        (Answer("", status=302, headers={"Location": "http://localhost:1"}), "answered with status 302", 1),
    ],
)
def test_a_request_that_always_fails_is_an_error(trouble, words, requests):
    with serving(trouble) as server, pytest.raises(RuntimeError, match=words) as raised:
        remote(server, retries=1)(GRAY, ("a cat",), ({},))
    assert len(server.requests) == requests
    assert f"the reward server {server.url} " in str(raised.value)


def test_a_server_that_never_answers_is_an_error():
    with serving(NEVER) as server, pytest.raises(RuntimeError, match=r"failed in up to 2 tries: ReadTimeoutError"):
        remote(server, timeout=0.2, retries=1)(GRAY, ("a cat",), ({},))


def test_a_server_that_does_not_run_is_an_error():
    with serving(Answer()) as server:
        reward = remote(server, retries=0)
    with pytest.raises(RuntimeError, match=r"NewConnectionError.*refused"):
        reward(GRAY, ("a cat",), ({},))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("<html>busy</html>", "JSON that has scores, got '<html>busy</html>'"),
        ('{"scores": [1', r"""JSON that has scores, got '{"scores": \[1'"""),
        ("", "JSON that has scores, got ''"),
        ([1], "JSON that has scores"),
        ({"score": [1]}, "JSON that has scores"),
        ({"scores": 1}, "gave no list of scores for 1 images"),
        ({"scores": []}, "gave 0 scores for 1 images"),
        ({"scores": [1, 2]}, "gave 2 scores for 1 images"),
        ({"scores": [None]}, "the score None, which is not a finite number"),
        ({"scores": [True]}, "the score True"),
        ({"scores": ["1"]}, "the score '1'"),
        ({"scores": [[1]]}, r"the score \[1\]"),
        ({"scores": [float("nan")]}, "the score nan"),
        ({"scores": [float("inf")]}, "the score inf"),
        ({"scores": [10**400]}, "the score 1000"),
        ({"scores": [1e39]}, r"the score 1e\+39"),
    ],
)
def test_a_wrong_answer_is_an_error(content, words):
    with serving(Answer(content)) as server, pytest.raises(RuntimeError, match=words):
        remote(server)(GRAY, ("a cat",), ({},))
    assert len(server.requests) == 1


def test_one_batch_that_fails_ends_the_call():
    def one_fails(path, request):
        return Answer("no", status=400) if request["prompts"] == ["b"] else NEVER

    with serving(one_fails) as server, pytest.raises(RuntimeError, match="status 400"):
        remote(server, batch_size=1)(GRAY.expand(3, -1, -1, -1), tuple("abc"), ({},) * 3)


def test_images_with_nan_and_metadata_that_json_cannot_hold_are_refused():
    with serving(Answer({"scores": [1]})) as server:
        with pytest.raises(ValueError, match="must be finite"):
            remote(server)(GRAY * float("nan"), ("a cat",), ({},))
        for metadata in ({"a": object()}, {"a": float("nan")}):
            with pytest.raises(ValueError, match="cannot send the metadata as JSON"):
                remote(server)(GRAY, ("a cat",), (metadata,))
    assert not server.requests


def test_the_token_is_sent_and_never_shown(monkeypatch, caplog):
    token = "very-secret-0123456789"
    monkeypatch.setenv("DDPO_FAST_REWARD_TOKEN", f"{token}\n")
    with (
        serving(Answer(f"not for Bearer {token}", status=401)) as server,
        caplog.at_level(logging.DEBUG),
        pytest.raises(RuntimeError, match=r"Bearer \[secret\]") as raised,
    ):
        score(remote(server), GRAY, ("a cat",), ({},))
    assert server.headers[0]["Authorization"] == f"Bearer {token}"
    assert token not in "".join(traceback.format_exception(raised.value))
    assert token not in caplog.text
    monkeypatch.delenv("DDPO_FAST_REWARD_TOKEN")
    with serving(Answer({"scores": [1]})) as server:
        remote(server)(GRAY, ("a cat",), ({},))
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": None}, "reward 'http' needs the URL of a server: give --reward_url"),
        ({"url": "ftp://localhost"}, "reward_url is 'ftp://localhost' but must be the URL"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"retries": -1}, "retries is -1"),
        ({"token": "a\tb"}, "DDPO_FAST_REWARD_TOKEN"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        RemoteReward(**{"url": "http://localhost:8000", **settings})


def test_a_missing_package_is_named_with_the_extra_that_has_it():
    require_packages("ocr", "ocr", "json")
    with pytest.raises(ValueError, match=r"'ocr' needs no_such_package.*pip install 'ddpo_fast\[extra\]'"):
        require_packages("ocr", "extra", "json", "no_such_package")
