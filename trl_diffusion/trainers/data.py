"""
From the rows that TRL tokenised to rows that can be scored: the end of text, and what must not reach the trainer.

TRL gives `prompt_ids` and one or more columns of completion ids. A completion longer than `max_length` would be scored
without its end, a mask token inside the data would be taken for noise: such rows are dropped, and counted.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

_REASONS = {
    "empty completion": "a completion has no token besides the end of the turn",
    "prompt fills max_length": "the prompt alone fills `max_length`; raise it",
    "longer than max_length": "prompt and completion exceed `max_length`; raise it",
    "mask token": "the text contains the mask token, which would be taken for noise",
}


def without_length_filter(args: Any) -> Any:
    """The arguments for TRL, which drops prompts that fill `max_length` without a word; ours are counted."""
    args = copy.copy(args)
    args.max_length = None
    return args


def append_eos(dataset: Dataset | IterableDataset, columns: Sequence[str], eos_token_id: int, name: str = "") -> Any:
    """Append the end of text to the completions in `columns` that do not end in it."""
    add = partial(_append_eos, columns=tuple(columns), eos_token_id=eos_token_id)
    return dataset.map(add, **_description(dataset, f"Appending EOS to {name} dataset"))


def drop_unusable_rows(
    dataset: Dataset | IterableDataset,
    columns: Sequence[str],
    *,
    mask_token_id: int,
    ending_ids: frozenset[int],
    max_length: int | None,
    vocab_size: int,
    name: str,
) -> Any:
    """
    Drop the rows that cannot be scored, with a warning that counts them by reason.

    Args:
        dataset: tokenised rows with `prompt_ids` and `columns`.
        columns: columns of completion ids.
        mask_token_id: the mask token.
        ending_ids: tokens that end a completion; one made only of them is empty.
        max_length: longest row, prompt and completion, in tokens.
        vocab_size: of the model.
        name: of the dataset, for messages.

    Returns:
        The dataset without them. A streaming dataset is filtered as it is read, with one warning per reason.

    Raises:
        ValueError: a prompt has no token, a token is outside the vocabulary, or no row is left.
    """
    problem = partial(
        row_problem,
        columns=tuple(columns),
        mask_token_id=mask_token_id,
        ending_ids=ending_ids,
        max_length=max_length,
        vocab_size=vocab_size,
    )
    if isinstance(dataset, IterableDataset):
        return dataset.filter(partial(_keep_or_warn, problem=problem, name=name))
    checked = dataset.map(
        partial(_label, problem=problem, columns=tuple(columns)),
        remove_columns=dataset.column_names,
        desc=f"Checking {name} dataset",
    )
    _warn_of_equal_pairs(sum(checked["equal"]), len(dataset), name)
    found = checked["problem"]
    counts = Counter(reason for reason in found if reason)
    if not counts:
        return dataset
    if sum(counts.values()) == len(dataset):
        raise ValueError(f"No row of the {name} dataset can be used: {_explain(counts)}.")
    logger.warning(
        "Dropped %d of %d rows of the %s dataset: %s.", sum(counts.values()), len(found), name, _explain(counts)
    )
    return dataset.select([index for index, reason in enumerate(found) if not reason])


def row_problem(
    row: dict[str, Any],
    *,
    columns: Sequence[str],
    mask_token_id: int,
    ending_ids: frozenset[int],
    max_length: int | None,
    vocab_size: int,
) -> str:
    """
    Why a row cannot be scored; empty if it can.

    Raises:
        ValueError: the prompt has no token, so a completion would start at position 0, or a token is outside the
            model's vocabulary.
    """
    prompt = row["prompt_ids"]
    if len(prompt) == 0:
        raise ValueError(
            "A prompt has no token, so its completion starts at position 0, which TRL leaves out of the score. Give "
            "every example a prompt; a beginning-of-text token is enough."
        )
    highest = max(max(ids, default=0) for ids in (prompt, *(row[column] for column in columns)))
    if highest >= vocab_size:
        raise ValueError(
            f"The tokenizer makes the token {highest}, and the model's vocabulary has {vocab_size} tokens. Use the "
            "tokenizer that belongs to the model, or call `model.resize_token_embeddings(len(tokenizer))`."
        )
    if max_length is not None and len(prompt) >= max_length:
        return "prompt fills max_length"
    for column in columns:
        completion = row[column]
        if all(token in ending_ids for token in completion):
            return "empty completion"
        if mask_token_id in completion or mask_token_id in prompt:
            return "mask token"
        if max_length is not None and len(prompt) + len(completion) > max_length:
            return "longer than max_length"
    return ""


def ending_token_ids(tokenizer: PreTrainedTokenizerBase, end_of_turn: Sequence[str]) -> frozenset[int]:
    """Tokens that end a completion: the end of text, and the end of turn of the chat template."""
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[token] for token in end_of_turn if token in vocabulary}
    return frozenset(ids | {tokenizer.eos_token_id})


def _append_eos(row, columns, eos_token_id):
    return {c: row[c] if row[c][-1:] == [eos_token_id] else [*row[c], eos_token_id] for c in columns}


def _label(row, problem: Callable[[dict], str], columns):
    paired = columns == ("chosen_ids", "rejected_ids")
    return {"problem": problem(row), "equal": paired and row["chosen_ids"] == row["rejected_ids"]}


def _warn_of_equal_pairs(count: int, total: int, name: str) -> None:
    if count:
        logger.warning(
            "In %d of %d rows of the %s dataset the chosen and the rejected response are the same: their preference "
            "cannot be learnt, and they only cost time. Drop them with `dataset.filter`.",
            count,
            total,
            name,
        )


def _keep_or_warn(row, problem: Callable[[dict], str], name: str) -> bool:
    reason = problem(row)
    if reason:
        logger.warning_once(f"Dropping rows of the streaming {name} dataset: {_REASONS[reason]}.")
    return not reason


def _explain(counts: Counter) -> str:
    return "; ".join(f"{count} because {_REASONS[reason]}" for reason, count in counts.most_common())


def _description(dataset, text):
    return {"desc": text} if isinstance(dataset, Dataset) else {}
