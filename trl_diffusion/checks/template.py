"""
Whether a chat template writes all that a row says: what it leaves out, no model ever sees.

A template is a program, so every row is written with it and the text is searched. Templates may trim, break lines anew
and write calls as JSON; none of this counts as leaving out.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..models.chat_template import leaves_turns_open
from .findings import Finding, Verdict
from .rows import RowForm, Turns, parsed

_CURE = (
    "Set `tokenizer.chat_template` to one that writes it, or take it out of the rows with `dataset.map` if it is not "
    "meant to be seen."
)


def refuse_open_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that opens an assistant turn after every conversation."""
    if leaves_turns_open(tokenizer):
        raise ValueError(
            "The tokenizer's chat template opens an assistant turn after every conversation, which would end every "
            "completion. Set `tokenizer.chat_template` to one that does so only with `add_generation_prompt=True`."
        )


@dataclass(frozen=True)
class Writing:
    """
    The judge of rows of a conversational dataset that a tokenizer will write.

    Args:
        tokenizer: with its chat template.
        form: how rows are read.
        special: finds special tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    form: RowForm
    special: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, form: RowForm, mask_token_id: int) -> "Writing":
        """The judge of rows of this form; those with the mask token are dropped when they are tokenised."""
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens = (added | set(tokenizer.all_special_tokens)) - {tokenizer.convert_ids_to_tokens(mask_token_id)}
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        return cls(tokenizer, form, re.compile("|".join(map(re.escape, longest_first))))

    def __call__(self, row: dict[str, Any]) -> Verdict:
        """What the template cannot write or leaves out, and special tokens in the words."""
        read, tools = self.form.read(row), parsed(row.get("tools"))
        try:
            opened = self._write(read["prompt"], row, tools, add_generation_prompt=True)
            whole = {f"`prompt` and `{name}`": [*read["prompt"], *read[name]] for name in self.form.completions}
            written = [(where, turns, self._write(turns, row, tools)) for where, turns in whole.items()]
        except Exception as error:  # whatever a template of another's raises
            what = "the tokenizer's chat template cannot write the conversation"
            return Verdict(Finding(what, "Correct the template or the row.", f"{type(error).__name__}: {error}"))
        for where, turns, text in written or [("`prompt`", read["prompt"], opened)]:
            lost = next(left_out(turns, tools, text), None)
            if lost:
                what = f"the tokenizer's chat template leaves out {lost[0]} in {where}"
                return Verdict(Finding(what, _CURE, f"{lost[1][:60]!r} is missing from {text[-120:]!r}"))
        return Verdict(None, self._remark(read))

    def _write(self, turns: Turns, row: dict[str, Any], tools: Any, **options: Any) -> str:
        options = {"tools": tools, **row.get("chat_template_kwargs", {}), **options}
        return self.tokenizer.apply_chat_template(turns, tokenize=False, **options)

    def _remark(self, read: dict[str, Turns]) -> Finding | None:
        """Special tokens in the words of a message are read as structure: as an end of turn, or as another's turn."""
        for turn in (turn for turns in read.values() for turn in turns):
            found = self.special.search(turn.get("content") or "")
            if found:
                what = "a message has a special token of the tokenizer in its words, which is read as structure"
                return Finding(what, "docs/trust.md says how to keep it out.", repr(found[0]))
        return None


def left_out(turns: Turns, tools: Any, written: str) -> Iterator[tuple[str, str]]:
    """
    What a conversation says and the text that was written of it does not: whose it is, and the words.

    What is said several times has to be there as often. White space does not count, nor whether words are escaped.
    """
    said = list(_said(turns, tools))
    everything, written = [_squeezed(words) for _, words in said], _squeezed(written)
    for whose, words in reversed(said):  # of equal words, a call or a tool is the likelier to be left out
        wanted = _squeezed(words)
        if wanted and sum(map(written.count, _spellings(words))) < sum(other.count(wanted) for other in everything):
            yield whose, words


def _said(turns: Turns, tools: Any) -> Iterator[tuple[str, str]]:
    for turn in turns:
        for key in ("content", "reasoning_content"):
            if isinstance(turn.get(key), str):
                yield f"what the {turn['role']} says", turn[key]
        for call in turn.get("tool_calls") or ():
            function = call.get("function") or call
            asked = _leaves([function.get("name"), function.get("arguments")])
            yield from ((f"a tool call of the {turn['role']}", word) for word in asked)
    for tool in tools or ():
        function = (tool.get("function") or tool) if isinstance(tool, dict) else {}
        yield from (("a tool", function[key]) for key in ("name", "description") if isinstance(function.get(key), str))


def _leaves(value: Any) -> Iterator[str]:
    """Names, texts and numbers in the arguments of a call, which may stand there as JSON."""
    value = parsed(value) if isinstance(value, str) and value.lstrip().startswith(("{", "[")) else value
    if isinstance(value, dict):  # a column of structures has the names of all rows, and None where a row has nothing
        filled = [(name, inner) for name, inner in value.items() if inner is not None]
        value = [part for pair in filled for part in pair]
    if isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _spellings(words: str) -> set[str]:
    """As they are, as JSON, and as JSON within JSON."""
    escaped = json.dumps(words, ensure_ascii=False)[1:-1]
    return {_squeezed(text) for text in (words, escaped, json.dumps(escaped, ensure_ascii=False)[1:-1])}


def _squeezed(text: str) -> str:
    return "".join(text.split())
