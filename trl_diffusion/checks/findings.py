"""
What is the matter with rows: found in one pass, counted by reason, and said with the numbers of the first of them.

A judge looks at one row and returns a [`Verdict`]. Rows of a dataset are counted; rows of a stream are judged as they
are read, so that each says for itself what is wrong with it.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from accelerate.logging import get_logger
from datasets import Dataset

logger = get_logger(__name__)

_REASONS = 3  # shown in one message
_ROWS = 5  # shown of each reason


class Finding(NamedTuple):
    """
    One thing that is the matter with a row.

    Args:
        what: a clause that completes "in row 3 ...".
        cure: a sentence.
        example: what the row has there. It is no part of the reason that rows are counted by.
    """

    what: str
    cure: str
    example: str = ""

    def __str__(self) -> str:
        return f"{self.what}{f': {self.example}' if self.example else ''}. {self.cure}"


class Verdict(NamedTuple):
    """What makes a row unusable, and what is worth a warning."""

    fault: Finding | None = None
    remark: Finding | None = None

    def packed(self) -> dict[str, str]:
        """As columns of a dataset: texts, empty if there is nothing."""
        return {name: json.dumps(finding) if finding else "" for name, finding in self._asdict().items()}


class Count(NamedTuple):
    """A reason, by the finding of the first row that has it, and the numbers of all rows that have it."""

    finding: Finding
    rows: list[int]

    def numbers(self) -> str:
        """The first few row numbers."""
        more = ", ..." if len(self.rows) > _ROWS else ""
        return ", ".join(map(str, self.rows[:_ROWS])) + more


Judge = Callable[[dict[str, Any]], Verdict]


def judge_rows(dataset: Dataset, judge: Judge, name: str, num_proc: int | None = None) -> None:
    """
    Judge every row of a dataset in one pass, and warn of remarks.

    Raises:
        ValueError: there are faults; all of them are counted.
    """
    judged = dataset.map(
        _judge,
        fn_kwargs={"judge": judge},
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        keep_in_memory=True,  # nothing to find again in a later run, whose rules may be others
        desc=f"Checking {name} dataset",
    )
    refuse_rows(count(judged["fault"][:]), len(dataset), name)
    warn_of_rows(count(judged["remark"][:]), len(dataset), name)


def judge_row(row: dict[str, Any], judge: Judge, number: int, name: str) -> None:
    """
    Judge one row of a stream, and warn of a remark once.

    Raises:
        ValueError: there is a fault.
    """
    fault, remark = judge(row)
    if fault:
        raise ValueError(f"In row {number} of the {name} dataset {fault}")
    if remark:
        what = Finding(remark.what, remark.cure)  # without the example, one warning for all rows that have it
        logger.warning_once(f"In rows of the streaming {name} dataset {what}")


def count(packed: Iterable[str], numbers: Iterable[int] | None = None) -> list[Count]:
    """Findings by reason, the most frequent first; `numbers` of the rows if they are not 0, 1, 2, ..."""
    rows: dict[tuple[str, ...], list[int]] = defaultdict(list)
    first: dict[tuple[str, ...], Finding] = {}
    pairs = enumerate(packed) if numbers is None else zip(numbers, packed, strict=True)
    for number, text in pairs:
        finding = unpacked(text)
        if finding:
            rows[finding[:2]].append(number)
            first.setdefault(finding[:2], finding)
    return sorted((Count(first[reason], rows[reason]) for reason in rows), key=lambda found: -len(found.rows))


def refuse_rows(counts: list[Count], total: int, name: str) -> None:
    """Refuse a dataset some of whose rows have faults."""
    if counts:
        raise ValueError(_of_rows(counts, total, name))


def warn_of_rows(counts: list[Count], total: int, name: str) -> None:
    """Warn of what is worth it and no reason to drop a row."""
    if counts:
        logger.warning(_of_rows(counts, total, name))


def unpacked(text: str) -> Finding | None:
    """One field of a [`Verdict`] from the column that it was packed into."""
    return Finding(*json.loads(text)) if text else None


def _judge(row: dict[str, Any], judge: Judge) -> dict[str, str]:
    return judge(row).packed()


def _of_rows(counts: list[Count], total: int, name: str) -> str:
    said = [
        f"In {len(found.rows)} of {total} rows of the {name} dataset ({found.numbers()}) {found.finding}"
        for found in counts[:_REASONS]
    ]
    more = len(counts) - _REASONS
    return " ".join([*said, *([f"There are {more} more reasons."] if more > 0 else [])])
