"""
Which checkpoint a run can be resumed from: the last one whose files are all there.

A process can be killed while it saves, and transformers picks the highest number, whole or not. Trying to load would
not tell: it starts a new optimiser or new random states, without a word, where their files are missing. So the last
process to finish writes down what there is: `run.json` holds the length of every file, and the record of the run. Only
`trainer_state.json` comes after it, and then older checkpoints are removed. Nothing is unpickled.
"""

import json
import re
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import gather_object

logger = get_logger(__name__)

RUN = "run.json"
_VERSION = 1  # of what is in it
_STATE = "trainer_state.json"
_NUMBERED = re.compile(r"checkpoint-(\d+)")
_NEVER_READ = ("training_args.bin", "README.md", RUN, _STATE)


def seal(folder: str, record: dict[str, Any]) -> None:
    """Write down what a checkpoint holds, and of which run it is, when all but `trainer_state.json` is there."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name not in _NEVER_READ)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    content = {"version": _VERSION, "record": record, "files": files}
    (Path(folder) / RUN).write_text(json.dumps(content, indent=2) + "\n")


def record_of(checkpoint: str | Path) -> dict[str, Any]:
    """The record of the run of a whole checkpoint."""
    return json.loads((Path(checkpoint) / RUN).read_text())["record"]


def problem_of(checkpoint: Path) -> str:
    """What is missing from a checkpoint or cut short in it; empty if it is whole."""
    if not checkpoint.is_dir():
        return f"{checkpoint} is no folder"
    state, problem = _read_json(checkpoint / _STATE)
    if problem:
        return problem
    match = _NUMBERED.fullmatch(checkpoint.name)
    if match and state.get("global_step") != int(match[1]):
        return f"{_STATE} is of step {state.get('global_step')}"
    run, problem = _read_json(checkpoint / RUN)
    if problem:
        return f"{problem} (was it saved by another program, or with `save_only_model=True`?)"
    if run.get("version") != _VERSION:
        return f"{RUN} has the version {run.get('version')}, and this one of trl_diffusion reads {_VERSION}"
    for name, size in run["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} is cut short or another: it has {path.stat().st_size} bytes, and was saved with {size}"
    return ""


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
        found, problem = _last_whole(Path(output_dir)) if given is True else _whole(given), ""
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


def _whole(given: str) -> Path:
    problem = problem_of(Path(given))
    if problem:
        raise ValueError(
            f"`resume_from_checkpoint={given!r}` is no whole checkpoint: {problem}. If it was being saved when its run "
            "ended, give an earlier one, or `resume_from_checkpoint=True` for the last whole one."
        )
    return Path(given)


def _last_whole(output_dir: Path) -> Path:
    """The whole checkpoint with the highest number, and a warning for each later one."""
    numbered = [(int(match[1]), path) for path in output_dir.glob("*") if (match := _NUMBERED.fullmatch(path.name))]
    broken: dict[str, str] = {}
    for _, path in sorted(numbered, reverse=True):
        problem = problem_of(path)
        if problem:
            broken[path.name] = problem
            continue
        for name, why in broken.items():
            logger.warning(
                "%s is no whole checkpoint and is passed over: %s. Resuming from %s. Remove %s when you no longer "
                "need it.",
                *(name, why, path.name, name),
            )
        return path
    listed = "; ".join(f"{name}: {why}" for name, why in broken.items()) or "it holds none"
    raise ValueError(
        f"`resume_from_checkpoint=True` found no whole checkpoint in `output_dir={str(output_dir)!r}` ({listed}). "
        "Start anew without `resume_from_checkpoint`, or give the path of a checkpoint."
    )


def _read_json(path: Path) -> tuple[dict, str]:
    if not path.exists():
        return {}, f"{path.name} is missing"
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return {}, f"{path.name} is cut short"
    return (found, "") if isinstance(found, dict) else ({}, f"{path.name} is cut short")
