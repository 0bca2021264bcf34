"""A reward in a process of its own: its libraries, its memory and its crashes are not the trainer's.

The process is a fresh interpreter and not a fork, which CUDA and threads do not survive. Requests and answers go over a
pair of sockets that only the two processes have. The process ends when the trainer closes its socket, also by a crash.
"""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch

from ddpo_fast.rewards.scoring import PartFailed, score
from ddpo_fast.user_functions import error_line

# what the process runs, with the socket's number; modules are then found where the trainer finds them
_START = (
    "import pickle, sys; from multiprocessing.connection import Connection; "
    "connection = Connection(int(sys.argv[1])); sys.path[:], name, options = pickle.loads(connection.recv_bytes()); "
    "from ddpo_fast.rewards import load; from ddpo_fast.rewards.own_process import serve; "
    "serve(connection, name, lambda: load(name, **options))"
)


class OwnProcess:
    """A reward function that the reward `name` computes in a process, which is started by the first call.

    Args:
        name: a reward's name or 'module:function', without a weight.
        options: arguments of its constructor, as `rewards.load` takes them.

    Raises `PartFailed` if the reward fails there or if the process ends; the next call starts another one.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.name, self.options = name, dict(options)
        # worker threads take turns
        self._lock = threading.Lock()
        self._running: tuple[subprocess.Popen, Connection] | None = None
        self._end: Any = None

    def __call__(
        self, images: torch.Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]
    ) -> tuple[torch.Tensor, Any]:
        return self._ask("score", images.detach().cpu().numpy(), str(images.device), prompts, metadata)

    def state_dict(self) -> dict[str, Any]:
        return self._ask("state_dict")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ask("load_state_dict", state)

    def _ask(self, *request: Any) -> Any:
        with self._lock:
            process, connection = self._running = self._running or self._start()
            try:
                connection.send_bytes(pickle.dumps(request))
                is_fine, answer = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionError):
                ending = _ending(process)
                self.close()
                raise PartFailed(f"the process of reward {self.name!r} {ending}") from None
            # after a Ctrl-C the answer must not be taken for that to another request
            except BaseException:
                self.close()
                raise
        if not is_fine:
            raise PartFailed(answer)
        return answer

    def _start(self) -> tuple[subprocess.Popen, Connection]:
        connection, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # a terminal's Ctrl-C is the trainer's alone
                start_new_session=True,
            )
        self._end = weakref.finalize(self, _kill, process, connection)
        connection.send_bytes(pickle.dumps((sys.path, self.name, self.options)))
        return process, connection

    def close(self) -> None:
        """Ends the process, if there is one; so does the end of the program."""
        if self._running is not None:
            self._running = None
            self._end()


def _kill(process: subprocess.Popen, connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


def _ending(process: subprocess.Popen) -> str:
    status = process.wait()
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}, which may be for want of memory"
    return f"ended with exit status {status}: what it printed says why"


def serve(connection: Connection, name: str, make: Callable[[], Any]) -> None:
    """The work of the process: answers requests until the trainer closes the connection.

    Args:
        make: makes the reward function, at the first request.
    """
    function: Any = None
    while True:
        try:
            method, *arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            function = function or make()
            answer = True, _answer(function, name, method, arguments)
            sent = pickle.dumps(answer)
        except Exception as error:
            # what `score` and `load` raise is a whole sentence
            is_sentence = isinstance(error, (RuntimeError, ValueError))
            sent = pickle.dumps((False, str(error) if is_sentence else f"reward {name!r} raised {error_line(error)}"))
        connection.send_bytes(sent)


def _answer(function: Any, name: str, method: str, arguments: list[Any]) -> Any:
    if method == "score":
        pixels, device, prompts, metadata = arguments
        images = torch.from_numpy(pixels).to(device)
        rewards, info = score(function, images, prompts, metadata, called=f"reward {name!r}")
        return rewards.cpu(), info
    if not hasattr(function, "state_dict") or not hasattr(function, "load_state_dict"):
        return {}
    return getattr(function, method)(*arguments)
