"""A command on several devices, by `accelerate launch`."""

from collections.abc import Collection
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .command import Command
from .parser import OF_THE_LAUNCH

_OPTION = OF_THE_LAUNCH[0]
# Of accelerate's options, those that say what is launched, which is said here
_OURS = ("-h", "--help", "-m", "--module", "--no_python", "--config_file")


def launch(command: Command, options: list[str]) -> int:
    """
    Run a command under the configuration that `--accelerate_config` names; returns the exit code.

    Args:
        command: of `trl-diffusion`.
        options: its own, among which may be accelerate's, such as `--num_processes`.

    Raises:
        SystemExit: there is no such configuration, or an option is neither the command's nor accelerate's.
    """
    parser, launcher = command.parser(), launch_command_parser()
    try:
        config, rest = configuration(options)
    except ValueError as error:
        parser.error(str(error))
    names = {name: action.nargs for name, action in launcher._option_string_actions.items() if name not in _OURS}
    of_launcher, own = _split(rest, {name for name in names if name not in parser._option_string_actions}, names)
    parser.check(own)  # once, instead of in each process
    which = ["--config_file", config] if config else []
    module = ["--module", "trl_diffusion.cli.main", command.name]
    asked = launcher.parse_args([*which, *of_launcher, *module, *own])
    if (asked.num_processes or 1) > 1 and _starts_one(asked):
        parser.error(
            f"`--num_processes {asked.num_processes}` would start one process: accelerate starts several under a "
            "configuration for several. Add `--accelerate_config multi_gpu`; on a CPU `--use_cpu`, instead of `--cpu`."
        )
    try:
        launch_command(asked)
    except ChildFailedError:  # which has said why
        return 1
    return 0


def _starts_one(asked: Any) -> bool:
    """Whether accelerate would run the command as it is, once, whatever the number of processes; it does not say so."""
    if asked.mpirun_hostfile:
        return False
    kinds = ("multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")
    if asked.cpu or any(getattr(asked, kind) for kind in kinds):
        return bool(asked.cpu)
    if asked.config_file or Path(default_config_file).is_file():
        kind = load_config_from_file(asked.config_file).distributed_type
        return kind in (DistributedType.NO, DistributedType.MULTI_CPU)
    return not torch.accelerator.is_available() or torch.accelerator.device_count() < 2


def configuration(options: list[str]) -> tuple[str | None, list[str]]:
    """
    The file of accelerate's configuration, and the options that are left.

    Args:
        options: with `--accelerate_config`, a file or the name of one that comes with this package, or without.

    Raises:
        ValueError: it is neither.
    """
    parts = [part for option in options for part in (option.split("=", 1) if option.startswith(_OPTION) else [option])]
    if _OPTION not in parts:
        return None, parts
    place = parts.index(_OPTION)
    if place + 1 == len(parts):
        raise ValueError(f"`{_OPTION}` needs a name or a file after it. The names are {', '.join(names())}.")
    given, rest = parts[place + 1], parts[:place] + parts[place + 2 :]
    if Path(given).is_file():
        return given, rest
    if given not in names():
        nearest = get_close_matches(given, names(), n=1)
        hint = f"Did you mean `{nearest[0]}`?" if nearest else f"The names are {', '.join(names())}."
        raise ValueError(f"`{_OPTION} {given}` is neither a file nor the name of a configuration. {hint}")
    return str(files("trl_diffusion.cli") / "accelerate_configs" / f"{given}.yaml"), rest


def names() -> list[str]:
    """Of the configurations that come with this package."""
    folder = files("trl_diffusion.cli") / "accelerate_configs"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _split(options: list[str], theirs: Collection[str], arity: dict[str, object]) -> tuple[list[str], list[str]]:
    """Options with these names, with their values, and the others."""
    found: list[str] = []
    others: list[str] = []
    left = iter(options)
    for option in left:
        name, _, value = option.partition("=")
        if name not in theirs:
            others.append(option)
            continue
        found.append(option)
        if not value and arity[name] != 0:
            found += [value for value in (next(left, None),) if value is not None]
    return found, others
