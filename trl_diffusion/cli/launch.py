"""A command on several devices, by `accelerate launch`."""

import sys
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser

_OPTION = "--accelerate_config"


def launch(name: str, options: list[str]) -> int:
    """Run a command under the configuration that `--accelerate_config` names; returns the exit code."""
    try:
        config, rest = configuration(options)
    except ValueError as error:
        print(f"trl-diffusion {name}: error: {error}", file=sys.stderr)
        return 2
    arguments = ["--config_file", config, "--module", "trl_diffusion.cli.main", name, *rest]
    launch_command(launch_command_parser().parse_args(arguments))
    return 0


def configuration(options: list[str]) -> tuple[str, list[str]]:
    """
    The file of accelerate's configuration, and the options that are left.

    Args:
        options: with `--accelerate_config`, a file or the name of one that comes with this package.

    Raises:
        ValueError: it is neither.
    """
    parts = [part for option in options for part in (option.split("=", 1) if option.startswith(_OPTION) else [option])]
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
