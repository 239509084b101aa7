"""
Pairs from the model itself: which answers make rows, that interruptions and processes change nothing, and bad input.
"""

import itertools
import json
import random
from functools import partial

import pytest
import torch
from conftest import SPECIAL, make_model, make_tokenizer
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from processes import run_forked
from test_kto import make_trainer as make_kto_trainer
from test_trainers import make_trainer
from trl.rewards import accuracy_reward, get_soft_overlong_punishment, think_format_reward

from trl_diffusion import sample_pairs
from trl_diffusion.evaluation import answers
from trl_diffusion.evaluation.pairs import chosen_answers

PROMPTS = ["what is one", "say hi", "what is two plus three", "say bye you", "is red green"]
CANVAS = {"max_new_tokens": 6, "steps": 3}


def letters(completions, **kwargs):
    """A reward that tells answers apart."""
    return [float(len(text)) for text in completions]


def sample(folder, prompts=None, functions=letters, *, model=None, **options):
    options = {"num_samples": 3, "batch_size": 2, **CANVAS, **options}
    prompts = PROMPTS if prompts is None else prompts
    return sample_pairs(model or make_model(), make_tokenizer(), prompts, functions, output_dir=str(folder), **options)


def kept(folder, what="texts"):
    """Answers by the number of their prompt, from the files."""
    lines = [line for path in (folder / "samples").glob("answers-*") for line in path.read_text().splitlines()[1:]]
    return {row["number"]: row[what] for row in map(json.loads, lines)}


def until_the_end(answer):
    """Words up to the end of the turn or of the text: what follows is another's."""
    tokenizer = make_tokenizer()
    words = itertools.takewhile(lambda word: word not in ("<|eot_id|>", "<|endoftext|>"), map(tokenizer.decode, answer))
    return [word for word in words if word not in {*SPECIAL, *tokenizer.all_special_tokens}]


# Which answers


@pytest.mark.parametrize("margin", [0.0, 1.0, 2.0])
def test_which_answers_make_pairs(margin):
    """Against all pairs of answers, looked through one by one."""
    draw = random.Random(0)
    for _ in range(200):
        texts = draw.choices(["a", "b", "c", " "], k=4)
        totals = draw.choices([None, 0.0, 1.0, 2.5], k=4)
        usable = [i for i in range(4) if totals[i] is not None and texts[i] != " " and texts[i] not in texts[:i]]
        allowed = {
            (i, j)
            for i, j in itertools.permutations(usable, 2)
            if totals[i] > totals[j] and totals[i] - totals[j] >= margin
        }
        assert set(chosen_answers(texts, totals, "all", margin)) == allowed
        best = list(chosen_answers(texts, totals, "best_worst", margin))
        widest = max((totals[i] - totals[j] for i, j in allowed), default=None)
        assert len(best) == bool(allowed)
        assert all(pair in allowed and totals[pair[0]] - totals[pair[1]] == widest for pair in best)
        assert list(chosen_answers(texts, totals, "threshold", margin)) == [(i,) for i in usable]


