"""From a user's rows to what TRL is given to tokenise: plain texts, or messages of text, with a prompt."""

import copy
from typing import Any

from datasets import IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from ..checks.datasets import form_of, unformatted
from ..checks.findings import Judge, judge_row, judge_rows
from ..checks.rows import RowForm, RowForms
from ..checks.template import Writing
from ..models.chat_template import leaves_turns_open
from .tokens import NUMBER


def readable(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    forms: RowForms,
    *,
    mask_token_id: int,
    name: str,
    num_proc: int | None = None,
) -> tuple[Any, RowForm]:
    """
    The dataset as TRL is to read it, plain texts or messages of text with a prompt, and the form that it had.

    Args:
        dataset: rows as the user gave them.
        tokenizer: whose chat template will write conversations.
        forms: columns that a row must have, in one of these ways.
        mask_token_id: the mask token.
        name: of the dataset, for messages.
        num_proc: number of processes.

    Raises:
        ValueError: a row cannot be read, or the chat template cannot write it or leaves out a part of it. Rows of a
            stream are looked at as they are read.
    """
    dataset = unformatted(dataset, name)
    form = form_of(dataset, name, forms)
    if form.conversational and tokenizer.chat_template is None:
        raise ValueError(
            f"The {name} dataset is conversational, and the tokenizer has no chat template. Set "
            "`tokenizer.chat_template`, or give plain texts."
        )
    if form.conversational and leaves_turns_open(tokenizer):
        raise ValueError(
            "The tokenizer's chat template opens an assistant turn after every conversation, which would end every "
            "completion. Set `tokenizer.chat_template` to one that does so only with `add_generation_prompt=True`."
        )
    judges = [Writing.of(tokenizer, form, mask_token_id)] if form.conversational else []
    if isinstance(dataset, IterableDataset):
        options = {"form": form, "judges": [form.judge, *judges], "name": name}
        return dataset.map(_read_of_stream, with_indices=True, fn_kwargs=options), form
    for judge in judges:
        judge_rows(dataset, judge, name, num_proc)
    if "chosen" in form.columns and any("label" in columns for columns in forms):  # TRL will make two rows of one
        dataset = dataset.add_column(NUMBER, list(range(len(dataset))))
    if not form.prompted or (form.conversational and not _texts_only(dataset.features, form)):
        dataset = dataset.map(form.read, num_proc=num_proc, desc=f"Reading {name} dataset")
    return dataset, form


def _read_of_stream(row: dict[str, Any], number: int, form: RowForm, judges: list[Judge], name: str) -> dict[str, Any]:
    for judge in judges:
        judge_row(row, judge, number, name)
    return form.read(row)


def _texts_only(features: Any, form: RowForm) -> bool:
    """Whether the type of a column says that the content of each message is a text."""
    types = [getattr(features[column], "feature", None) for column in form.columns]
    return all(isinstance(turn, dict) and turn.get("content", Value("string")) == Value("string") for turn in types)


def without_length_filter(args: Any) -> Any:
    """TRL drops prompts that fill `max_length` without a word; ours are counted."""
    args = copy.copy(args)
    args.max_length = None
    return args
