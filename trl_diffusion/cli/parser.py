"""
TRL's parser of options and YAML files, strict and readable: whole names only, errors of a line, our options first.

Options that are wrong are a message and exit code 2, before anything is loaded.
"""

import dataclasses
import sys
from argparse import SUPPRESS
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

from yaml import YAMLError

from ..scoring.door import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

_OURS = "Of this package"
_BY_CLASS = {ModelConfig: "Model and adapter (TRL)", ScriptArguments: "Data (TRL)", DatasetMixtureConfig: "Data (TRL)"}
_BY_LIBRARY = {"trl": "Preference optimisation (TRL)", "transformers": "Training (transformers)"}
_SECTIONS = (_OURS, *dict.fromkeys(_BY_CLASS.values()), *_BY_LIBRARY.values())


class OptionParser(TrlParser):
    """
    Parses a command line, and the YAML file after `--config`, into dataclasses.

    Args:
        dataclass_types: configurations whose fields are the options.
    """

    def __init__(self, dataclass_types: Iterable[type]):
        super().__init__(
            dataclass_types,
            allow_abbrev=False,
            usage="%(prog)s [--config FILE.yaml] [--option value ...]",
            description="Options may stand in the YAML file too; those of the command line take precedence. What is "
            "True by default is turned off by `--option False` or `--no_option`.",
        )
        for action in self._actions:
            if action.option_strings[0].startswith("--no_"):
                action.help = SUPPRESS

    def parse_args_and_config(self, args: Iterable[str] | None = None, *more: Any, **options: Any) -> tuple[Any, ...]:
        """Parse, see [`~trl.TrlParser.parse_args_and_config`]; an option that is wrong ends the program."""
        given = [part for arg in (sys.argv[1:] if args is None else args) for part in _config_and_file(arg)]
        if given[-1:] == ["--config"]:
            self.error("`--config` needs a YAML file after it.")
        try:
            return super().parse_args_and_config(given, *more, **options)
        except (OSError, ValueError, YAMLError) as error:
            self.error(str(error))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Called by the above: nothing unknown is let through, to be refused after the configurations are made."""
        namespace, unknown = super().parse_known_args(args, namespace)
        self._refuse(unknown, "")
        return namespace, unknown

    def set_defaults_with_config(self, **options: Any) -> list[str]:
        """Take the options of a YAML file, see [`~trl.TrlParser.set_defaults_with_config`]."""
        unknown = super().set_defaults_with_config(**options)
        self._refuse(unknown, " in the YAML file")
        return unknown

    def _refuse(self, unknown: list[str], where: str) -> None:
        if not unknown:
            return
        known = [name for name in self._option_string_actions if name.startswith("--") and "-" not in name[2:]]
        name = next((word for word in unknown if word.startswith("--")), unknown[0]).split("=")[0]
        nearest = get_close_matches(name.replace("-", "_").replace("__", "--", 1), known, n=1)
        hint = f"Did you mean `{nearest[0]}`?" if nearest else "`--help` lists the options."
        self.error(f"`{name}`{where} is not an option. {hint}")

    def error(self, message: str) -> NoReturn:
        """End with a line instead of a page of usage."""
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)

    def format_help(self) -> str:
        """Our options, then TRL's, then transformers'."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, ())
        formatter.add_text(self.description)
        sections = self._sections()
        for title in _SECTIONS:
            formatter.start_section(title)
            formatter.add_arguments([action for action in self._actions if sections[action.dest] == title])
            formatter.end_section()
        return formatter.format_help()

    def _sections(self) -> dict[str, str]:
        """By option, its section: that of the class that introduced it, whoever changed its default."""
        sections = {"help": _OURS}
        for kind in self.dataclass_types:
            for field in dataclasses.fields(kind):
                owner = next(c for c in reversed(kind.__mro__) if field.name in getattr(c, "__dataclass_fields__", ()))
                library = _BY_LIBRARY.get(owner.__module__.split(".")[0], _OURS)
                sections[field.name] = _BY_CLASS.get(owner, library)
        return sections


def _config_and_file(argument: str) -> list[str]:
    """`--config=FILE` as TRL looks for it."""
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]
