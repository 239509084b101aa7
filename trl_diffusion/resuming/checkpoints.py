"""
Which checkpoint a run can be resumed from: the last one whose files are all there and whole.

A process can be killed while it saves. transformers writes the weights, the optimiser, the random state, and
`trainer_state.json` last, and removes older checkpoints only after that; it picks the highest number, whole or not.
Files are judged by what can be seen without reading them: the length that a safetensors header promises, the directory
at the end of a zip archive, and whether JSON can be parsed. Nothing is unpickled.
"""

import json
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object

logger = get_logger(__name__)

STATE = "trainer_state.json"
_NUMBERED = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
_INDEX = "model.safetensors.index.json"
_OPTIMISERS = ("optimizer", "global_step")  # of one process or DDP (.pt), FSDP (.bin or a folder), DeepSpeed
_SHARDED = ("pytorch_model_fsdp*", "global_step*")  # folders of FSDP's and DeepSpeed's sharded weights


def resolve_checkpoint(given: str | bool | None, output_dir: str) -> str | None:
    """
    The folder to resume from.

    Args:
        given: a folder; True (or "True", from a command line) for the last whole one in `output_dir`; None or False.
        output_dir: of the run.

    Raises:
        ValueError: the folder is broken, no whole one is there, or the processes found different ones.
    """
    if isinstance(given, str) and given.lower() in ("true", "false"):
        given = given.lower() == "true"
    if given is None or given is False:
        return None
    try:
        found, problem = _find(given, Path(output_dir)), ""
    except ValueError as error:
        found, problem = None, str(error)
    outcomes = gather_object([(problem, found and found.name)])
    if any(problem for problem, _ in outcomes):
        raise ValueError(next(problem for problem, _ in outcomes if problem))
    if len({name for _, name in outcomes}) > 1:
        raise ValueError(
            f"The processes found different checkpoints in `output_dir={output_dir!r}`: "
            f"{[name for _, name in outcomes]}. They need one folder that all of them see; give "
            "`resume_from_checkpoint` the path of one."
        )
    return str(found)


def _find(given: str | bool, output_dir: Path) -> Path:
    if isinstance(given, bool):
        return _last_whole(output_dir)
    problem = problem_of(Path(given))
    if problem:
        raise ValueError(
            f"`resume_from_checkpoint={given!r}` is no whole checkpoint: {problem}. It was probably being saved when "
            "its run ended. Give an earlier one, or `resume_from_checkpoint=True` for the last whole one."
        )
    return Path(given)


def _last_whole(output_dir: Path) -> Path:
    """The whole checkpoint with the highest number, and a warning for each later one."""
    numbered = [(int(match[1]), path) for path in output_dir.glob("*") if (match := _NUMBERED.fullmatch(path.name))]
    broken: list[tuple[str, str]] = []
    for _, path in sorted(numbered, reverse=True):
        problem = problem_of(path)
        if not problem:
            for name, why in broken:
                logger.warning(
                    "%s is no whole checkpoint and is passed over: %s. Resuming from %s. Remove %s when you no longer "
                    "need it.",
                    name,
                    why,
                    path.name,
                    name,
                )
            return path
        broken.append((path.name, problem))
    listed = "; ".join(f"{name}: {why}" for name, why in broken) or "it holds none"
    raise ValueError(
        f"`resume_from_checkpoint=True` found no whole checkpoint in `output_dir={str(output_dir)!r}` ({listed}). "
        "Start anew without `resume_from_checkpoint`, or give the path of a checkpoint."
    )


def problem_of(checkpoint: Path) -> str:
    """What is missing from a checkpoint or cut short in it; empty if it is whole."""
    if not checkpoint.is_dir():
        return f"{checkpoint} is no folder"
    state, problem = _read_json(checkpoint / STATE)
    if problem:
        return problem
    match = _NUMBERED.fullmatch(checkpoint.name)
    if match and state.get("global_step") != int(match[1]):
        return f"{STATE} is of step {state.get('global_step')}"
    return _problem_of_weights(checkpoint) or _problem_of_training_state(checkpoint, state)


def read_state(checkpoint: str) -> dict:
    """The trainer's state in a whole checkpoint."""
    return json.loads((Path(checkpoint) / STATE).read_text())


def record_in(state: dict[str, Any]) -> dict[str, Any] | None:
    """The record of its run in a `trainer_state.json`, which `RunRecord` has put there, or None."""
    return state.get("stateful_callbacks", {}).get("RunRecord", {}).get("args", {}).get("record")


def _problem_of_weights(checkpoint: Path) -> str:
    if any(path.is_dir() for pattern in _SHARDED for path in checkpoint.glob(pattern)):
        return ""  # their own metadata says what belongs to them, and is read with them
    names = [name for name in _WEIGHTS if (checkpoint / name).exists()]
    if (checkpoint / _INDEX).exists():
        index, problem = _read_json(checkpoint / _INDEX)
        if problem:
            return problem
        names += sorted(set(index.get("weight_map", {}).values()))
    names += [str(path.relative_to(checkpoint)) for path in checkpoint.glob(f"*/{_WEIGHTS[1]}")]
    if not names:
        return f"{_WEIGHTS[0]} and {_WEIGHTS[1]} are missing"
    return next(filter(None, (_problem_of_safetensors(checkpoint / name) for name in names)), "")


def _problem_of_training_state(checkpoint: Path, state: dict) -> str:
    """Optimiser, scheduler and the random state of every process."""
    archives = [path for pattern in ("*.pt", "*.pth", "*.bin") for path in sorted(checkpoint.glob(pattern))]
    archives = [path for path in archives if path.name != "training_args.bin"]  # never read
    names = {path.name for path in archives} | {path.name for path in checkpoint.iterdir() if path.is_dir()}
    record = record_in(state) or {}
    processes = record.get("processes", 1)
    states = _random_states(processes)
    if not archives:
        return f"optimizer.pt, scheduler.pt and {states[0]} are missing (was it saved with `save_only_model=True`?)"
    missing = [name for name in ("scheduler.pt", *(states if record else ())) if name not in names]
    if not any(name.startswith(_OPTIMISERS) for name in names):
        missing.insert(0, "optimizer.pt")
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    return next((f"{path.name} is cut short" for path in archives if not zipfile.is_zipfile(path)), "")


def _random_states(processes: int) -> list[str]:
    """Their names, of the processes on this machine: without a shared disk each machine has its own."""
    if processes == 1:
        return ["rng_state.pth"]
    here = PartialState()
    first = here.process_index - here.local_process_index
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return [f"rng_state_{i}.pth" for i in range(first, min(first + on_this_machine, processes))]


def _problem_of_safetensors(path: Path) -> str:
    """A safetensors file says at its start how long it is."""
    if not path.exists():
        return f"{path.name} is missing"
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        header = file.read(length) if 8 + length <= size else b""
    try:
        described = json.loads(header)
    except ValueError:
        return f"{path.name} is cut short"
    end = max((entry["data_offsets"][1] for name, entry in described.items() if name != "__metadata__"), default=0)
    return "" if 8 + length + end == size else f"{path.name} is cut short"


def _read_json(path: Path) -> tuple[dict, str]:
    if not path.exists():
        return {}, f"{path.name} is missing"
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return {}, f"{path.name} is cut short"
    return (found, "") if isinstance(found, dict) else ({}, f"{path.name} is cut short")
