from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import random
import threading
import traceback

import numpy as np
import pytest
import torch
from PIL import Image
from scripted_server import Answer, ScriptedServer, serving

from ddpo_fast.rewards import score
from ddpo_fast.rewards.vlm import VlmJudge

pytest.importorskip("openai")

NEVER = Answer(never=True)
GRAY = torch.full((1, 3, 8, 8), 0.5)


def said(text: str | None, finish_reason: str = "stop") -> Answer:
    """A chat completion with this text."""
    message = {"role": "assistant", "content": text}
    return Answer(
        {"id": "1", "object": "chat.completion", "choices": [{"message": message, "finish_reason": finish_reason}]}
    )


def judge(server: ScriptedServer, **settings) -> VlmJudge:
    return VlmJudge(**{"url": f"{server.url}/v1", "model": "llava", "timeout": 30, **settings})


def pixels_sent(request: dict) -> np.ndarray:
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))))


def text_sent(request: dict) -> str:
    return request["messages"][0]["content"][1]["text"]


@pytest.mark.parametrize("size", [1, 64, 1024])
def test_grades_are_scaled(size):
    images = torch.stack([torch.zeros(3, size, size), torch.rand(3, size, size)])

    def graded(path, request):
        assert path == "/v1/chat/completions"
        return said("Final Score: 2" if pixels_sent(request).max() == 0 else "Final Score: 4.5")

    prompts = ("", "word {low} " * 300)
    with serving(graded) as server:
        scores, info = judge(server)(images, prompts, (None, {}))
    assert scores.tolist() == [0.25, 0.875]
    assert info == {"answers": [2, 4.5]}
    by_prompt = {prompts[1] in text_sent(request): request for request in server.requests}
    np.testing.assert_array_equal(pixels_sent(by_prompt[True]), (images[1] * 255).round().permute(1, 2, 0).numpy())
    assert "from 1 (nothing" in text_sent(by_prompt[True])
    assert by_prompt[True]["model"] == "llava"
    assert by_prompt[True]["temperature"] == 0


def test_another_scale_and_question():
    with serving(said("10")) as server:
        reward = judge(server, scale=(-10, 10), question="Rate {prompt} from {low} to {high} {now}.")
        assert reward(GRAY, ("a {high}",), ({},))[0].tolist() == [1]
    assert text_sent(server.requests[0]) == "Rate a {high} from -10 to 10 {now}."


def test_the_share_of_questions_answered_right():
    answers = {"How many cats?": "There are 2 cats.", "Which animal?": "A cat", "What colour?": "Green"}

    def answered(path, request):
        return said(answers[text_sent(request).split("\n")[0]])

    exams = (
        {"questions": list(answers), "answers": ["two", "cats", "red"]},
        {"questions": ["Which animal?"], "answers": ["dog"]},
    )
    with serving(answered) as server:
        scores, info = judge(server)(GRAY.expand(2, -1, -1, -1), ("two cats", "a dog"), exams)
    torch.testing.assert_close(scores, torch.tensor([2 / 3, 0]))
    assert info == {"answers": [list(answers.values()), ["A cat"]]}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (({"questions": ["Is it?"]},), 'lists as "questions" and "answers", for prompt \'a cat\''),
        (({"questions": [], "answers": []},), "must have lists"),
        (({"questions": "Is it?", "answers": "yes"},), "must have lists"),
        (({"questions": ["Is it?"], "answers": ["yes", "no"]},), "1 questions but 2 answers"),
        (({"questions": ["Is it?"], "answers": ["?"]},), "is '[?]' but must have words"),
        (({"questions": ["Is it?"], "answers": ["yes"]}, {}), "'a dog' has none"),
    ],
)
def test_wrong_questions_are_named_before_anything_is_sent(metadata, words):
    with serving(said("yes")) as server, pytest.raises(ValueError, match=words):
        judge(server)(GRAY.expand(len(metadata), -1, -1, -1), ("a cat", "a dog")[: len(metadata)], metadata)
    assert not server.requests


