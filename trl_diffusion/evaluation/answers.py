"""Answers to prompts by the diffusion sampler: in batches, cut where they end, as texts."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..models.families import family_of
from ..models.positions import position_limit
from ..models.sampler import generate
from ..models.sampler_arguments import read_arguments
from ..scoring.adapters import base_of
from .prompts import Prompts, refuse_unfit

# Arguments of `generate` that are said otherwise here, or have no meaning
_SAID_HERE = {
    "num_return_sequences": "`num_samples`, where there are several answers to a prompt",
    "seed": "the `seed` beside the arguments of the sampler",
    "return_dict_in_generate": "nothing: answers are lists of tokens",
}


class Answerer:
    """
    Answers the prompts of a list by their number. What is answered depends on the prompt, the seed and how often the
    prompt came before, and on nothing else: not on the batch, the process, or what was interrupted.

    Args:
        model: a masked diffusion model, with an adapter or without.
        tokenizer: its own.
        prompts: all of them.
        num_samples: answers to each.
        seed: of the sampler's noise.
        arguments: of `generate`.

    Raises:
        ValueError: arguments that the sampler does not have, prompts that do not fit before its canvas, or that hold
            the mask token, or tokens of another tokenizer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        num_samples: int,
        seed: int,
        arguments: dict[str, Any],
    ):
        self.model = base_of(model)
        self.tokenizer, self.prompts, self.num_samples = tokenizer, prompts, num_samples
        self._seed, self.arguments = seed, arguments
        configs = (getattr(self.model, "generation_config", None),)
        _refuse_what_is_said_here(arguments)
        self.sampler, tokens = read_arguments(self.model.config, configs, dict(arguments), 0)
        self.max_new_tokens = self.sampler.max_new_tokens
        refuse_unfit(prompts, tokens.mask, tokens.size, self.max_new_tokens, position_limit(self.model))
        vocabulary = tokenizer.get_vocab()
        turns = [vocabulary[token] for token in family_of(self.model.config).end_of_turn if token in vocabulary]
        ends = (*tokens.ends, tokenizer.eos_token_id, *turns)  # the end of text first, which `logits_eos_inf` goes by
        self._ends = list(dict.fromkeys(end for end in ends if end is not None))
        self._occurrences = prompts.occurrences

    def batches(self, numbers: list[int], size: int) -> Iterator[list[int]]:
        """Prompts to answer together: never two that are equal, whose noise is told apart by the seed."""
        check_at_least_one(batch_size=size)
        by_occurrence: dict[int, list[int]] = {}
        for number in numbers:
            by_occurrence.setdefault(self._occurrences[number], []).append(number)
        for alike in by_occurrence.values():
            yield from (alike[start : start + size] for start in range(0, len(alike), size))

    def __call__(self, numbers: list[int]) -> list[list[list[int]]]:
        """Tokens of `num_samples` answers to each of these prompts, without what ends them."""
        ids = [self.prompts.ids[number] for number in numbers]
        longest = max(map(len, ids))
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        padded = torch.tensor([[pad] * (longest - len(each)) + each for each in ids])
        real = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in ids])
        device = next(self.model.parameters()).device
        sequences = generate(
            self.model,
            padded.to(device),
            attention_mask=real.to(device),
            num_return_sequences=self.num_samples,
            seed=self._seed + self._occurrences[numbers[0]],
            **{**self.arguments, "eos_token_id": self._ends, "max_new_tokens": self.max_new_tokens},
        )
        answers = [self._cut(row) for row in sequences[:, longest:].tolist()]
        return [answers[i * self.num_samples : (i + 1) * self.num_samples] for i in range(len(numbers))]

    def text(self, number: int, answer: list[int]) -> str:
        """
        An answer as a text. After a prompt of text it begins with the space that parts it from the prompt, where the
        tokenizer puts one, so that the two can be joined.
        """
        if self.prompts.conversational:
            return self.tokenizer.decode(answer, skip_special_tokens=True)
        before = self.tokenizer.decode(self.prompts.ids[number], skip_special_tokens=True)
        whole = self.tokenizer.decode(self.prompts.ids[number] + answer, skip_special_tokens=True)
        begins = whole.startswith(before) and not self.prompts.rows[number]["prompt"].endswith(tuple(" \n\t"))
        return whole[len(before) :] if begins else self.tokenizer.decode(answer, skip_special_tokens=True)

    def _cut(self, answer: list[int]) -> list[int]:
        return answer[: next((i for i, token in enumerate(answer) if token in self._ends), len(answer))]


def check_at_least_one(**values: int | None) -> None:
    """Refuse an argument, by its name, that is not None and below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _refuse_what_is_said_here(arguments: dict[str, Any]) -> None:
    for name, cure in _SAID_HERE.items():
        if name in arguments:
            raise ValueError(f"`{name}={arguments[name]!r}` is not taken here: leave it out, and use {cure}.")
    if arguments.get("max_length") is not None and arguments.get("max_new_tokens") is None:
        raise ValueError(
            f"`max_length={arguments['max_length']}` counts the prompt, so that answers would depend on the others of "
            "their batch. Give `max_new_tokens`."
        )
