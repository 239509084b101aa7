"""
TRL's parser of options and YAML files, strict and readable: whole names only, errors of a line, our options first.

Options that are wrong are a message and exit code 2, before anything is loaded.
"""

import dataclasses
import sys
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

from yaml import YAMLError

from ..checks.options import REFUSED
from ..scoring.door import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

_OURS = "Of this package"
_BY_CLASS = {ModelConfig: "Model and adapter (TRL)", ScriptArguments: "Data (TRL)", DatasetMixtureConfig: "Data (TRL)"}
_BY_LIBRARY = {"trl": "Trainer (TRL)", "transformers": "Training (transformers)"}
_TRAINING = _BY_LIBRARY["transformers"]
# Of the hundreds of transformers, those that most runs set: the others are listed by `--help-all`
_MOST_USED = (
    *("output_dir", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "gradient_checkpointing", "bf16", "use_cpu", "seed", "logging_steps"),
    *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "resume_from_checkpoint", "report_to"),
)
OF_THE_LAUNCH = ("--accelerate_config", "--num_processes")
_SECTIONS = (_OURS, *dict.fromkeys(_BY_CLASS.values()), *_BY_LIBRARY.values())


class OptionParser(TrlParser):
    """
    Parses a command line, and the YAML file after `--config`, into dataclasses.

    Args:
        dataclass_types: configurations whose fields are the options.
        prog: name of the program; by default that of the script.
        without: fields that are no options, and keep their defaults.
    """

    def __init__(self, dataclass_types: Iterable[type], prog: str | None = None, without: Collection[str] = ()):
        self._without = without
        super().__init__(
            dataclass_types,
            prog=prog,
            allow_abbrev=False,
            usage="%(prog)s [--config FILE.yaml] [--option value ...]",
            description="Options may stand in the YAML file too; those of the command line take precedence. What is "
            "True by default is turned off by `--option False` or `--no_option`. Of the options of transformers the "
            "most used are listed; `--help-all` lists all.",
            formatter_class=_OneName,
        )
        self.add_argument("--help-all", action=_HelpAll, nargs=0, dest=SUPPRESS, help="show all options and exit")
        for action in self._actions:
            if action.option_strings[0].startswith("--no_") or action.dest in REFUSED:
                action.help = SUPPRESS

    def _parse_dataclass_field(self, parser: Any, field: Any) -> None:
        if field.name in self._without:
            parser.set_defaults(**{field.name: field.default})
        else:
            super()._parse_dataclass_field(parser, field)

    def parse_args_and_config(self, args: Iterable[str] | None = None, *more: Any, **options: Any) -> tuple[Any, ...]:
        """Parse, see [`~trl.TrlParser.parse_args_and_config`]; an option that is wrong ends the program."""
        given = [part for arg in (sys.argv[1:] if args is None else args) for part in _config_and_file(arg)]
        if given[-1:] == ["--config"]:
            self.error("`--config` needs a YAML file after it.")
        try:
            return super().parse_args_and_config(given, *more, **options)
        except (OSError, ValueError, YAMLError) as error:
            self.error(str(error))

    def check(self, args: list[str]) -> None:
        """Options by name and kind, without making the configurations; one that is wrong ends the program."""
        given = [part for arg in args for part in _config_and_file(arg)]
        if "--config" in given:
            place = given.index("--config")
            given = given[:place] + given[place + 2 :]
        self.parse_known_args(given)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Called by the above: nothing unknown is let through, to be refused after the configurations are made."""
        namespace, unknown = super().parse_known_args(args, namespace)
        self._refuse(unknown, "")
        return namespace, unknown

    def set_defaults_with_config(self, **options: Any) -> list[str]:
        """Take the options of a YAML file, see [`~trl.TrlParser.set_defaults_with_config`]."""
        lists = {action.dest for action in self._actions if action.nargs == "+"}
        one = {name for name, value in options.items() if name in lists and isinstance(value, str | int | float | dict)}
        # A text would be read as a list of its characters
        options = {name: [value] if name in one else value for name, value in options.items()}
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
        if name in OF_THE_LAUNCH:
            hint = "It says how a command is launched: give it to `trl-diffusion` on the command line."
        self.error(f"`{name}`{where} is not an option. {hint}")

    def error(self, message: str) -> NoReturn:
        """End with a line instead of a page of usage."""
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)

    def format_help(self, everything: bool = False) -> str:
        """Our options, then TRL's, then of transformers' the most used, or all."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, ())
        formatter.add_text(self.description)
        sections = self._sections()
        for title in _SECTIONS:
            shown = [action for action in self._actions if sections[action.dest] == title]
            if title == _TRAINING and not everything:
                shown = [action for action in shown if action.dest in _MOST_USED]
            formatter.start_section(title)
            formatter.add_arguments(shown)
            formatter.end_section()
        return formatter.format_help()

    def _sections(self) -> dict[str, str]:
        """By option, its section: that of the class that introduced it, whoever changed its default."""
        sections = {"help": _OURS, SUPPRESS: _OURS}
        for kind in self.dataclass_types:
            for field in dataclasses.fields(kind):
                owner = next(c for c in reversed(kind.__mro__) if field.name in getattr(c, "__dataclass_fields__", ()))
                library = _BY_LIBRARY.get(owner.__module__.split(".")[0], _OURS)
                sections[field.name] = _BY_CLASS.get(owner, library)
        return sections


class _HelpAll(Action):
    def __call__(self, parser: Any, *_: Any) -> NoReturn:
        print(parser.format_help(everything=True), end="")
        raise SystemExit(0)


class _OneName(ArgumentDefaultsHelpFormatter):
    """Each option by one of its two spellings, and its value by its kind."""

    def _format_action_invocation(self, action: Action) -> str:
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")] or action.option_strings
        value = "" if action.nargs == 0 else self._format_args(action, self._kind(action))
        return f"{', '.join(names)} {value}".rstrip()

    def _kind(self, action: Action) -> str:
        return "N" if action.type is int else "X" if action.type is float else "VALUE"


def _config_and_file(argument: str) -> list[str]:
    """`--config=FILE` as TRL looks for it."""
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]
