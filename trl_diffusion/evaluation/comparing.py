"""What settings of the sampler save, and what they change, on one's own prompts: counted, not timed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .answers import Answerer, check_at_least_one
from .prompts import Prompts, read_prompts


@dataclass(frozen=True)
class SamplingComparison:
    """
    Args:
        forwards: by setting, forwards of a row, mean over prompts.
        tokens_run: by setting, tokens that these had together, mean over prompts; without padding.
        answers: by setting, the answer to each prompt.
        same_answers: by setting, share of prompts whose answer is token by token that of the first setting.
        same_tokens: by setting, share of the places of answers at which the token is that of the first setting.
    """

    forwards: dict[str, float]
    tokens_run: dict[str, float]
    answers: dict[str, list[str]]
    same_answers: dict[str, float]
    same_tokens: dict[str, float]

    def __str__(self) -> str:
        lines = ["| setting | forwards | tokens run | equal answers | equal tokens |", "|---|---|---|---|---|"]
        for name in self.forwards:
            shares = f"{100 * self.same_answers[name]:.1f}% | {100 * self.same_tokens[name]:.1f}%"
            lines.append(f"| {name} | {self.forwards[name]:.1f} | {self.tokens_run[name]:.0f} | {shares} |")
        return "\n".join(lines)


def compare_sampling(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Any,
    settings: dict[str, dict[str, Any]],
    *,
    batch_size: int = 8,
    seed: int = 0,
    **generation: Any,
) -> SamplingComparison:
    """
    Answer the same prompts with several settings of the sampler, and count what each runs and how many answers differ.

    Args:
        model: a masked diffusion model, with an adapter or without.
        tokenizer: its own.
        prompts: a dataset with a column `prompt`, or a list of texts or of conversations.
        settings: by name, arguments of `generate`. The others are compared with the first.
        batch_size: prompts of one length that are answered together.
        seed: of the sampler's noise.
        **generation: arguments of `generate` that all settings have.

    Raises:
        ValueError: no settings, arguments that the sampler does not have, or prompts that do not fit.
    """
    if not settings:
        raise ValueError("`settings` is empty: give arguments of `generate` by name, those to compare with first.")
    check_at_least_one(batch_size=batch_size)
    read = read_prompts(prompts, tokenizer, model.config)
    batches = list(_of_one_length(read, batch_size))
    forwards, tokens_run, answers = {}, {}, {}
    for name, arguments in settings.items():
        answerer = Answerer(model, tokenizer, read, 1, seed, {**generation, **arguments})
        with _counting(answerer.model) as counted:
            found = {number: ids for batch in batches for number, (ids,) in zip(batch, answerer(batch), strict=True)}
        answers[name] = [found[number] for number in range(len(read.rows))]
        forwards[name] = sum(rows for rows, _ in counted) / len(found)
        tokens_run[name] = sum(rows * length for rows, length in counted) / len(found)
    first = next(iter(answers.values()))
    texts = {name: [answerer.text(number, ids) for number, ids in enumerate(each)] for name, each in answers.items()}
    same_answers = {
        name: sum(a == b for a, b in zip(each, first, strict=True)) / len(first) for name, each in answers.items()
    }
    same_tokens = {name: _same_tokens(each, first) for name, each in answers.items()}
    return SamplingComparison(forwards, tokens_run, texts, same_answers, same_tokens)


def _of_one_length(prompts: Prompts, size: int) -> Iterator[list[int]]:
    """Batches of prompts of one length that are not equal, whose noise is told apart by the seed."""
    alike: dict[tuple[int, int], list[int]] = {}
    for number, occurrence in enumerate(prompts.occurrences):
        alike.setdefault((len(prompts.ids[number]), occurrence), []).append(number)
    for numbers in alike.values():
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


@contextmanager
def _counting(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Shapes of what is run inside the block."""
    shapes: list[tuple[int, int]] = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        yield shapes
    finally:
        handle.remove()


def _same_tokens(some: list[list[int]], others: list[list[int]]) -> float:
    """Places at which both have the same token, of those at which either has one."""
    longest = sum(max(len(a), len(b)) for a, b in zip(some, others, strict=True))
    same = sum(x == y for a, b in zip(some, others, strict=True) for x, y in zip(a, b, strict=False))
    return same / longest if longest else 1.0