UNREADABLE = [
    said("It is a fine picture of 3 cats."),
    said("Score: 7"),
    said(None),
    said("Score: 4", finish_reason="length"),
    Answer("<html>4</html>", headers={"Content-Type": "text/html"}),
    Answer("Score: 4"),
    Answer('{"choices": [{"message": {"content": "Score: 4'),
    Answer({"choices": []}),
    Answer([4]),
]


@pytest.mark.parametrize("wrong", UNREADABLE)
def test_an_answer_that_cannot_be_read_is_asked_for_again(wrong):
    with serving(wrong, wrong, said("Score: 3")) as server:
        assert judge(server)(GRAY, ("a cat",), ({},))[0].tolist() == [0.5]
    # the same question in the same way would have the same answer
    assert [request["temperature"] for request in server.requests] == [0, 0.7, 0.7]


@pytest.mark.parametrize("wrong", UNREADABLE)
def test_an_answer_that_can_never_be_read_is_an_error(wrong):
    with (
        serving(wrong) as server,
        pytest.raises(RuntimeError, match="no answer that can be read in 2 attempts") as raised,
    ):
        judge(server, attempts=2)(GRAY, ("a cat",), ({},))
    assert len(server.requests) == 2
    shown = wrong.content if isinstance(wrong.content, str) else json.dumps(wrong.content)
    assert any(part in str(raised.value) for part in (shown[:50], "fine picture", "Score: 7"))


def test_an_empty_answer_to_a_question_is_an_error():
    exam = {"questions": ["Is it?"], "answers": ["yes"]}
    with serving(said(" ")) as server, pytest.raises(RuntimeError, match="no answer that can be read"):
        judge(server)(GRAY, ("a cat",), (exam,))


@pytest.mark.parametrize(
    "trouble",
    [
        NEVER,
        Answer("busy", status=429, headers={"Retry-After": "0.01"}),
        Answer("busy", status=503),
        Answer("broken", status=500),
        Answer(said("Score: 3").content, cut_at=20),
        Answer(said("Score: 3").content, cut_at=0),
    ],
)
def test_a_request_that_fails_is_repeated(trouble):
    before = random.getstate()
    with serving(trouble, said("Score: 5")) as server:
        scores, _ = judge(server, timeout=2)(GRAY, ("a cat",), ({},))
    assert scores.tolist() == [1]
    assert len(server.requests) >= 2
    # by which the run's prompts are drawn
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("trouble", "words", "requests"),
    [
        (Answer("too many", status=429, headers={"Retry-After": "0.01"}), "answered with status 429: 'too many'", 2),
        (Answer({"error": "no such model"}, status=404), "answered with status 404: .*no such model", 1),
        (Answer(said("Score: 3").content, cut_at=20), "APIConnectionError.*peer closed connection", 2),
    ],
)
def test_a_request_that_always_fails_is_an_error(trouble, words, requests):
    with serving(trouble) as server, pytest.raises(RuntimeError, match=words) as raised:
        judge(server, retries=1)(GRAY, ("a cat",), ({},))
    assert len(server.requests) == requests
    assert f"the judge at {server.url}/v1 (model 'llava')" in str(raised.value)


def test_a_server_that_never_answers_is_an_error():
    with serving(NEVER) as server, pytest.raises(RuntimeError, match=r"failed in up to 2 tries: APITimeoutError"):
        judge(server, timeout=0.2, retries=1)(GRAY, ("a cat",), ({},))


def test_a_server_that_does_not_run_is_an_error():
    with serving(said("5")) as server:
        reward = judge(server, retries=0)
    with pytest.raises(RuntimeError, match=r"APIConnectionError.*refused"):
        reward(GRAY, ("a cat",), ({},))


def test_one_image_that_fails_ends_the_batch():
    def one_fails(path, request):
        return Answer("no", status=400) if "dog" in text_sent(request) else NEVER

    with serving(one_fails) as server, pytest.raises(RuntimeError, match="status 400"):
        judge(server)(GRAY.expand(3, -1, -1, -1), ("a cat", "a dog", "a cow"), ({},) * 3)


