"""Prompts, from what a user gives to tokens that a sampler can fill a canvas after."""

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompts:
    """
    Args:
        rows: as they were given: a `prompt`, text or messages, and other columns, which reward functions may read.
        ids: tokens of each prompt.
        conversational: whether prompts are messages.
    """

    rows: list[dict[str, Any]]
    ids: list[list[int]]
    conversational: bool

    @property
    def columns(self) -> list[str]:
        """Those besides the prompt, in GRPO's way without what it makes itself."""
        return [name for name in self.rows[0] if name not in ("prompt", "completion", "completion_ids")]

    @property
    def occurrences(self) -> list[int]:
        """How often the same tokens came before: equal prompts are answered anew."""
        seen: Counter[tuple[int, ...]] = Counter()
        numbers = []
        for ids in map(tuple, self.ids):
            numbers.append(seen[ids])
            seen[ids] += 1
        return numbers

    def key(self) -> str:
        """A hash of the tokens."""
        return blake2b(repr(self.ids).encode(), digest_size=16).hexdigest()


def read_prompts(prompts: Any, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """
    Args:
        prompts: a dataset with a column `prompt`, or a list of texts or of conversations.
        tokenizer: with a chat template, if they are conversations.

    Raises:
        TypeError: not a dataset, and not a list.
        ValueError: there are none, they are of two kinds, or one is empty.
    """
    if isinstance(prompts, Dataset):
        if "prompt" not in prompts.column_names:
            raise ValueError(f"`prompts` has the columns {prompts.column_names}, and needs `prompt`.")
        rows = prompts.to_list()
    elif isinstance(prompts, list):
        rows = [{"prompt": prompt} for prompt in prompts]
    else:
        raise TypeError(f"`prompts` must be a `Dataset` or a list, got `{type(prompts).__name__}`.")
    if not rows:
        raise ValueError("`prompts` is empty: give at least one.")
    kinds = [_kind(row["prompt"]) for row in rows]
    for number, kind in enumerate(kinds):
        if kind is None or kind != kinds[0]:
            raise ValueError(
                f"Prompt {number} is neither a text nor a list of messages, or not what the first one is: "
                f"{str(rows[number]['prompt'])[:80]!r}. Use one of them for all."
            )
    conversational = kinds[0] == "messages"
    if conversational and tokenizer.chat_template is None:
        raise ValueError("Prompts are messages, and the tokenizer has no chat template: set `tokenizer.chat_template`.")
    ids = [_tokens(row["prompt"], tokenizer, conversational) for row in rows]
    empty = [number for number, each in enumerate(ids) if not each]
    if empty:
        raise ValueError(f"Prompts {empty[:5]} have no token. Drop them, or give them a beginning of text.")
    return Prompts(rows, ids, conversational)


def refuse_long(prompts: Prompts, max_new_tokens: int, max_positions: int | None) -> None:
    """Refuse prompts after which the canvas does not fit into the positions of the model, before any is answered."""
    if max_positions is None:
        return
    long = [number for number, ids in enumerate(prompts.ids) if len(ids) + max_new_tokens > max_positions]
    if long:
        longest = max(len(prompts.ids[number]) for number in long)
        raise ValueError(
            f"{len(long)} of {len(prompts.ids)} prompts (rows {', '.join(map(str, long[:5]))}) do not fit. With "
            f"`max_new_tokens={max_new_tokens}` a prompt may have {max_positions - max_new_tokens} tokens, since the "
            f"model has {max_positions} positions, and the longest has {longest}. Lower `max_new_tokens`, or drop them."
        )


def _kind(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return "text"
    is_messages = isinstance(prompt, list) and bool(prompt) and all(isinstance(turn, dict) for turn in prompt)
    return "messages" if is_messages else None


def _tokens(prompt: Any, tokenizer: PreTrainedTokenizerBase, conversational: bool) -> list[int]:
    if not conversational:
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]
