"""What a command of `trl-diffusion` is."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .parser import OptionParser
from .parting import part


@dataclass(frozen=True)
class Command:
    """
    Args:
        name: on the command line.
        about: what it does, in a few sentences.
        example: options with which it makes sense.
        arguments: configurations whose fields are its options.
        act: is given these, filled.
        without: fields that are no options, since they would change nothing.
    """

    name: str
    about: str
    example: str
    arguments: tuple[type, ...]
    act: Callable[..., None]
    without: tuple[str, ...] = ()

    def run(self, *values: Any) -> None:
        """Do it; the last that the processes do together."""
        self.act(*values)
        part()

    def parser(self) -> OptionParser:
        """Of its options."""
        return OptionParser(self.arguments, prog=f"trl-diffusion {self.name}", without=self.without)

    def introduction(self) -> str:
        """What it says without options: what it is for, an example, and the defaults of the options of this package."""
        own = [f for kind in self.arguments for f in dataclasses.fields(kind) if _is_ours(kind, f.name)]
        defaults = [
            f"    --{f.name} {_written(f.default)}" for f in own if f.default not in (None, dataclasses.MISSING)
        ]
        lines = [self.about, "", "For example:", "", f"    trl-diffusion {self.name} {self.example}", ""]
        lines += ["Unless you say otherwise:", "", *defaults, ""] if defaults else []
        return "\n".join([*lines, f"`trl-diffusion {self.name} --help` lists all options."])


def _is_ours(kind: Any, name: str) -> bool:
    owner = next(c for c in reversed(kind.__mro__) if name in getattr(c, "__dataclass_fields__", ()))
    return owner.__module__.startswith("trl_diffusion.")


def _written(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