def test_images_are_judged_at_the_same_time():
    together = threading.Barrier(3, timeout=60)

    def graded(path, request):
        together.wait()
        return said("5")

    with serving(graded) as server:
        assert judge(server, concurrency=3)(GRAY.expand(6, -1, -1, -1), ("a",) * 6, ({},) * 6)[0].tolist() == [1] * 6


def test_scores_are_in_the_order_of_the_images():
    images = torch.arange(8).view(8, 1, 1, 1).expand(8, 3, 4, 4) / 255
    with serving(lambda path, request: said(f"Score: {pixels_sent(request)[0, 0, 0]}")) as server:
        scores, _ = judge(server, scale=(0, 10))(images, ("",) * 8, ({},) * 8)
    torch.testing.assert_close(scores, torch.arange(8) / 10)


def test_it_works_where_an_event_loop_runs():
    async def cell(reward):
        return score(reward, GRAY, ("a cat",), ({},))

    with serving(said("5")) as server:
        assert asyncio.run(cell(judge(server)))[0].tolist() == [1]


def test_the_only_model_of_a_server_is_the_default():
    def lists(*names):
        return Answer({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    with serving(lists("qwen"), said("5")) as server:
        assert judge(server, model=None)(GRAY, ("",), ({},))[0].tolist() == [1]
    assert server.requests[1]["model"] == "qwen"
    with (
        serving(lists("a", "b")) as server,
        pytest.raises(ValueError, match=r"\['a', 'b'\]: choose one by --reward_model"),
    ):
        judge(server, model=None)(GRAY, ("",), ({},))
    with (
        serving(Answer("nothing here")) as server,
        pytest.raises(RuntimeError, match="no list of its models but 'nothing"),
    ):
        judge(server, model=None)(GRAY, ("",), ({},))


def test_the_key_is_sent_and_never_shown(monkeypatch, caplog):
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", f"{key}\n")
    for status in (401, 200):
        with (
            serving(Answer(f"your key is Bearer {key}", status=status)) as server,
            caplog.at_level(logging.DEBUG),
            pytest.raises(RuntimeError, match=r"Bearer \[secret\]") as raised,
        ):
            score(judge(server), GRAY, ("a cat",), ({},))
        assert server.headers[0]["Authorization"] == f"Bearer {key}"
        assert key not in "".join(traceback.format_exception(raised.value))
    assert key not in caplog.text
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(said("5")) as server:
        judge(server)(GRAY, ("a cat",), ({},))
    assert server.headers[0]["Authorization"] == "Bearer none"


def test_images_with_nan_are_refused():
    with serving(said("5")) as server, pytest.raises(ValueError, match="must be finite"):
        judge(server)(GRAY * float("nan"), ("a cat",), ({},))
    assert not server.requests


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": None}, "needs the URL of a server: give --reward_url"),
        ({"url": "localhost:8000/v1"}, "reward_url is 'localhost:8000/v1' but must be the URL"),
        ({"url": "http://"}, "must be the URL"),
        ({"url": "http://[::1/v1"}, "must be the URL"),
        ({"url": "http://localhost:99999/v1"}, "must be the URL"),
        ({"url": "http://localhost:8000"}, "must end in /v1"),
        ({"url": "http://localhost:8000/v1/chat/completions"}, "must end in /v1"),
        ({"timeout": 0}, "timeout is 0"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"attempts": 0}, "attempts is 0"),
        ({"retries": -1}, "retries is -1"),
        ({"scale": (5, 1)}, r"scale is \(5, 1\)"),
        ({"question": "How good is it?"}, "must have {prompt} in it"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        VlmJudge(**{"url": "http://localhost:8000/v1", **settings})


@pytest.mark.parametrize("bad", ["http://user:hunter2@localhost/v1", "key with a\nline"])
def test_secrets_in_bad_settings_are_not_shown(bad):
    settings = {"url": bad} if "://" in bad else {"url": "http://localhost:8000/v1", "api_key": bad}
    with pytest.raises(ValueError, match=r"without user name|characters that an HTTP header") as raised:
        VlmJudge(**settings)
    assert "hunter2" not in str(raised.value)
    assert "line" not in str(raised.value)
