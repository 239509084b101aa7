"""TRL's SFT trainer in the shape of those that compare: a reference that is none, rows of a prompt and a completion."""

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from datasets import Dataset

from ...scoring.door import SFTTrainer

# What of a row TRL's tokenisation reads; anything else, tokens of another's making above all, would change what it does
_READ = ("prompt", "completion", "tools", "chat_template_kwargs")
Row = dict[str, Any]


class PartsTrainer(SFTTrainer):
    """
    To be put behind the mixin of this package's trainers.

    Attributes:
        ref_model: none.
        precompute_ref_logps: nothing is precomputed.
    """

    ref_model = None
    precompute_ref_logps = False

    def __init__(self, model: Any, ref_model: None, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *others: Any) -> Any:
        """Rows as TRL tokenises them, in two parts: `prompt_ids` is shown, `completion_ids` is learnt."""
        names = next(iter(dataset))
        read = _READ if {"prompt", "completion"} <= set(names) else (args.dataset_text_field,)
        dataset = dataset.select_columns([name for name in names if name in read])
        self.completion_only_loss = True  # TRL goes by the columns that the dataset had when it was given
        dataset = super()._prepare_dataset(dataset, processing_class, args, *others)
        return mapped(dataset, apart, f"Parting {others[-1]} dataset", args.dataset_num_proc)


def mapped(dataset: Any, function: Callable[..., Row], what: str, num_proc: int | None, **options: Any) -> Any:
    """Map the rows of a dataset, or those of a stream as they are read."""
    if isinstance(dataset, Dataset):
        return dataset.map(function, fn_kwargs=options, desc=what, num_proc=num_proc)
    return dataset.map(function, fn_kwargs=options)


def apart(row: Row) -> Row:
    """The parts of a row that TRL labelled; of a text, which is learnt from its beginning, the first token is shown."""
    ids, labels = row["input_ids"], row["labels"]
    begin = next((i for i, label in enumerate(labels) if label != -100), len(ids)) if "prompt" in row else 1
    return {"prompt_ids": ids[:begin], "completion_ids": ids[begin:]}


def together(row: Row, eos: int, padding: int, longest: int | None, seed: int) -> Row:
    """
    A row as the model will meet it: `input_ids` and `labels`, the completion followed by ends of text.

    Args:
        row: with `prompt_ids` and `completion_ids`, and `prompt` unless it is a plain text.
        eos: end of text.
        padding: the most of them that follow.
        longest: tokens that a row may have.
        seed: of their number, which depends on nothing else but the row's tokens.
    """
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    room = padding if longest is None else min(padding, longest - len(prompt) - len(completion))
    if "prompt" in row and room > 0:
        key = blake2b(repr((seed, prompt, completion)).encode(), digest_size=8).digest()
        completion = [*completion, *[eos] * (int.from_bytes(key, "little") % (room + 1))]
    labels = [-100] * len(prompt) + completion
    return {"completion_ids": completion, "input_ids": prompt + completion, "labels": labels}
