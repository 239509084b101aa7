"""What the training scripts run on without arguments: a small model and its own answers, made in a minute on a CPU."""

from pathlib import Path

import torch
import word_problems as task
from datasets import disable_progress_bars
from word_problem_rewards import prompts_of

from trl_diffusion import LLaDAModelLM

FOLDER = Path("runs/embedded-default")
PRETRAINING_STEPS = 300
NUM_PROBLEMS = {"train": 150, "test": 30}
NUM_PROMPTS = {"train": 200, "test": 100}  # of rounds, which make their data themselves
OPTIONS = "--use_peft --learning_rate 1e-3 --max_steps 20 --per_device_train_batch_size 8 --logging_steps 2"
ON_THE_CPU = "--use_cpu --bf16 False"
ROUNDS = (
    "--num_rounds 2 --reward_funcs word_problem_rewards.every_step_right --batch_size 50 "
    "--max_new_tokens 16 --steps 8 --block_length 4"
)


def embedded_arguments(thumbs: bool = False) -> list[str]:
    """Make a model and its data, and return the arguments of a short run with LoRA on them."""
    data = "thumbs" if thumbs else "pairs"
    _make_base(seed=0)
    _make_data(data, seed=0)
    return _arguments(data)


def embedded_rounds() -> list[str]:
    """Make a model and prompts, and return the arguments of two short rounds on them."""
    _make_base(seed=0)
    if not (FOLDER / "prompts" / "test.jsonl").exists():
        problems, start = task.make_splits(seed=0)["pairs"], 0
        for name, size in NUM_PROMPTS.items():
            prompts_of(problems[start : start + size]).to_json(FOLDER / "prompts" / f"{name}.jsonl")
            start += size
    return _arguments("prompts", ROUNDS)


def _arguments(data: str, more: str = "") -> list[str]:
    paths = {
        "model_name_or_path": FOLDER / "base",
        "dataset_name": FOLDER / data,
        "output_dir": FOLDER / f"from-{data}",
    }
    given = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    arguments = [*given, *f"{OPTIONS} {ON_THE_CPU} {more}".split()]
    print(f"Running with {' '.join(arguments)}")
    return arguments


def _make_base(seed: int) -> None:
    print("No arguments are given: making a small model that answers word problems.")
    disable_progress_bars()
    torch.set_num_threads(1)  # a model of this size is too small to share
    if (FOLDER / "base" / "config.json").exists():
        return
    tokenizer = task.make_tokenizer()
    model = task.pretrain(tokenizer, task.make_splits(seed), seed, steps=PRETRAINING_STEPS, goal=0.0)
    model.save_pretrained(FOLDER / "base")
    tokenizer.save_pretrained(FOLDER / "base")


def _make_data(data: str, seed: int) -> None:
    if (FOLDER / data / "test.jsonl").exists():
        return
    sample = task.sample_thumbs if data == "thumbs" else task.sample_pairs
    model, tokenizer, start = LLaDAModelLM.from_pretrained(FOLDER / "base"), task.make_tokenizer(), 0
    problems = task.make_splits(seed)["pairs"]
    for name, size in NUM_PROBLEMS.items():
        sample(model, tokenizer, problems[start : start + size], seed).to_json(FOLDER / data / f"{name}.jsonl")
        start += size
