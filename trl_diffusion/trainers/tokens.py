"""
From the rows that TRL tokenised to rows that can be scored: one beginning and one end of text, nothing that cannot be.

TRL gives `prompt_ids` and one or more columns of completion ids. A completion longer than `max_length` would be scored
without its end, a mask token inside the data would be taken for noise: such rows are dropped, and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from accelerate.logging import get_logger
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from .._version import __version__
from ..checks.findings import Count, Finding, Verdict, count, unpacked, warn_of_rows
from ..checks.inputs import refuse_unknown_token
from ..models.end_of_text import added_tokens

logger = get_logger(__name__)

NUMBER = "trl_diffusion_row"  # column with the user's number of a row, where TRL makes two rows of one

_EMPTY_PROMPT = Finding(
    "a prompt has no token, so its completion starts at position 0, which TRL leaves out of the score",
    "give every example a prompt, a beginning-of-text token is enough",
)
_EMPTY = Finding("a completion has no token besides the end of the turn", "")
_MASKED = Finding("the text contains the mask token, which would be taken for noise", "")
_EQUAL = Finding(
    "the chosen and the rejected response are the same: their preference cannot be learnt, and they only cost time",
    "Drop them with `dataset.filter`.",
)


@dataclass(frozen=True)
class TokenRules:
    """
    What tokenised rows are to be like.

    Args:
        tokenizer: which made them.
        conversational: whether they were written with its chat template.
        mask_token_id: the mask token.
        vocab_size: of the model.
        end_of_turn: tokens that end an assistant turn; a completion made only of them and the end of text is empty.
        append_eos: whether the end of text follows a conversation. A text always ends in it.
        max_length: longest row, prompt and completion, in tokens.
        max_positions: longest row that the model has positions for, in tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    conversational: bool
    mask_token_id: int
    vocab_size: int
    end_of_turn: tuple[str, ...] = ()
    append_eos: bool = True
    max_length: int | None = None
    max_positions: int | None = None

    def finish(self, row: dict[str, Any], columns: Sequence[str], **_: Any) -> dict[str, Any]:
        """The tokens of a row with one beginning and one end of text, and a [`Verdict`] on them."""
        prompt, completions = list(row["prompt_ids"]), [list(row[column]) for column in columns]
        if not self.conversational:  # TRL lets the tokenizer add what it adds to a text
            before, after = self.added
            if before and prompt[: 2 * len(before)] == before * 2:  # it was in the text already
                prompt = prompt[len(before) :]
            completions = [ids[: len(ids) - len(after)] if after else ids for ids in completions]
        completions = [self.ended(ids) for ids in completions]
        verdict = self.judge(prompt, completions)
        return {"prompt_ids": prompt, **dict(zip(columns, completions, strict=True)), **verdict.packed()}

    def ended(self, ids: list[int]) -> list[int]:
        """
        A completion that ends in one end of text, and perhaps white space after it.

        A second one, from a chat template whose end of turn it is or from a tokenizer that adds its own, is one more
        token to score, which the model has never learnt.
        """
        eos, start = self.tokenizer.eos_token_id, len(ids)
        while start and (ids[start - 1] == eos or not self.tokenizer.decode([ids[start - 1]]).strip()):
            start -= 1
        ends = [place for place in range(start, len(ids)) if ids[place] == eos]
        if not ends:
            return [*ids, eos] if self.append_eos or not self.conversational else ids
        return ids[: ends[1]] if len(ends) > 1 else ids

    def judge(self, prompt: list[int], completions: list[list[int]]) -> Verdict:
        """
        Why a row cannot be scored, and whether it is worth it.

        Raises:
            ValueError: a token is outside the model's vocabulary.
        """
        refuse_unknown_token(max(max(ids, default=0) for ids in (prompt, *completions)), self.vocab_size)
        if not prompt:
            return Verdict(_EMPTY_PROMPT)
        if any(all(token in self.endings for token in ids) for ids in completions):
            return Verdict(_EMPTY)
        if any(self.mask_token_id in ids for ids in (prompt, *completions)):
            return Verdict(_MASKED)
        return Verdict(
            self._too_long(len(prompt), max(map(len, completions))),
            _EQUAL if len(completions) == 2 and completions[0] == completions[1] else None,
        )

    def _too_long(self, prompt: int, completion: int) -> Finding | None:
        for limit, name, cure in (
            (self.max_length, "`max_length`", "raise it"),
            (self.max_positions, "the positions of the model (`config.max_position_embeddings`)", "shorten them"),
        ):
            if limit is not None and prompt + completion > limit:
                what = f"the prompt alone fills {name}" if prompt >= limit else f"prompt and completion exceed {name}"
                return Finding(what, cure)
        return None

    @cached_property
    def endings(self) -> frozenset[int]:
        """Tokens that end a completion."""
        vocabulary = self.tokenizer.get_vocab()
        ids = {vocabulary[token] for token in self.end_of_turn if token in vocabulary}
        return frozenset(ids | {self.tokenizer.eos_token_id})

    @cached_property
    def added(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text of its own accord."""
        return added_tokens(self.tokenizer)


def scorable(dataset: Any, columns: Sequence[str], rules: TokenRules, *, name: str, num_proc: int | None = None) -> Any:
    """
    The rows that can be scored, with one beginning and one end of text; a warning counts the others by reason.

    Args:
        dataset: tokenised rows with `prompt_ids` and `columns`.
        columns: columns of completion ids.
        rules: what rows are to be like.
        name: of the dataset, for messages.
        num_proc: number of processes.

    Returns:
        The dataset without the others. A stream is filtered as it is read, with one warning per reason.

    Raises:
        ValueError: a token is outside the vocabulary, or no row is left.
    """
    # The version stands for the rules in the key under which `map` remembers what it made
    options: dict[str, Any] = {"fn_kwargs": {"columns": tuple(columns), "version": __version__}}
    if isinstance(dataset, IterableDataset):
        finished = dataset.map(rules.finish, **options).filter(partial(_keep_or_warn, name=name))
        return finished.remove_columns(list(Verdict._fields))
    dataset = dataset.map(rules.finish, num_proc=num_proc, desc=f"Checking tokens of {name} dataset", **options)
    total, numbers = len(dataset), dataset[NUMBER][:] if NUMBER in dataset.column_names else range(len(dataset))
    faults, remarks = (count(dataset[field][:], numbers) for field in Verdict._fields)
    warn_of_rows(remarks, total, name)
    keep = [index for index, fault in enumerate(dataset["fault"][:]) if not fault]
    dataset = dataset.remove_columns([*Verdict._fields, *({NUMBER} & set(dataset.column_names))])
    if not faults:
        return dataset
    if not keep:
        raise ValueError(f"No row of the {name} dataset can be used: {_because(faults)}.")
    logger.warning("Dropped %d of %d rows of the %s dataset: %s.", total - len(keep), total, name, _because(faults))
    return dataset.select(keep)


def _keep_or_warn(row: dict[str, Any], name: str) -> bool:
    fault = unpacked(row["fault"])
    if fault:
        logger.warning_once(f"Dropping rows of the streaming {name} dataset because {_reason(fault)}.")
    return fault is None


def _because(counts: list[Count]) -> str:
    return ", ".join(f"{len(found.rows)} because {_reason(found.finding)} (row {found.numbers()})" for found in counts)


def _reason(finding: Finding) -> str:
    return f"{finding.what}; {finding.cure}" if finding.cure else finding.what
