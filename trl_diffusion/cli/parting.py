"""How the processes of a command part."""

import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import PartialState

TASKS = Path("/proc/self/task")  # threads, on Linux


def part() -> None:
    """
    End the process group, if there is one, and let its threads come to rest.

    Some library often holds a group to the end, and then Gloo's threads outlive it. One that still lets go of a
    tensor of the last collective needs Python's lock. Asked for while Python (before 3.14) shuts down, that aborts the
    process, and the launcher calls a finished run failed.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        PartialState().destroy_process_group()
        come_to_rest()


def come_to_rest(timeout: float = 10.0) -> None:
    """
    Wait until no other thread of this process runs, at most so many seconds.

    They are looked at twice: one that waits for Python's lock just then does not run, but has it during the next sleep.
    """
    own, quiet, end = str(threading.get_native_id()), 0, time.monotonic() + timeout
    while quiet < 2 and time.monotonic() < end:
        time.sleep(0.01)
        quiet = 0 if any(_runs(thread) for thread in TASKS.glob("*") if thread.name != own) else quiet + 1


def _runs(thread: Path) -> bool:
    with suppress(OSError):  # it has ended
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "R"
    return False
