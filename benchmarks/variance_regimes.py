"""
What the variance benchmark measures on: a policy, its reference and held-out preference pairs, for two tasks.

    regime = load_regime("B64 far")   # made on first use, in `runs/variance`, which takes some minutes

- "sums" (A): `examples/word_problems.py` and its model. Right against wrong answers of the model's own, 9 or 15 tokens.
- "stories" (B): `grammar_text.py`, 32 to 256 words. Half of the rejected stories are the chosen one with a few words
  spoilt ("edit"), half are other stories to the same opening, spoilt too and up to 15% shorter ("other").

`near` and `far` are the reference after a few steps, and after more and bolder steps, of `DiffusionVRPOTrainer` with
all weights trained. The pairs of a regime were not trained on.
"""

import argparse
import copy
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import grammar_text
import word_problems

from trl_diffusion import DiffusionVRPOConfig, DiffusionVRPOTrainer
from trl_diffusion.models import LLaDAModelLM

ROOT = Path("runs/variance")
SEED = 0
STORY_LENGTHS = (32, 64, 128, 256)
EDIT_SHARE, OTHER_SHARE = (0.1, 0.25), (0.15, 0.4)  # of the words that can be wrong, made wrong in a rejected story
TRAINING_PAIRS = 384
POLICIES = {
    "sums": {"near": (40, 6e-5), "far": (80, 4e-4)},  # steps, learning rate
    "stories": {"near": (16, 2e-5), "far": (40, 1e-4)},
}
# Name: task, policy, longest and shortest response with its end of text
REGIMES = {
    "A9 near": ("sums", "near", 9),
    "A9 far": ("sums", "far", 9),
    "A15 far": ("sums", "far", 15),
    "B32 near": ("stories", "near", 32),
    "B32 far": ("stories", "far", 32),
    "B64 far": ("stories", "far", 64),
    "B128 near": ("stories", "near", 128),
    "B256 far": ("stories", "far", 256),
}


@dataclass(frozen=True)
class Regime:
    """
    Args:
        name: one of [`REGIMES`].
        policy, reference: the models.
        pairs: `(prompt_ids, chosen_ids, rejected_ids)`, responses with their end of text.
        kinds: of each pair: "own" (sums), "edit" or "other" (stories).
    """

    name: str
    policy: LLaDAModelLM
    reference: LLaDAModelLM
    pairs: list[tuple[list[int], list[int], list[int]]]
    kinds: list[str]


def load_regime(name: str, root: Path = ROOT, num_pairs: int | None = None) -> Regime:
    """A regime by its name; what is missing on disk is made first. `num_pairs` takes the first so many."""
    if name not in REGIMES:
        raise ValueError(f"There is no regime {name!r}; there are {list(REGIMES)}.")
    task, policy, length = REGIMES[name]
    folder = root / task
    build(task, root)
    tokenizer = AutoTokenizer.from_pretrained(folder / "reference")
    with open(folder / "heldout.jsonl") as lines:
        rows = [row for row in map(json.loads, lines) if row["length"] == length][:num_pairs]
    end = [tokenizer.eos_token_id]
    pairs = [
        (
            tokenizer(row["prompt"])["input_ids"],
            *(tokenizer(row[key])["input_ids"] + end for key in ("chosen", "rejected")),
        )
        for row in rows
    ]
    models = [LLaDAModelLM.from_pretrained(folder / which).eval() for which in (policy, "reference")]
    return Regime(name, *models, pairs, [row["kind"] for row in rows])


def build(task: str, root: Path = ROOT) -> Path:
    """Make what the regimes of a task need, unless it is there."""
    folder = root / task
    if not (folder / "heldout.jsonl").exists():
        _build_reference(task, folder)
    for name, (steps, learning_rate) in POLICIES[task].items():
        if not (folder / name / "config.json").exists():
            train_policy(folder, name, steps, learning_rate)
    return folder


def _build_reference(task: str, folder: Path) -> None:
    if task == "sums":
        tokenizer, splits = word_problems.make_tokenizer(), word_problems.make_splits(SEED)
        model = _existing(folder) or word_problems.pretrain(tokenizer, splits, SEED)
        training = word_problems.sample_pairs(model, tokenizer, splits["pairs"], SEED)
        heldout = word_problems.sample_pairs(model, tokenizer, splits["test"] + splits["validation"], SEED)
        heldout = _sums_by_length(heldout)
    else:
        tokenizer = grammar_text.make_tokenizer()
        model = _existing(folder) or grammar_text.pretrain(tokenizer, SEED)
        rng = random.Random(SEED + 1)
        lengths = [length for length in grammar_text.LENGTHS if length <= 128]
        training = Dataset.from_list(
            [story_pair(rng, rng.choice(lengths), ("edit", "other")[i % 2]) for i in range(TRAINING_PAIRS)]
        ).select_columns(["prompt", "chosen", "rejected"])
        heldout = Dataset.from_list(
            [story_pair(rng, length, ("edit", "other")[i % 2]) for length in STORY_LENGTHS for i in range(48)]
        )
        for length in STORY_LENGTHS:
            print(f"nats per token, {length} words:", grammar_text.report_quality(model, tokenizer, length), flush=True)
    model.save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "reference")
    training.to_json(folder / "training.jsonl")
    heldout.to_json(folder / "heldout.jsonl")


def _existing(folder: Path) -> LLaDAModelLM | None:
    """A reference that was saved before a run was stopped."""
    if not (folder / "reference" / "config.json").exists():
        return None
    return LLaDAModelLM.from_pretrained(folder / "reference").eval()


def _sums_by_length(pairs: Dataset) -> Dataset:
    """Pairs whose two answers have the same length, with that length: 9 for one step, 15 for two."""
    rows = []
    for row in pairs:
        lengths = {len(row[key].split()) + 1 for key in ("chosen", "rejected")}
        if len(lengths) == 1:
            rows.append(row | {"length": lengths.pop(), "kind": "own"})
    return Dataset.from_list(rows)


def story_pair(rng: random.Random, length: int, kind: str) -> dict:
    """A story without errors, and a worse one."""
    teller = grammar_text.Teller(rng)
    again = copy.deepcopy(teller)
    again.rng = rng
    story = grammar_text.continue_story(teller, length)
    if kind == "edit":
        rejected = grammar_text.spoil(story, rng.uniform(*EDIT_SHARE), rng)
    else:
        other = grammar_text.continue_story(again, max(24, round(length * rng.uniform(0.85, 1.0))))
        rejected = grammar_text.spoil(other, rng.uniform(*OTHER_SHARE), rng)
    texts = {"chosen": [slot.word for slot in story], "rejected": rejected}
    responses = {key: " " + " ".join(words[:-1]) for key, words in texts.items()}  # the trainer appends the end of text
    return {"prompt": " ".join(teller.opening()), **responses, "length": length, "kind": kind}


def train_policy(folder: Path, name: str, steps: int, learning_rate: float) -> None:
    """`steps` of VRPO on the training pairs, all weights trained, from the reference."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "reference")
    trainer = DiffusionVRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "reference"),
        args=DiffusionVRPOConfig(
            str(folder / name),
            num_mc_samples=4,
            mask_scheme="fixed_count",  # spelled out: a regime is the same whatever the package's defaults are
            stratify=True,
            control_variate="none",
            couple_pairs=False,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            per_device_train_batch_size=8,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=10,
            seed=SEED,
        ),
        train_dataset=load_dataset("json", data_files=str(folder / "training.jsonl"), split="train"),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.model.save_pretrained(folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for task in arguments.tasks:
        build(task)


if __name__ == "__main__":
    main()
