"""A reward that a server computes, for rewards that need their own environment or machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ddpo_fast.rewards.pixels import as_uint8, png_base64
from ddpo_fast.rewards.servers import JITTER, beginning, check_settings, checked_url, find_secret, in_parallel
from ddpo_fast.user_functions import error_line

# the environment variable of the token
TOKEN = "DDPO_FAST_REWARD_TOKEN"
# the longest time in seconds that a server may ask for by Retry-After, and that a back-off takes
LONGEST_WAIT = 120
LARGEST = torch.finfo(torch.float32).max


class RemoteReward:
    """The scores that a server computes: any range.

    The protocol is in docs/rewards.md, and docs/reward_server.py is a server. A request that times out, breaks, or is
    answered with status 408, 429, 500, 502, 503 or 504 is repeated after an exponential back-off with jitter, or after
    the time that the server asks for.

    Args:
        url: where requests are posted to.
        token: sent as "Authorization: Bearer TOKEN" (default: the environment's DDPO_FAST_REWARD_TOKEN, or none).
        timeout: seconds without a byte from the server after which a request has failed.
        retries: how often a request that failed is repeated.
        batch_size: images of one request.
        concurrency: requests at the same time.
    """

    def __init__(
        self,
        *,
        url: str | None = None,
        token: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        batch_size: int = 16,
        concurrency: int = 4,
    ) -> None:
        self.url = checked_url("http", url, "http://localhost:8000")
        check_settings(retries, timeout=timeout, batch_size=batch_size, concurrency=concurrency)
        self.timeout = timeout
        self.retries = retries
        self.batch_size = batch_size
        self.concurrency = concurrency
        self._token = find_secret("token", token, TOKEN)

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[torch.Tensor, dict]:
        """The scores [B].

        Raises `ValueError` for images with NaN and metadata that JSON cannot hold, `RuntimeError` if there is no score.
        """
        pixels = as_uint8(images)
        parts = [slice(start, start + self.batch_size) for start in range(0, len(pixels), self.batch_size)]
        batches = [(pixels[part], prompts[part], metadata[part]) for part in parts]
        scores = in_parallel(lambda batch: self._scores(*batch), batches, self.concurrency)
        return torch.tensor([score for batch in scores for score in batch], dtype=torch.float32), {}

    def _scores(self, pixels: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
        request = {"images": [png_base64(image) for image in pixels], "prompts": prompts, "metadata": metadata}
        try:
            body = json.dumps(request, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward 'http' cannot send the metadata as JSON: {error_line(error)}") from error
        answer = self._post(body)
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, LookupError, TypeError):
            raise self._error(f"must answer with JSON that has scores, got {self._shown(answer)!r}") from None
        if not isinstance(scores, list) or len(scores) != len(pixels):
            count = len(scores) if isinstance(scores, list) else "no list of"
            raise self._error(f"gave {count} scores for {len(pixels)} images: {self._shown(answer)!r}")
        for score in scores:
            # type, as JSON's true would be a number; NaN compares as false
            if type(score) not in (int, float) or not abs(score) <= LARGEST:
                raise self._error(f"gave the score {score!r:.80}, which is not a finite number")
        return scores

    @cached_property
    def _pool(self) -> Any:
        import urllib3

        return urllib3.PoolManager(maxsize=self.concurrency)

    def _post(self, body: str) -> str:
        """The server's answer. Raises `RuntimeError` if there is none after all retries, or one that is an error."""
        from urllib3 import Retry
        from urllib3.exceptions import HTTPError

        retries = Retry(
            self.retries,
            allowed_methods=None,
            status_forcelist=(408, 429, 500, 502, 503, 504),
            # each request's own: urllib3's jitter would be drawn from Python's global generator
            backoff_factor=JITTER.uniform(0.5, 0.75),
            backoff_max=LONGEST_WAIT,
            retry_after_max=LONGEST_WAIT,
            raise_on_status=False,
        )
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            response = self._pool.request(
                "POST", self.url, body=body, headers=headers, retries=retries, timeout=self.timeout, redirect=False
            )
        except HTTPError as error:
            reason = getattr(error, "reason", None) or error
            # not from the client's error, which has the whole URL
            raise self._error(f"failed in up to {self.retries + 1} tries: {error_line(reason)}") from None
        answer = response.data.decode("utf-8", errors="replace")
        if response.status != 200:
            raise self._error(f"answered with status {response.status}: {self._shown(answer)!r}")
        return answer

    def _shown(self, answer: str) -> str:
        return beginning(answer, self._token)

    def _error(self, what: str) -> RuntimeError:
        # what follows a question mark may be a secret
        return RuntimeError(f"the reward server {self.url.partition('?')[0]} {what}")