def test_rows_are_the_samplers_answers_with_their_rewards(tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    rows = sample(tmp_path, model=model, strategy="all")
    by_number = kept(tmp_path)
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer([prompt], return_tensors="pt").input_ids
        sequences = model.generate(ids, num_return_sequences=3, temperature=1.0, seed=0, **CANVAS)[:, ids.shape[1] :]
        expected = [until_the_end(answer) for answer in sequences]
        assert [text.split() for text in by_number[number]] == expected
    assert len(rows) > 5
    for row in rows:
        texts = by_number[row["prompt_number"]]
        assert (row["chosen"], row["rejected"]) == (texts[row["sample_chosen"]], texts[row["sample_rejected"]])
        assert row["prompt"] == PROMPTS[row["prompt_number"]] and row["chosen"].startswith(" ")
        assert (row["score_chosen"], row["score_rejected"]) == (len(row["chosen"]), len(row["rejected"]))
        assert row["score_chosen"] > row["score_rejected"]


def test_the_folder_is_a_dataset_that_trains(tmp_path):
    pairs = sample(tmp_path / "pairs")
    loaded = load_dataset(str(tmp_path / "pairs"), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"] and loaded["train"].to_list() == pairs.to_list()
    make_trainer(tmp_path / "vrpo", dataset=loaded["train"], max_steps=1).train()
    marked = sample(tmp_path / "marked", strategy="threshold", threshold=12.0)
    assert {row["label"] for row in marked} == {True, False}
    assert all(row["label"] == (row["score"] >= 12.0) == (len(row["completion"]) >= 12) for row in marked)
    make_kto_trainer(tmp_path / "kto", dataset=marked, max_steps=1).train()
    made = json.loads((tmp_path / "marked" / "provenance.json").read_text())
    assert made["reward_functions"] == {"letters": 1.0} and made["temperature"] == 1.0 and made["rows"] == len(marked)


def test_rewards_of_trl_and_columns_of_the_dataset(tmp_path):
    """Conversations, two functions that are added, one that reads a column, and one that does not apply to all."""
    prompts = Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": p}] for p in PROMPTS], "wanted": [8, 9, 10, 11, 12]}
    )

    def near(completions, wanted, **kwargs):
        texts = [completion[0]["content"] for completion in completions]
        return [None if w == 8 else -abs(len(text) - w) for text, w in zip(texts, wanted, strict=True)]

    short = get_soft_overlong_punishment(max_completion_len=6, soft_punish_cache=4)
    rows = sample(tmp_path, prompts, [near, short, think_format_reward], reward_weights=[1.0, 0.5, 1.0], strategy="all")
    assert {row["prompt_number"] for row in rows} > {1, 2}
    tokens = kept(tmp_path, "ids")
    for row in rows:
        for name in ("chosen", "rejected"):
            ((role, text),) = [(turn["role"], turn["content"]) for turn in row[name]]
            number = row["prompt_number"]
            length = len(tokens[number][row[f"sample_{name}"]])
            expected = 0.5 * min(0, (2 - length) / 4) - (abs(len(text) - 8 - number) if number else 0)
            assert role == "assistant" and row[f"score_{name}"] == pytest.approx(expected)


def test_an_adapter_is_part_of_the_model(tmp_path):
    torch.manual_seed(0)
    adapted = get_peft_model(make_model(), LoraConfig(r=4, init_lora_weights=False))
    sample(tmp_path / "adapter", model=adapted)
    sample(tmp_path / "base")
    assert kept(tmp_path / "adapter") != kept(tmp_path / "base")


def test_equal_prompts_are_answered_anew(tmp_path):
    prompts = ["say hi", "what is one", "say hi"]
    sample(tmp_path / "apart", prompts, batch_size=1)
    sample(tmp_path / "together", prompts, batch_size=3)
    found = kept(tmp_path / "apart")
    assert found == kept(tmp_path / "together") and found[0] != found[2]


# Interruptions and processes


class Counted:
    """The sampler, which fails before its call of that number."""

    def __init__(self, monkeypatch, fails_at=None):
        self.calls, self.fails_at, self.generate = 0, fails_at, answers.generate
        monkeypatch.setattr(answers, "generate", self)

    def __call__(self, *args, **kwargs):
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.calls += 1
        return self.generate(*args, **kwargs)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    whole = sample(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Counted(patch, fails_at=2)
        sample(tmp_path / "part")
    (path,) = (tmp_path / "part" / "samples").glob("answers-*")
    path.write_text(path.read_text() + '{"number": 4, "te')  # killed while it wrote
    with monkeypatch.context() as patch:
        sampler = Counted(patch)
        assert sample(tmp_path / "part").to_list() == whole.to_list()
        assert sampler.calls == 1  # of three batches
        assert sample(tmp_path / "part").to_list() == whole.to_list() and sampler.calls == 1


def test_a_failing_reward_function_loses_no_answer(tmp_path, monkeypatch):
    def fails(completions, **kwargs):
        raise KeyError("solution")

    with pytest.raises(RuntimeError, match="The reward function `fails` raised KeyError: 'solution'.*Answers are kept"):
        sample(tmp_path, functions=fails)
    sampler = Counted(monkeypatch)
    sample(tmp_path)
    assert sampler.calls == 2  # of three batches
    sample(tmp_path, functions=[letters, letters])  # other rewards of the same answers
    assert sampler.calls == 2


def sample_in_a_process(folder):
    sample(folder / "two")


def test_two_processes_make_the_rows_of_one(tmp_path):
    assert run_forked(sample_in_a_process, tmp_path, processes=2, folder=tmp_path) == [0, 0], [
        path.read_text()[-2000:] for path in tmp_path.glob("rank*.log")
    ]
    rows = [(tmp_path / name / "train.jsonl") for name in ("two", "one")]
    sample(tmp_path / "one")
    assert rows[0].read_text() == rows[1].read_text()
    assert len(list((tmp_path / "two" / "samples").glob("answers-*"))) == 2


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"temperature": 0.5}, "`temperature` was 1.0 and is 0.5"),
        ({"seed": 1}, "`seed` was 0 and is 1"),
        ({"prompts": PROMPTS[:-1]}, "`prompts` was"),
        ({"model": make_model(seed=1)}, "`model` was"),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path, changed, named):
    sample(tmp_path)
    with pytest.raises(ValueError, match=f"is of another run: {named}.*give another `output_dir`"):
        sample(tmp_path, **changed)


def nearness(target):
    """As `trl.rewards.get_soft_overlong_punishment`, a factory of functions of one source."""

    def near(completions, **kwargs):
        return [-abs(len(text) - target) for text in completions]

    return near


def near_to(completions, target=0, **kwargs):
    return nearness(target)(completions)


