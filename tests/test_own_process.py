"""A reward in a process of its own: the same numbers, its errors and its crashes in a sentence, and no process left."""

from __future__ import annotations

import os

import pytest
import torch
from one_sentence import refused

from ddpo_fast.rewards import PartFailed, load, score

CODE = """
import os, signal, time
class Bright:
    def __init__(self, scale=1):
        self.scale, self.calls = scale, 0
    def __call__(self, images, prompts, metadata):
        self.calls += 1
        if prompts[0] == "error":
            raise KeyError("x")
        if prompts[0] == "exit":
            os._exit(3)
        if prompts[0] == "ctrl-c":
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(600)
        return self.scale * images.mean((1, 2, 3)), {"process": os.getpid(), "of": metadata}
    def state_dict(self):
        return {"calls": self.calls}
    def load_state_dict(self, state):
        self.calls = state["calls"]
"""
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def ask(reward, prompt="a cat"):
    return score(reward, IMAGES, (prompt, "a dog"), ({"n": 1}, {}))


def test_a_reward_in_its_own_process(tmp_path, monkeypatch):
    (tmp_path / "their_bright.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    several = load("their_bright:Bright:1,jpeg_compressibility", scale=3)
    reward = load("their_bright:Bright", own_process=True, scale=3)
    rewards, info = ask(reward)
    assert torch.equal(rewards, ask(several.parts["their_bright:Bright"])[0])
    assert info["process"] != os.getpid()
    assert info["of"] == ({"n": 1}, {})
    # its state is kept in checkpoints, and an error leaves it running
    reward.load_state_dict({"calls": 7})
    with refused(PartFailed, "reward 'their_bright:Bright' raised KeyError: 'x' .*line"):
        ask(reward, "error")
    assert reward.state_dict() == {"calls": 8}
    assert ask(reward)[1]["process"] == info["process"]

    with pytest.raises(KeyboardInterrupt):
        ask(reward, "ctrl-c")
    assert not is_alive(info["process"])
    # another one is started
    with refused(PartFailed, "the process of reward 'their_bright:Bright' ended with exit status 3"):
        ask(reward, "exit")


def test_what_is_wrong_with_its_options_is_said_without_a_process():
    with refused(ValueError, "no reward option 'model'"):
        load("jpeg_compressibility", own_process=True, model="x")
    reward = load("jpeg_compressibility", own_process=True)
    reward.close()
