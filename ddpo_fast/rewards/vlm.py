"""A vision-language model as the judge of images, behind a server with OpenAI's interface."""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from ddpo_fast.rewards.optional_packages import require_packages
from ddpo_fast.rewards.pixels import as_uint8, png_base64
from ddpo_fast.rewards.servers import JITTER, beginning, check_settings, checked_url, find_secret, in_parallel
from ddpo_fast.rewards.vlm_answers import answer_in, grade_in, is_right, questions_of
from ddpo_fast.user_functions import error_line

Parsed = TypeVar("Parsed")

GRADING = (
    "Judge how well the image matches its caption: does it show each subject, attribute, number, action and relation "
    "that the caption names, and is it a good picture?\nCaption: {prompt}\n"
    "Give a score from {low} (nothing matches) to {high} (everything matches). "
    "Reply with one line: Final Score: NUMBER"
)
ANSWERING = "Reply with one word, a number or a short phrase."


class VlmJudge:
    """How well images match their prompts, as judged by a vision-language model; the score is from 0 to 1.

    If the metadata of the images are dicts with "questions" and "answers" (lists of equal length), the score is the
    share of the questions that the model answers right: its answer has the expected words in it, in their order.
    Case does not matter, nor does a final s, and numbers up to ten may be words. This is the strict form of the LLaVA
    reward of arXiv 2305.13301. Without them the model is asked for a grade in `scale`, as UnifiedReward gives it
    (arXiv 2503.05236), and the score is `(grade - low) / (high - low)`.

    The server speaks OpenAI's chat completions with images (vLLM, SGLang, llama.cpp and others); the weights and their
    licence are whatever it serves. Images are sent in full as PNG data URLs, one per request. A request that
    times out, breaks, or is answered with status 408, 409, 429 or 5xx is repeated after an exponential back-off with
    jitter, or after the time that the server asks for. An answer that cannot be read is asked for again, and is an
    error in the end.

    Args:
        url: the server's URL, which ends in /v1.
        model: the served model's name (default: the only one that the server lists).
        api_key: default: the environment's OPENAI_API_KEY, or "none", which is enough for most local servers.
        scale: the lowest and the highest grade.
        question: the text that asks for a grade, with {prompt}, {low} and {high} where these are to be.
        attempts: how often a question is asked until its answer can be read.
        max_tokens: the longest answer, with the reasoning of a model that reasons.
        timeout: seconds without a byte from the server after which a request has failed.
        retries: how often a request that failed is repeated.
        concurrency: images that are judged at the same time.
    """

    def __init__(
        self,
        *,
        url: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        scale: tuple[float, float] = (1, 5),
        question: str = GRADING,
        attempts: int = 3,
        max_tokens: int = 256,
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
    ) -> None:
        self.url = checked_url("vlm", url, "http://localhost:8000/v1")
        if not self.url.endswith("/v1"):
            raise ValueError(f"reward_url is {url!r} but must end in /v1, such as http://localhost:8000/v1")
        require_packages("vlm", "vlm", "openai")
        check_settings(retries, attempts=attempts, max_tokens=max_tokens, timeout=timeout, concurrency=concurrency)
        if not scale[0] < scale[1]:
            raise ValueError(f"reward setting scale is {scale} but must be the lowest and the highest grade")
        if "{prompt}" not in question:
            raise ValueError(f"reward setting question is {question!r} but must have {{prompt}} in it")
        self.model = model
        self.scale = scale
        self.question = question
        self.attempts = attempts
        self.max_tokens = max_tokens
        self.timeout = timeout
        self.retries = retries
        self.concurrency = concurrency
        self._api_key = find_secret("api_key", api_key, "OPENAI_API_KEY")
        self._client: Any = None
        self._lock = threading.Lock()

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[torch.Tensor, dict[str, list[Any]]]:
        """The scores [B], and under "answers" each image's grade, or the list of its answers.

        Raises `ValueError` for images with NaN and for wrong questions, `RuntimeError` if there is no score.
        """
        exams = [questions_of(prompt, info) for prompt, info in zip(prompts, metadata, strict=True)]
        if None in exams and any(exams):
            missing = prompts[exams.index(None)]
            raise ValueError(f"reward 'vlm' needs questions for all prompts or for none: {missing!r:.200} has none")
        items = list(zip(as_uint8(images), prompts, exams, strict=True))
        self._connect()
        judged = in_parallel(lambda item: self._judge(*item), items, self.concurrency)
        return torch.tensor([score for score, _ in judged]), {"answers": [answer for _, answer in judged]}

    def _connect(self) -> None:
        """Makes the client and finds the model's name, once."""
        with self._lock:
            if self._client is None:
                from openai import OpenAI, _base_client

                # by which the client draws its back-offs' jitter, from Python's global generator
                _base_client.random = JITTER.random
                self._client = OpenAI(
                    base_url=self.url,
                    api_key=self._api_key or "none",
                    timeout=self.timeout,
                    max_retries=self.retries,
                )
            if self.model is None:
                self.model = self._only_model()

    def _only_model(self) -> str:
        listed = self._sent(lambda: self._client.models.with_raw_response.list().text)
        try:
            names = [str(model["id"]) for model in json.loads(listed)["data"]]
        except (ValueError, LookupError, TypeError):
            raise self._error(f"gave no list of its models but {beginning(listed, self._api_key)!r}") from None
        if len(names) != 1:
            raise ValueError(f"{self.url} serves the models {names[:10]}: choose one by --reward_model")
        return names[0]

    def _judge(
        self, pixels: np.ndarray, prompt: str, exam: list[tuple[str, str]] | None
    ) -> tuple[float, float | list[str]]:
        """The score of one image, and the grade or the answers that it comes from."""
        picture = f"data:image/png;base64,{png_base64(pixels)}"
        if exam is None:
            low, high = self.scale
            values = {"low": f"{low:g}", "high": f"{high:g}", "prompt": prompt}
            grade = self._ask(picture, _filled(self.question, values), lambda answer: grade_in(answer, self.scale))
            return (grade - low) / (high - low), grade
        answers = [
            self._ask(picture, f"{question}\n{ANSWERING}", lambda answer: answer or None) for question, _ in exam
        ]
        right = [is_right(answer, expected) for answer, (_, expected) in zip(answers, exam, strict=True)]
        return sum(right) / len(right), answers

    def _ask(self, picture: str, text: str, parse: Callable[[str], Parsed | None]) -> Parsed:
        """What `parse` makes of the model's answer; asks again while that is None. Raises `RuntimeError` in the end."""
        for attempt in range(self.attempts):
            # at temperature 0 the same question would have the same answer
            temperature = 0.7 if attempt else 0.0
            body = self._sent(functools.partial(self._completion, picture, text, temperature))
            answer = answer_in(body)
            parsed = None if answer is None else parse(answer)
            if parsed is not None:
                return parsed
        shown = beginning(answer or body, self._api_key)
        raise self._error(f"gave no answer that can be read in {self.attempts} attempts; the last one was {shown!r}")

    def _completion(self, picture: str, text: str, temperature: float) -> str:
        """The body of the server's response to one question about one picture."""
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
        response = self._client.chat.completions.with_raw_response.create(
            model=self.model,
            messages=[{"role": "user", "content": content}],
            temperature=temperature,
            max_tokens=self.max_tokens,
        )
        return response.text

    def _sent(self, request: Callable[[], str]) -> str:
        """The body of the response to a request. Raises `RuntimeError` if the client has given up."""
        from openai import APIStatusError, OpenAIError

        # not raised from the client's errors, which may repeat the key
        try:
            return request()
        except APIStatusError as error:
            shown = beginning(error.response.text, self._api_key)
            raise self._error(f"answered with status {error.status_code}: {shown!r}") from None
        except OpenAIError as error:
            cause = f" ({error_line(error.__cause__)})" if error.__cause__ else ""
            shown = beginning(error_line(error) + cause, self._api_key)
            raise self._error(f"failed in up to {self.retries + 1} tries: {shown}") from None

    def _error(self, what: str) -> RuntimeError:
        named = f" (model {self.model!r})" if self.model else ""
        return RuntimeError(f"the judge at {self.url}{named} {what}")


def _filled(template: str, values: dict[str, str]) -> str:
    """The template with its names in braces replaced; other braces, as in prompts, are left as they are."""
    return re.sub(r"\{(\w+)\}", lambda name: values.get(name[1], name[0]), template)
