"""What the options of a configuration do, in its docstring: written from the `help` of its fields, in TRL's style."""

import textwrap
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

Config = TypeVar("Config", bound=type)


def described(config: Config) -> Config:
    """Class decorator of a configuration: its docstring goes on with a section of its own parameters."""
    parts = [(config.__doc__ or "").rstrip(), "", "    Parameters:"]
    for group, members in groups_of(config).items():
        parts += [f"        > Parameters that control {group}", ""]
        for field in members:
            about = [f"`{_kind(field)}`", "*optional*"]
            about += [] if field.default is None else [f"defaults to `{value_text(field.default)}`"]
            parts += [f"        {field.name} ({', '.join(about)}):"]
            parts += [_wrapped(help_text(field))]
        parts += [""]
    changed = changed_defaults(config)
    if changed:
        parent = f"[`~trl.{parent_of(config).__name__}`]"
        parts += ["    > [!NOTE]", f"    > These parameters have default values different from {parent}:"]
        parts += [f"    > - `{name}`: Defaults to `{ours}` instead of `{theirs}`." for name, ours, theirs in changed]
    config.__doc__ = "\n".join([*parts, "    "])
    return config


def parent_of(config: Any) -> Any:
    """TRL's configuration that it extends."""
    return config.__bases__[1]


def groups_of(config: Any) -> dict[str, list[Field[Any]]]:
    """The options that TRL's configuration does not have, by what they control."""
    inherited = {field.name for field in fields(parent_of(config))}
    groups: dict[str, list[Field[Any]]] = {}
    name = ""
    for field in fields(config):
        if field.name not in inherited:
            name = config.groups.get(field.name, name)
            groups.setdefault(name, []).append(field)
    return groups


def changed_defaults(config: Any) -> list[tuple[str, str, str]]:
    """Options of TRL whose default is another one here: name, ours, TRL's."""
    theirs = {field.name: field.default for field in fields(parent_of(config))}
    own = vars(config).get("__annotations__", {})
    return [
        (field.name, value_text(field.default), value_text(theirs[field.name]))
        for field in fields(config)
        if field.name in own and field.name in theirs and field.default != theirs[field.name]
    ]


def value_text(value: Any) -> str:
    """A value as it is written in a configuration."""
    return f'"{value}"' if isinstance(value, str) else "" if value is MISSING else str(value)


def help_text(field: Field[Any]) -> str:
    """The help of an option, with the quotes of code."""
    parts = field.metadata["help"].split("`")
    return "`".join(part.replace("'", '"') if i % 2 else part for i, part in enumerate(parts))


def _wrapped(text: str) -> str:
    indent = " " * 12
    return textwrap.fill(text, 120, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _kind(field: Field[Any]) -> str:
    kind: Any = field.type
    return getattr(kind, "__name__", None) or str(kind).split(" | ")[0]
