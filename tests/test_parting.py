"""How the processes of a command part."""

import hashlib
import threading
import time

import pytest
import torch
from accelerate import PartialState
from processes import run_forked

from trl_diffusion.cli.command import Command
from trl_diffusion.cli.harness import harness
from trl_diffusion.cli.parting import TASKS, come_to_rest


def worked_on(seconds):
    """A thread that computes without Python's lock for about so long; a daemon, as the shutdown waits for others."""
    data, end = bytes(2**25), time.monotonic() + seconds

    def work():
        while time.monotonic() < end:
            hashlib.sha256(data).digest()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.skipif(not TASKS.exists(), reason="threads are seen on Linux alone")
def test_a_process_rests_when_its_threads_do():
    thread = worked_on(0.5)
    come_to_rest()
    assert not thread.is_alive()


def test_the_wait_ends():
    begun, thread = time.monotonic(), worked_on(1.5)
    come_to_rest(timeout=0.2)
    assert time.monotonic() - begun < 1.4
    assert thread.is_alive() or not TASKS.exists()
    thread.join()


def act(state):
    """What a command does, on two processes."""
    assert torch.distributed.is_initialized() and state.num_processes == 2


def leave(command):
    state = PartialState(cpu=True)
    assert torch.distributed.is_initialized()
    assert not command(state) and not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["ours", "the harness"])
def test_every_command_ends_its_process_group(tmp_path, monkeypatch, name):
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: act(PartialState()))
    commands = {"ours": Command("name", "", "", (), act).run, "the harness": lambda state: harness(["ls", "tasks"])}
    assert run_forked(leave, commands[name], processes=2, folder=tmp_path) == [0, 0], (
        tmp_path / "rank0.log"
    ).read_text()
