"""
A dataset as a whole, and each of its rows, before TRL sees it: what it is, its format, its columns, what they hold.

Faults of rows are in `rows.py`.
"""

from typing import Any

from datasets import Dataset, IterableDataset

from .findings import judge_row, judge_rows
from .rows import RowForm, RowForms


def check_datasets(args: Any, train_dataset: Any, eval_dataset: Any, forms: RowForms, refused: tuple[str, ...]) -> None:
    """Check what a constructor was given, see [`check_dataset`]; there may be several sets to evaluate on, or none."""
    if train_dataset is None:
        raise ValueError(
            "`train_dataset` is required: rows for training, also where the trainer is only to evaluate. Pass a "
            "`datasets.Dataset` with " + _needed(forms) + "."
        )
    for name, dataset in [("train", train_dataset), *_named(eval_dataset)]:
        check_dataset(dataset, name, forms, refused, args.dataset_num_proc)


def check_eval_dataset(dataset: Any, forms: RowForms, refused: tuple[str, ...], num_proc: int | None = None) -> None:
    """Check what `evaluate` was given, see [`check_dataset`]: one set, several by name, or none; a text is a name."""
    for name, one in [] if isinstance(dataset, str) else _named(dataset):
        check_dataset(one, name, forms, refused, num_proc)


def check_dataset(
    dataset: Any, name: str, forms: RowForms, refused: tuple[str, ...], num_proc: int | None = None
) -> None:
    """
    Refuse a dataset whose rows do not have the form that the trainer needs. Of a stream, the first row is looked at.

    Args:
        dataset: what the trainer was given.
        name: of the dataset, for messages.
        forms: the columns of which each row must have all, in one of these ways.
        refused: columns that it must not have.
        num_proc: number of processes that look at rows.

    Raises:
        TypeError: it is not a dataset.
        ValueError: it has no rows, lacks a column, or has rows that cannot be read.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        cure = "Pass `Dataset.from_list(rows)`" if isinstance(dataset, list) else "Pass a `datasets.Dataset`"
        if isinstance(dataset, dict):
            cure = f"Pass one of its splits, {list(dataset)}" if hasattr(dataset, "map") else cure
        raise TypeError(
            f"The {name} dataset must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`. {cure}."
        )
    dataset = unformatted(dataset, name)
    form = form_of(dataset, name, forms, refused)
    if isinstance(dataset, Dataset):
        judge_rows(dataset, form.judge, name, num_proc)
    else:
        judge_row(next(iter(dataset)), form.judge, 0, name)


def unformatted(dataset: Any, name: str) -> Any:
    """
    A dataset whose rows are texts and lists, whatever format they were to be handed out in; its columns stay.

    Raises:
        ValueError: rows are transformed when they are read, as their tokens would be.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None)
    if dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset transforms rows when they are read (`set_transform` or `with_transform`), and would "
            "do so to their tokens too. Transform it beforehand: `dataset.reset_format()`, then `dataset.map(...)`."
        )
    return dataset.with_format(None, columns=dataset.format["columns"]).select_columns(dataset.format["columns"])


def form_of(dataset: Any, name: str, forms: RowForms, refused: tuple[str, ...] = ()) -> RowForm:
    """
    How the rows of a dataset are read, from the first.

    Raises:
        ValueError: there is none, or its columns are not those of any form, or some of them are refused.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{name}_dataset` has no rows. Give a dataset with at least one.")
    found = [column for column in refused if column in first]
    if found:
        raise ValueError(
            f"The {name} dataset has columns {found}. Reference scores are valid only for the draws they were "
            "computed on: remove the columns, or give the rows as they were before a trainer prepared them. "
            "`precompute_ref_log_probs=True` has them computed here."
        )
    form = RowForm.of(first, forms)
    if form is None:
        raise ValueError(
            f"The {name} dataset has columns {sorted(first)}. It needs {_needed(forms)}: rename what holds them with "
            "`dataset.rename_column`. Pairs are for VRPO; single completions, with a `label` that is True for a "
            "desirable one, for ELBO-KTO; completions to imitate, conversations and plain texts for SFT."
        )
    return form


def _needed(forms: RowForms) -> str:
    return ", or ".join(" and ".join(f"`{column}`" for column in form) for form in forms)


def _named(datasets: Any) -> list[tuple[str, Any]]:
    named = datasets if isinstance(datasets, dict) else {"eval": datasets}
    return [(name, dataset) for name, dataset in named.items() if dataset is not None]
