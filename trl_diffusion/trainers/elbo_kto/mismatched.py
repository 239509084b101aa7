"""
Mismatched pairs for KTO's own baseline: each prompt with the completion of the row before it.

KTO (arXiv 2402.01306) estimates its reference point from completions that belong to other prompts: those of the same
batch, in another order. They are paired when the rows that cannot be scored have gone, so that no row is lost for its
neighbour's fault, and no row meets its own completion. What is longer than `max_length` then is cut by TRL's collator:
of a mismatched pair nothing is learnt.
"""

from typing import Any

from datasets import Dataset, concatenate_datasets

COLUMN = "KL_completion_ids"  # TRL's name, which its collator knows
EVALUATED_TOGETHER = 1000  # rows whose completions are exchanged in evaluation, whatever the batches are


def with_mismatched_pairs(dataset: Any, name: str, together: int) -> Any:
    """
    Add a column of mismatched completions.

    Args:
        dataset: prepared rows.
        name: of the dataset, for messages.
        together: rows among which completions are exchanged: those of a training batch, or [`EVALUATED_TOGETHER`].

    Raises:
        ValueError: there is a single row, whose prompt has no other completion.
    """
    if not isinstance(dataset, Dataset):
        return dataset.map(_pair, batched=True, batch_size=together)
    if len(dataset) < 2:
        raise ValueError(
            f"`baseline='kl'` pairs each prompt with another row's completion, and the {name} dataset has one row. "
            "Give more, or set `baseline='ema'`."
        )
    partners = dataset.select(row_before(len(dataset), together)).select_columns("completion_ids")
    kept = dataset.remove_columns([column for column in dataset.column_names if column == COLUMN])  # TRL's own pairs
    return concatenate_datasets([kept, partners.rename_column("completion_ids", COLUMN)], axis=1)


def row_before(rows: int, together: int) -> list[int]:
    """For each row the one before it in its batch, for the first the last; for a last row on its own the one before."""
    before = []
    for start in range(0, rows, together):
        last = min(start + together, rows) - 1
        before += [last, *range(start, last)]
    return before if rows % together != 1 else [*before[:-1], rows - 2]


def _pair(rows: dict[str, list]) -> dict[str, list]:
    """The same in a stream, where a last row on its own has none before it, and is left out."""
    completions = rows["completion_ids"]
    if len(completions) == 1:
        return {column: [] for column in (*rows, COLUMN)}
    return {COLUMN: [completions[-1], *completions[:-1]]}
