"""Answers to prompts and their rewards, kept as they are made, since they are what costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..checks.inputs import check_writable
from ..models.denoiser import resolve_mask_token_id
from ..scoring.door import hash_module
from ..scoring.key import scoring_key
from .answers import Answerer
from .ledger import Ledger, processes_of
from .prompts import Prompts, read_prompts
from .rewards import Rewards


def mean_reward(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Any,
    reward_funcs: Any,
    *,
    output_dir: str,
    reward_weights: Sequence[float] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    **generation: Any,
) -> float:
    """
    The mean over prompts of the reward of an answer, greedy unless `generation` says otherwise; arguments, errors and
    what is kept are those of [`sample_pairs`].

    Raises:
        ValueError: no reward function applies to any of the answers.
    """
    rewards, asked = Rewards(reward_funcs, reward_weights), read_prompts(prompts, tokenizer, model.config)
    rewards.check_columns(asked.columns)
    check_writable(output_dir)
    answerer = Answerer(model, tokenizer, asked, 1, seed, generation)
    _, scores = sampled_and_scored(answerer, rewards, key_of(model, answerer, seed), Path(output_dir), batch_size)
    totals = [rewards.total(scores.rows[number]["rewards"][0]) for number in range(len(asked.rows))]
    known = [total for total in totals if total is not None]
    if not known:
        raise ValueError(f"None of the reward functions {rewards.names} applies to any of {len(totals)} answers.")
    return sum(known) / len(known)


def key_of(model: Any, answerer: Answerer, seed: int) -> dict[str, Any]:
    """What answers depend on."""
    function = scoring_key(model, resolve_mask_token_id(answerer.model.config, answerer.tokenizer), "no")
    of_model = {"model": hash_module(model), "function": function, "prompts": answerer.prompts.key()}
    return {**of_model, "num_samples": answerer.num_samples, "seed": seed, **answerer.arguments}


def sampled_and_scored(
    answerer: Answerer, rewards: Rewards, key: dict[str, Any], folder: Path, batch_size: int
) -> tuple[Ledger, Ledger]:
    """Answers to all prompts and their rewards, by the number of the prompt; what is kept is not made again."""
    state, total = processes_of(answerer.model), len(answerer.prompts.rows)
    samples = Ledger(folder, "answers", key, state.process_index)
    functions = rewards.key(answerer.prompts.rows)  # those of others are kept beside
    scores = Ledger(folder, f"rewards-{functions}", {**key, "functions": functions}, state.process_index)
    state.wait_for_everyone()  # or one would take up what another has just begun
    mine = range(state.process_index, total, state.num_processes)
    to_do = [number for number in mine if number not in scores.rows]
    bar = tqdm(total=len(mine), initial=len(mine) - len(to_do), desc="sampling", disable=not state.is_main_process)
    # What was answered and not scored first, so that a function that fails does so at once
    for known in (True, False):
        some = [number for number in to_do if (number in samples.rows) == known]
        for numbers in answerer.batches(some, batch_size):
            if not known:
                for number, ids in zip(numbers, answerer(numbers), strict=True):
                    texts = [answerer.text(number, answer) for answer in ids]
                    samples.add(number, texts=texts, ids=ids)
            _score(answerer.prompts, [samples.rows[number] for number in numbers], rewards, scores)
            bar.update(len(numbers))
    bar.close()
    state.wait_for_everyone()
    samples.read()
    scores.read()
    return samples, scores


def _score(prompts: Prompts, answered: list[dict[str, Any]], rewards: Rewards, scores: Ledger) -> None:
    each = [(row["number"], text, ids) for row in answered for text, ids in zip(row["texts"], row["ids"], strict=True)]
    given = [prompts.rows[number] for number, _, _ in each]
    found = rewards(
        [row["prompt"] for row in given],
        [completion_of(text, prompts.conversational) for _, text, _ in each],
        [ids for _, _, ids in each],
        {name: [row[name] for row in given] for name in prompts.columns},
    )
    of_answers = iter(zip(*found, strict=True))
    for row in answered:
        scores.add(row["number"], rewards=[next(of_answers) for _ in row["texts"]])


def completion_of(text: str, conversational: bool) -> Any:
    """An answer in the form of its prompt."""
    return [{"role": "assistant", "content": text}] if conversational else text
