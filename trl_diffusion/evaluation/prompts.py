"""Prompts, from what a user gives to tokens that a sampler can fill a canvas after, as training reads them too."""

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..checks.datasets import unformatted
from ..checks.findings import count, refuse_rows, warn_of_rows
from ..checks.inputs import refuse_unknown_token
from ..checks.rows import RowForm, parsed
from ..checks.template import Writing
from ..models.chat_template import give_chat_template
from ..models.denoiser import resolve_mask_token_id
from ..models.end_of_text import added_tokens, beginning
from ..models.families import family_of

_FORMS = (("prompt",),)
WRITTEN_WITH = ("tools", "chat_template_kwargs")  # columns that the chat template is given beside the messages


@dataclass(frozen=True)
class Prompts:
    """
    Args:
        rows: as they were given: a `prompt`, text or messages, whose parts are joined, and other columns, which reward
            functions may read.
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


def read_prompts(prompts: Any, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Prompts:
    """
    Read prompts as training does: messages with the family's chat template, if the tokenizer has none, and with the
    `tools` and `chat_template_kwargs` of their rows; texts with what the tokenizer puts before a text, and not after.

    Args:
        prompts: a dataset with a column `prompt`, or a list of texts or of conversations.
        tokenizer: of the model.
        config: of the model.

    Raises:
        TypeError: not a dataset, and not a list.
        ValueError: there are none, they are of two kinds, one cannot be read or written, or has no token.
    """
    rows = _rows(prompts)
    form = RowForm.of(rows[0], _FORMS)
    assert form is not None
    judges = [form.judge]
    if form.conversational:
        give_chat_template(tokenizer, family_of(config))
        if tokenizer.chat_template is None:
            raise ValueError(
                "Prompts are messages, and the tokenizer has no chat template: set `tokenizer.chat_template`."
            )
        judges.append(Writing.of(tokenizer, form, resolve_mask_token_id(config, tokenizer)))
    for judge in judges:
        verdicts = [judge(row).packed() for row in rows]
        refuse_rows(count(verdict["fault"] for verdict in verdicts), len(rows), "prompt")
        warn_of_rows(count(verdict["remark"] for verdict in verdicts), len(rows), "prompt")
    rows = [{**row, **form.read(row)} for row in rows]
    before, _ = added_tokens(tokenizer)
    ids = [
        _written(row, tokenizer) if form.conversational else beginning(row["prompt"], tokenizer, before) for row in rows
    ]
    empty = [number for number, each in enumerate(ids) if not each]
    if empty:
        raise ValueError(f"Prompts {empty[:5]} have no token. Drop them, or give them a beginning of text.")
    return Prompts(rows, ids, form.conversational)


def refuse_unfit(
    prompts: Prompts, mask_token_id: int, vocab_size: int, max_new_tokens: int, max_positions: int | None
) -> None:
    """Refuse prompts that cannot be answered, before any is."""
    refuse_unknown_token(max(max(ids, default=0) for ids in prompts.ids), vocab_size)
    masked = [number for number, ids in enumerate(prompts.ids) if mask_token_id in ids]
    if masked:
        raise ValueError(
            f"{len(masked)} of {len(prompts.ids)} prompts (rows {', '.join(map(str, masked[:5]))}) contain the mask "
            f"token ({mask_token_id}), which would be taken for a gap to fill. Drop them, or take it out."
        )
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


def _rows(prompts: Any) -> list[dict[str, Any]]:
    if isinstance(prompts, Dataset):
        prompts = unformatted(prompts, "prompt")
        if "prompt" not in prompts.column_names:
            raise ValueError(f"`prompts` has the columns {prompts.column_names}, and needs `prompt`.")
        rows = prompts.to_list()
    elif isinstance(prompts, list):
        rows = [{"prompt": prompt} for prompt in prompts]
    else:
        raise TypeError(f"`prompts` must be a `Dataset` or a list, got `{type(prompts).__name__}`.")
    if not rows:
        raise ValueError("`prompts` is empty: give at least one.")
    return rows


def _written(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Messages by the chat template, and an opened turn of the assistant."""
    options = {"tools": parsed(row.get("tools")), **row.get("chat_template_kwargs", {})}
    options |= {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return tokenizer.apply_chat_template(row["prompt"], **options)["input_ids"]