class Near:
    def __init__(self, target):
        self.target = target

    def __call__(self, completions, **kwargs):
        return nearness(self.target)(completions)


@pytest.mark.parametrize("make", [nearness, lambda target: partial(near_to, target=target), Near])
def test_rewards_of_another_function_of_the_same_source_are_not_taken(tmp_path, make):
    """In one folder, against one that was never scored; the answers are kept."""
    found = [sample(tmp_path / "one", functions=make(target)).to_list() for target in (0, 100, 100)]
    assert found[1] == found[2] == sample(tmp_path / "two", functions=make(100)).to_list() != found[0]
    assert len(list((tmp_path / "one" / "samples").glob("rewards-*"))) == 2


def test_rewards_of_other_columns_are_not_taken(tmp_path):
    """A solution that was corrected: answers are kept, and scored anew."""

    def near(completions, target, **kwargs):
        return [-abs(len(text) - size) for text, size in zip(completions, target, strict=True)]

    def of(folder, target):
        prompts = Dataset.from_dict({"prompt": PROMPTS, "target": [target] * len(PROMPTS)})
        return sample(tmp_path / folder, prompts, near).to_list()

    assert of("one", 0) != of("one", 100) == of("two", 100)
    assert len(list((tmp_path / "one" / "samples").glob("answers-*"))) == 1


# Bad input


@pytest.mark.parametrize(
    "returned, message",
    [
        (lambda n: [0.0] * (n - 1), "returned 5 rewards for 6 answers"),
        (lambda n: 1.0, "returned float for 6 answers"),
        (lambda n: ["good"] * n, "returned 'good' for answer 0"),
        (lambda n: [0.0] * (n - 1) + [float("inf")], "returned inf for answer 5"),
    ],
)
def test_rewards_that_are_no_numbers(tmp_path, returned, message):
    def reward(completions, **kwargs):
        return returned(len(completions))

    with pytest.raises(ValueError, match=f"The reward function `reward` {message}"):
        sample(tmp_path, functions=reward)


def test_arrays_of_another_shape(tmp_path):
    """Of torch, of which one number a row is taken as one."""
    for returned, message in (
        (lambda n: torch.tensor(1.0), "returned Tensor for 3 answers"),
        (lambda n: torch.ones(n, 2), r"returned tensor\(\[1., 1.\]\) for answer 0"),
    ):
        with pytest.raises(ValueError, match=f"The reward function `<lambda>` {message}"):
            sample(tmp_path, PROMPTS[:1], lambda completions, returned=returned, **_: returned(len(completions)))
    of_tensors = sample(tmp_path, PROMPTS[:1], lambda completions, **_: torch.tensor([letters(completions)]).T)
    assert of_tensors["score_chosen"][:] == sample(tmp_path, PROMPTS[:1])["score_chosen"][:]


def long_prompts():
    return ["one " * 30, "say hi", "two " * 27]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": long_prompts()}, r"2 of 3 prompts \(rows 0, 2\) do not fit. With `max_new_tokens=6`.* 26 tokens"),
        ({"prompts": []}, "`prompts` is empty"),
        (
            {"prompts": ["say hi", [{"role": "user", "content": "hi"}]]},
            r"\(1\) `prompt` holds messages and",
        ),
        (
            {"prompts": Dataset.from_dict({"question": ["say hi"]})},
            r"has the columns \['question'\], and needs `prompt`",
        ),
        ({"prompts": [""]}, r"Prompts \[0\] have no token"),
        ({"strategy": "best"}, "`strategy` must be one of"),
        ({"strategy": "threshold"}, "`threshold` is for `strategy='threshold'`, and needed there"),
        ({"threshold": 1.0}, "`threshold` is for"),
        ({"num_samples": 1}, "`num_samples` must be at least 2"),
        ({"margin": -1.0}, "`margin` must not be negative"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"functions": []}, "`reward_funcs` is empty"),
        ({"functions": accuracy_reward}, "`accuracy_reward` cannot be called: missing a required argument: 'solution'"),
        ({"functions": lambda completions: [1.0]}, "`<lambda>` cannot be called: got an unexpected .*`\\*\\*kwargs`"),
        ({"reward_weights": [1.0, 2.0]}, "`reward_weights` must be 1 finite numbers"),
        ({"top_k": 5}, "`top_k=5` has no meaning for a diffusion sampler"),
        ({"margin": 1e9}, "None of 5 prompts gave a row"),
    ],
)
def test_values_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sample(tmp_path, model=make_model(max_sequence_length=32), **options)


@pytest.mark.parametrize("functions", ["accuracy_reward", make_model()])
def test_what_is_no_function(tmp_path, functions):
    with pytest.raises(TypeError, match="`reward_funcs` must be functions in the signature of TRL's GRPO"):
        sample(tmp_path, functions=functions)


def test_one_prompt(tmp_path):
    assert len(sample(tmp_path, PROMPTS[:1])) == 1
