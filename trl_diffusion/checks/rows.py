"""
One row as the trainers read it, and what is wrong with it before it is tokenised.

TRL meets the same faults later, as an error of another's making in the middle of a map, or trains on: on the Python
text of a list, on the user's words as part of the response, on a rating of 3 as True.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from .findings import Finding, Verdict

_KINDS = {True: "messages", False: "a text"}
_NO_SPACES = 0x2E80  # from here on scripts write words without spaces between them

RowForms = tuple[tuple[str, ...], ...]
Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class RowForm:
    """
    How the rows of a dataset are read.

    Args:
        columns: those with texts or messages.
        labelled: whether there is a `label`.
        conversational: whether the columns hold messages.
        prompted: whether there is a `prompt`; otherwise it is what `chosen` and `rejected` begin with, or what comes
            before the last turn of a conversation; a text alone has none.
    """

    columns: tuple[str, ...]
    labelled: bool
    conversational: bool
    prompted: bool

    @classmethod
    def of(cls, row: dict[str, Any], forms: RowForms) -> "RowForm | None":
        """The first of the forms of which the row has all columns; None if there is none."""
        for form in forms:
            if set(form) <= set(row):
                columns = tuple(name for name in form if name not in ("prompt", "label"))
                if "prompt" in form or ("prompt" in row and "chosen" in form):
                    columns = ("prompt", *columns)
                conversational = any(_is_messages(row[name]) for name in columns)
                return cls(columns, "label" in form, conversational, "prompt" in columns)
        return None

    @property
    def _is_one_conversation(self) -> bool:
        return len(self.columns) == 1 and self.conversational and not self.prompted

    @property
    def completions(self) -> tuple[str, ...]:
        """Columns of what is scored, in a row that was read."""
        if self._is_one_conversation:
            return ("completion",)
        return tuple(name for name in self.columns if name != "prompt")

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        """The columns with the parts of a message joined, and with the prompt where it was implicit."""
        read = {name: row[name] for name in self.columns}
        if self.conversational:
            read = {name: [_joined(turn) for turn in turns] for name, turns in read.items()}
        if "chosen" in read and not self.prompted:
            return split_prompt(read["chosen"], read["rejected"])
        if self._is_one_conversation:
            (turns,) = read.values()
            return {"prompt": turns[:-1], "completion": turns[-1:]}
        return read

    def judge(self, row: dict[str, Any]) -> Verdict:
        """What is wrong with a row that cannot be read."""
        fault = self._fault_of_values(row)
        if fault:
            return Verdict(fault)
        read = self.read(row)
        prompt = read.get("prompt", "")
        if "prompt" in read and not prompt and not self.prompted:
            return Verdict(_NOTHING_IN_COMMON if "chosen" in read else _ONE_TURN)
        if self.conversational:
            return Verdict(_fault_of_roles(read, self))
        answers = [read[name] for name in self.completions]
        repeated = prompt.strip() and answers and all(answer.startswith(prompt) for answer in answers)
        return Verdict(None, _REPEATED if repeated else None)

    def _fault_of_values(self, row: dict[str, Any]) -> Finding | None:
        for name in self.columns:
            value = row.get(name)
            if value is None:
                cure = f'Drop such rows with `dataset.filter(lambda row: row["{name}"] is not None)`.'
                return Finding(f"there is no `{name}` (None)", cure)
            if not isinstance(value, str) and not _is_messages(value):
                what = f"`{name}` is neither a text nor a list of messages with `role` and `content`"
                return Finding(what, "Convert it with `dataset.map`.", f"{str(value)[:80]!r} ({type(value).__name__})")
        for name in self.columns:
            messages = _is_messages(row[name])
            if messages != self.conversational:
                what = f"`{name}` holds {_KINDS[messages]} and other columns or rows hold {_KINDS[not messages]}"
                cure = f" {_WHOLE_PAIRS}" if len(self.columns) > 1 else ""
                return Finding(what, f"Use one of them for all.{cure}")
        label = row.get("label")
        if self.labelled and not (isinstance(label, int) and label in (0, 1)):
            what = "`label` is not True for a desirable completion or False for an undesirable one"
            cure = 'Map it, for instance with `dataset.map(lambda row: {"label": row["label"] > 0})`.'
            return Finding(what, cure, f"got {label!r}")
        return self._fault_of_messages(row) if self.conversational else None

    def _fault_of_messages(self, row: dict[str, Any]) -> Finding | None:
        if "chat_template_kwargs" in row and not isinstance(row["chat_template_kwargs"], dict):
            what = f"`chat_template_kwargs` is no dictionary ({row['chat_template_kwargs']!r})"
            return Finding(what, "Give every row one, or none and remove the column.")
        if not isinstance(parsed(row.get("tools")), list | None):
            return Finding("`tools` is no list, and no JSON text of one", "Correct it.", repr(row["tools"])[:80])
        found = (_fault_of_turns(row[name], name) for name in self.columns)
        return next((fault for fault in found if fault), None)


_NOTHING_IN_COMMON = Finding(
    "`chosen` and `rejected` do not begin alike, so that there is no prompt",
    "Give the dataset a column `prompt`, and the responses alone in the others; or drop such rows.",
)
_ONE_TURN = Finding(
    "the conversation has one turn only, so that there is no prompt",
    "Put what it answers before it, or drop such rows.",
)
_REPEATED = Finding(
    "every response begins with the text of `prompt`, which then stands there twice",
    "If responses hold the prompt, cut it off: "
    '`dataset.map(lambda row: {name: row[name].removeprefix(row["prompt"]) for name in ("chosen", "rejected")})`.',
)
_WHOLE_PAIRS = 'If the responses are whole conversations, leave the prompt out: `dataset.remove_columns("prompt")`.'
_WHOLE_COMPLETIONS = (
    "If it is a whole conversation, cut the prompt off: "
    '`dataset.map(lambda row: {"completion": row["completion"][len(row["prompt"]):]})`.'
)


def split_prompt(chosen: Any, rejected: Any) -> dict[str, Any]:
    """
    The implicit prompt, texts or turns with which both responses begin, and what is left of each.

    A prompt of text ends at the end of a word, and nothing of a response is lost. Each response keeps a word or a turn.
    """
    if isinstance(chosen, str):
        end = _common_words(chosen, rejected)
    else:
        end = min(_alike(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _common_words(chosen: str, rejected: str) -> int:
    """Where the common words end. The space after them is the next word's, as tokenizers have it."""

    def in_word(place: int) -> bool:
        return _joins(chosen[place - 1]) and (_joins(chosen[place : place + 1]) or _joins(rejected[place : place + 1]))

    end = _alike(chosen, rejected)
    shorter = min(chosen, rejected, key=len)
    if end == len(shorter):
        end = max(len(shorter.rstrip()) - 1, 0)
    while end and in_word(end):
        end -= 1
    return end - 1 if end and chosen[end - 1] == " " else end


