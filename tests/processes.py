"""Other processes for tests: forked, so that torch and transformers need not be imported again."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import traceback
import warnings
from pathlib import Path

import torch

# As `accelerate launch` sets it for fsdp2.yaml
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_MIXED_PRECISION": "no",
    "FSDP_VERSION": 2,
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LLaDALlamaBlock",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def run_forked(function, *arguments, processes=1, folder, environment=None):
    """
    Run `function(*arguments)` in forked processes, as a launcher would start them; returns their exit codes.

    What they print goes to `folder`. A process that was killed has the negative number of the signal.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks where there are threads
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # as launchers set it
            variables = {**(ranks | where if processes > 1 else {}), **(environment or {})}
            log = Path(folder) / f"rank{rank}.log"
            process = multiprocessing.get_context("fork").Process(
                target=_child, args=(function, arguments, variables, log), daemon=True
            )
            process.start()
            started.append(process)
    for process in started:
        process.join(timeout=300)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def _child(function, arguments, variables, log):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)  # not what pytest has put there
    os.environ.update({name: str(value) for name, value in variables.items()})
    forget_processes()
    # At the first such call torch replaces its pool of threads, which is not fit after a fork; not safely from several
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        os._exit(1)
    os._exit(0)  # nothing that the parent would do at its exit


def forget_processes():
    """accelerate remembers processes and precision for the whole life of an interpreter."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def kill_myself():
    """As `kill -9` does: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def fsdp_on_the_cpu():
    """accelerate offers FSDP to processes with accelerators only. Nothing else in it asks for one."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    init = PartialState.__init__

    def as_if_on_accelerators(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_if_on_accelerators
    yield
