"""Word problems as a dataset of prompts, and what an answer is worth: a reward function as TRL's GRPO has them."""

from datasets import Dataset
from word_problems import Problem


def prompts_of(problems: list[Problem]) -> Dataset:
    """A prompt a row, and the worked answer for the reward function."""
    return Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer()} for problem in problems])


def every_step_right(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """1 for an answer with every step right, else 0."""
    return [float(text.split() == right.split()) for text, right in zip(completions, answer, strict=True)]
