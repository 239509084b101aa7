"""Texts as tokens, cut where they are too long for a model, each with the bytes that it stands for."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..models.end_of_text import added_tokens, beginning


@dataclass(frozen=True)
class Window:
    """
    Args:
        number: among all windows.
        text: number of the text that it is of.
        ids: tokens.
        begin: the first that is scored.
        bytes: of what is scored, in UTF-8.
        occurrence: how often the same tokens came before: their masks are others, so that errors are independent.
    """

    number: int
    text: int
    ids: list[int]
    begin: int
    bytes: int
    occurrence: int = 0


def windows_of(
    rows: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    mask_token_id: int,
    longest: int | None,
    first_is_shown: bool = False,
) -> list[Window]:
    """
    Args:
        rows: each with a `text`, or a `prompt` and a `completion`.
        tokenizer: of the model. What it puts before a text of its own accord is shown, and nothing is put after it.
        mask_token_id: the mask token.
        longest: tokens of a window.
        first_is_shown: whether the model predicts nothing at the first position.

    Raises:
        ValueError: there are no rows, or one cannot be scored.
    """
    if not rows:
        raise ValueError("`texts` is empty: give at least one.")
    before, _ = added_tokens(tokenizer)
    windows: list[Window] = []
    seen: Counter[tuple[int, ...]] = Counter()
    for number, row in enumerate(rows):
        text = row["prompt"] + row["completion"] if "prompt" in row else row["text"]
        ids, shown = (beginning(part, tokenizer, before) for part in (text, row.get("prompt", "")))
        begin = next((i for i, pair in enumerate(zip(ids, shown, strict=False)) if pair[0] != pair[1]), len(shown))
        begin = max(begin, int(first_is_shown))
        if begin >= len(ids):
            raise ValueError(f"Text {number} has no token to score: {text[:60]!r}. Drop it.")
        if mask_token_id in ids:
            raise ValueError(f"Text {number} contains the mask token, which would be taken for noise: {text[:60]!r}.")
        if longest is not None and "prompt" in row and len(ids) > longest:
            raise ValueError(
                f"Row {number} has {len(ids)} tokens, prompt and completion, and {longest} fit (`max_length` or the "
                "positions of the model). Drop it, or raise `max_length` if that is what limits it."
            )
        if longest is not None and begin >= longest:
            raise ValueError(
                f"Text {number} has {begin} tokens before the first that is scored, and {longest} fit (`max_length` or "
                "the positions of the model). Raise `max_length` if that is what limits it, or drop the text."
            )
        scored = row.get("completion", text)
        for part, start, size in _parts(ids, begin, scored, tokenizer, longest):
            windows.append(Window(len(windows), number, part, start, size, seen[start, *part]))
            seen[start, *part] += 1
    return windows


def _parts(
    ids: list[int], begin: int, text: str, tokenizer: PreTrainedTokenizerBase, longest: int | None
) -> Iterator[tuple[list[int], int, int]]:
    """Tokens, the first that is scored and bytes of each part; the bytes of all parts are those of the text."""
    shown, rest, left = ids[:begin], ids[begin:], len(text.encode())
    size = len(rest) if longest is None else longest - len(shown)
    for start in range(0, len(rest), size):
        part = rest[start : start + size]
        is_last = start + size >= len(rest)
        number = left if is_last else min(left, len(tokenizer.decode(part).encode()))
        left -= number
        yield [*shown, *part], len(shown), number
