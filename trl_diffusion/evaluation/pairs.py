"""
Training data from the model itself: several answers to each prompt, scored, and written as pairs or as marked rows.

What costs, the answers and their rewards, is kept as it is made; which of them become rows is decided at the end.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .._version import __version__
from ..checks.inputs import check_writable
from ..models.sampler_arguments import ORDERED_BY_CHANCE
from .answers import Answerer, check_at_least_one
from .ledger import processes_of
from .prompts import WRITTEN_WITH, Prompts, read_prompts
from .rewards import Rewards
from .sampling import completion_of, key_of, sampled_and_scored

logger = get_logger(__name__)

STRATEGIES = ("best_worst", "all", "threshold")
Rows = dict[int, dict[str, Any]]


class NoRowsError(ValueError):
    """No answer to any prompt is better than another."""


def sample_pairs(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Any,
    reward_funcs: Any,
    num_samples: int = 4,
    *,
    output_dir: str,
    strategy: str = "best_worst",
    threshold: float | None = None,
    margin: float = 0.0,
    reward_weights: Sequence[float] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    **generation: Any,
) -> Dataset:
    """
    Sample answers to prompts, score them with reward functions, and make rows of them to train on.

    Everything is kept in `output_dir`: answers and rewards below `samples/`, as they are made; the rows in
    `train.jsonl`, so that the folder is a dataset; and `provenance.json`, which says what made them. The same call goes
    on where an interrupted one stopped. In a distributed run each process answers a share of the prompts.

    Args:
        model: a masked diffusion model, with an adapter or without.
        tokenizer: its own.
        prompts: a dataset with a column `prompt`, texts or messages, or a list of these. Other columns are passed on to
            the reward functions.
        reward_funcs: one function in the signature of TRL's GRPO, or several: `trl.rewards` has some.
        num_samples: answers to each prompt.
        output_dir: folder of the result.
        strategy: `"best_worst"`: of each prompt the answer with the highest reward is chosen, the one with the lowest
            rejected. `"all"`: each two answers to a prompt. `"threshold"`: single rows with a `label`, True for a
            reward of at least `threshold`, for ELBO-KTO.
        threshold: of the rewards.
        margin: by how much the rewards of a pair must differ at least; they differ in any case.
        reward_weights: of the functions, whose rewards are added; by default 1.
        batch_size: prompts that are answered together.
        seed: of the sampler. What is answered to a prompt does not depend on the batch or on the number of processes.
        **generation: arguments of `generate`: `max_new_tokens`, `temperature` (1 here), `steps`, `block_length`, ...

    Returns:
        The rows: `prompt`, `chosen`, `rejected`, `score_chosen` and `score_rejected`; or `prompt`, `completion`,
        `label` and `score`; and where they come from: `prompt_number` and the numbers of the samples.

    Raises:
        ValueError: values that do not fit, prompts that do not fit before the canvas, rewards that are not numbers, a
            folder with answers of another run, or no row could be made.
        RuntimeError: a reward function raises.
    """
    _check(num_samples, strategy, threshold, margin, batch_size)
    rewards, asked = Rewards(reward_funcs, reward_weights), read_prompts(prompts, tokenizer, model.config)
    rewards.check_columns(asked.columns)
    check_writable(output_dir)
    answerer = Answerer(model, tokenizer, asked, num_samples, seed, {"temperature": 1.0, **generation})
    refuse_greedy(num_samples, answerer.sampler.temperature, answerer.sampler.remasking)
    key = key_of(model, answerer, seed)
    samples, scores = sampled_and_scored(answerer, rewards, key, Path(output_dir) / "samples", batch_size)
    choose = partial(chosen_answers, strategy=strategy, margin=margin)
    rows = list(_rows(asked, samples.rows, scores.rows, rewards, choose))
    if threshold is not None:
        rows = [_labelled(row, threshold) for row in rows]
    _refuse_none(rows, strategy, margin, len(asked.rows))
    dataset, state = Dataset.from_list(rows), processes_of(answerer.model)
    if state.is_main_process:
        how = {**key, "strategy": strategy, "threshold": threshold, "margin": margin, "rows": len(rows)}
        _write(Path(output_dir), dataset, answerer.model, how, rewards)
    state.wait_for_everyone()
    return dataset


def _check(num_samples: int, strategy: str, threshold: float | None, margin: float, batch_size: int) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"`strategy` must be one of {STRATEGIES}, got {strategy!r}.")
    if (threshold is None) == (strategy == "threshold"):
        raise ValueError(
            f"`threshold` is for `strategy='threshold'`, and needed there, got `threshold={threshold}` and "
            f"`strategy={strategy!r}`."
        )
    fewest = 1 if strategy == "threshold" else 2
    if num_samples < fewest:
        raise ValueError(f"`num_samples` must be at least {fewest} for `strategy={strategy!r}`, got {num_samples}.")
    check_at_least_one(batch_size=batch_size)
    if not margin >= 0:
        raise ValueError(f"`margin` must not be negative, got {margin}.")
    if margin and strategy == "threshold":
        raise ValueError(f"`margin={margin}` is for pairs, and `strategy='threshold'` makes single rows: leave it out.")
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"`threshold` must be a finite number, got {threshold}.")


def refuse_greedy(num_samples: int, temperature: float, remasking: str) -> None:
    """Refuse several answers to a prompt that would be one, before they are sampled."""
    if num_samples > 1 and temperature == 0 and remasking not in ORDERED_BY_CHANCE:
        raise ValueError(
            f"`num_samples={num_samples}` greedy answers to a prompt (`temperature=0`) are all the same. Set a "
            "`temperature` above 0."
        )


def _rows(
    prompts: Prompts, samples: Rows, scores: Rows, rewards: Rewards, choose: Callable[..., Iterator[tuple[int, ...]]]
) -> Iterator[dict[str, Any]]:
    """Rows to train on, with where they come from."""
    for number, given in enumerate(prompts.rows):
        texts = samples[number]["texts"]
        answers = [completion_of(text, prompts.conversational) for text in texts]
        totals = [rewards.total(each) for each in scores[number]["rewards"]]
        for i, *others in choose(texts, totals):
            row = {name: given[name] for name in ("prompt", *WRITTEN_WITH) if name in given}
            row |= {"chosen": answers[i], "score_chosen": totals[i], "sample_chosen": i}
            for j in others:
                row |= {"rejected": answers[j], "score_rejected": totals[j], "sample_rejected": j}
            yield {**row, "prompt_number": number}


def chosen_answers(
    texts: Sequence[str], totals: Sequence[float | None], strategy: str, margin: float
) -> Iterator[tuple[int, ...]]:
    """
    Which answers to a prompt make rows: `(chosen, rejected)`, or `(answer,)` with `strategy="threshold"`.

    Of equal answers the first counts, and an empty one is nothing that a model could score.
    """
    usable = {
        i: total for i, (text, total) in enumerate(zip(texts, totals, strict=True))
        if total is not None and text.strip() and text not in texts[:i]
    }  # fmt: skip
    if strategy == "threshold":
        yield from ((i,) for i in usable)
        return
    ordered = sorted(usable, key=lambda i: -usable[i])
    pairs = list(combinations(ordered, 2)) if strategy == "all" else [(ordered[0], ordered[-1])] if ordered else []
    for high, low in pairs:
        difference = usable[high] - usable[low]
        if difference > 0 and difference >= margin:
            yield high, low


def _labelled(row: dict[str, Any], threshold: float) -> dict[str, Any]:
    """A row of one answer, in the form of ELBO-KTO."""
    row["completion"], row["score"], row["sample"] = (row.pop(f"{name}chosen") for name in ("", "score_", "sample_"))
    return {**row, "label": row["score"] >= threshold}


def _refuse_none(rows: list[dict[str, Any]], strategy: str, margin: float, prompts: int) -> None:
    if not rows:
        raise NoRowsError(
            f"None of {prompts} prompts gave a row with `strategy={strategy!r}` and `margin={margin}`: its answers "
            "have equal rewards, or none. Answers are kept; take a larger `num_samples` or `temperature` in another "
            "`output_dir`, or other reward functions in this one."
        )


def _write(folder: Path, dataset: Dataset, model: Any, how: dict[str, Any], rewards: Rewards) -> None:
    made = {
        "model_name_or_path": getattr(model.config, "_name_or_path", ""),
        **how,
        "reward_functions": dict(zip(rewards.names, rewards.weights, strict=True)),
        "versions": {"trl_diffusion": __version__} | {name: version(name) for name in ("trl", "transformers", "torch")},
    }
    (folder / "provenance.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    unfinished = folder / "train.jsonl.unfinished"
    with open(unfinished, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in dataset)
    unfinished.replace(folder / "train.jsonl")
    logger.info("%d rows in %s.", len(dataset), folder / "train.jsonl")
