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
    """Wait until no other thread of this process runs, at most so many seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        time.sleep(0.01)  # without Python's lock: whoever waited for it has it, and runs
        if not any(_runs(thread) for thread in TASKS.glob("*") if thread.name != str(threading.get_native_id())):
            return


def _runs(thread: Path) -> bool:
    with suppress(OSError):  # it has ended
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "R"
    return False