def _alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of characters or turns with which both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _joins(character: str) -> bool:
    """Whether it makes one word with its neighbours."""
    return character.isalnum() and ord(character) < _NO_SPACES


def text_of(content: Any) -> str | None:
    """The text of a message's `content`, whose parts are joined; None if it is something else, or has other parts."""
    if isinstance(content, list) and all(_is_text(part) for part in content):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else None


def parsed(value: Any) -> Any:
    """What a text of JSON stands for, as TRL reads tools; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(turn, dict) for turn in value)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _joined(turn: dict[str, Any]) -> dict[str, Any]:
    return {**turn, "content": text_of(turn["content"])} if isinstance(turn.get("content"), list) else turn


def _fault_of_turns(turns: Turns, column: str) -> Finding | None:
    if not turns:
        return Finding(f"`{column}` has no message", "Give it at least one, or drop the row.")
    for turn in turns:
        content = turn.get("content")
        if not isinstance(turn.get("role"), str) or ("content" not in turn and not turn.get("tool_calls")):
            cure = " `trl.maybe_convert_to_chatml` turns `from` and `value` into them." if "from" in turn else ""
            what = f"a message of `{column}` has no `role`, or neither `content` nor `tool_calls`"
            return Finding(what, f"Fill it in or drop the row.{cure}", f"it has {_filled(turn)}")
        if content is None and not turn.get("tool_calls"):
            what = f"a message of `{column}` has no `content` (None)"
            return Finding(what, "Fill it in or drop the row.", f"it has {_filled(turn)}")
        if content is not None and text_of(content) is None:
            others = [part for part in content if not _is_text(part)] if isinstance(content, list) else [content]
            kinds = [part.get("type", part) if isinstance(part, dict) else part for part in others]
            what = f"a message of `{column}` has content that is not text"
            cure = "Only texts, and lists of parts of type 'text', can be scored: take the others out, or drop the row."
            return Finding(what, cure, ", ".join(str(kind)[:40] for kind in kinds))
    return None


def _filled(turn: dict[str, Any]) -> list[str]:
    return sorted(name for name, value in turn.items() if value is not None)


def _fault_of_roles(read: dict[str, Turns], form: RowForm) -> Finding | None:
    """The words of another than the assistant would be scored as the response."""
    for column in form.completions:
        other = next((turn["role"] for turn in read[column] if turn["role"] != "assistant"), None)
        if other is None:
            continue
        cure = "End the response before it, or move what comes before the last turn of the assistant to `prompt`."
        if column not in form.columns:
            column, cure = form.columns[0], "Drop the turns after the last one of the assistant with `dataset.map`."
            return Finding(f"`{column}` ends in a turn of the role {other!r}, and the last turn is learnt", cure)
        if form.prompted and read[column][: len(read["prompt"])] == read["prompt"]:
            cure = _WHOLE_PAIRS if "chosen" in form.columns else _WHOLE_COMPLETIONS
        what = f"`{column}` has a turn of the role {other!r}, which would be scored as part of the response"
        return Finding(what, cure)
    return None
