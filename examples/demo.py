"""
The whole way on a CPU: make a small diffusion language model, align it with VRPO, and see what changed.

1. pre-train a half-million-parameter LLaDA on the homework of a careless student (`word_problems.py`);
2. let it answer problems several times, and pair a right answer of its own with a wrong one;
3. align it on the pairs: `vrpo_lora.py`, which is the script for real models too;
4. answer held-out problems before and after.

Everything is written to `runs/demo`. Nothing is downloaded.
"""

import argparse
import ast
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from trl_diffusion.cli.quiet import quiet_start

quiet_start()

import torch
import word_problems as task
from datasets import disable_progress_bars
from peft import PeftModel
from tqdm.auto import tqdm

from trl_diffusion.models import LLaDAModelLM

# Tuned on validation problems of other seeds than the demo's, then frozen. An answer here is fifteen tokens and one nat
# settles which of two is greedy, so beta = 1 holds the policy where the paper's 0.2 lets it run on and forget sums.
ALIGNMENT = {
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "num_mc_samples": 8,
    "beta": 1.0,
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 0.05],
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 5,
    "per_device_train_batch_size": 16,
    "max_steps": 80,
}
HOUSEKEEPING = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "logging_steps": 5,
    "save_strategy": "no",
    "disable_tqdm": True,
}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 20, "per_device_eval_batch_size": 16}
EXAMPLES_SHOWN = 4


# --- the stages ------------------------------------------------------------------------------------------------------


def prepare(folder: Path, seed: int) -> dict:
    """Pre-trained model, tokenizer, splits and pairs of a seed; from `folder` if they are there already."""
    splits, tokenizer = task.make_splits(seed), task.make_tokenizer()
    if not (folder / "pairs" / "test.jsonl").exists():
        model = task.pretrain(tokenizer, splits, seed)
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        for name, problems in {"train": splits["pairs"], "test": splits["test"][:200]}.items():
            task.sample_pairs(model, tokenizer, problems, seed).to_json(folder / "pairs" / f"{name}.jsonl")
    model = LLaDAModelLM.from_pretrained(folder / "base").eval()
    sizes = {name: count_lines(folder / "pairs" / f"{name}.jsonl") for name in ("train", "test")}
    return {"model": model, "tokenizer": tokenizer, "splits": splits, "pairs": sizes}


def align(folder: Path, output: Path, script="vrpo_lora.py", data="pairs", settings=ALIGNMENT, **changes) -> list[dict]:
    """Run a training script on the base model and the data of `folder`; returns what the trainer logged."""
    output.mkdir(parents=True, exist_ok=True)
    options = settings | HOUSEKEEPING | EVALUATION | changes
    options |= {"output_dir": output, "model_name_or_path": folder / "base", "dataset_name": folder / data}
    command = [sys.executable, Path(__file__).with_name(script), *as_flags(options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log = output / "training.log"
    with open(log, "w") as file, tqdm(total=options["max_steps"], desc="aligning") as bar:
        run = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        for line in run.stdout:
            file.write(line)
            if line.startswith("{'loss'"):
                logged = ast.literal_eval(line)
                bar.update(options["logging_steps"])
                bar.set_postfix(loss=logged["loss"], reward_accuracy=logged.get("rewards/accuracies"))
    if run.wait():
        raise RuntimeError(f"{script} failed:\n{log.read_text()[-3000:]}")
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def as_flags(options: dict) -> list:
    flags = []
    for name, value in options.items():
        flags += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return flags


def test(model, tokenizer, problems) -> dict:
    """Answers to held-out problems and what they are worth."""
    answers = task.answer(model, tokenizer, [problem.prompt for problem in problems])
    right = [task.is_right(problem, text) for problem, text in zip(problems, answers, strict=True)]
    return {
        "answers": answers,
        "right": right,
        "plain": [ok for problem, ok in zip(problems, right, strict=True) if not problem.is_tricky],
        "tricky": [ok for problem, ok in zip(problems, right, strict=True) if problem.is_tricky],
        "final number": [task.is_final_number_right(p, text) for p, text in zip(problems, answers, strict=True)],
    }


# --- the report ------------------------------------------------------------------------------------------------------


def interval(outcomes: list[bool]) -> tuple[float, float, float]:
    """Share of right outcomes in percent, and its 95% Wilson interval."""
    n, p, z = len(outcomes), task.share(outcomes), 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * p, *(100 * (centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))


def print_pair(path: Path) -> None:
    with open(path) as lines:
        pair = json.loads(next(lines))
    for key in ("prompt", "chosen", "rejected"):
        print(f"     {key:<9} {pair[key].strip()}")


def print_answers(before: dict, after: dict) -> None:
    rows = {
        "every step right": "right",
        "final number right": "final number",
        'problems without "borrows" or "lends"': "plain",
        'problems with "borrows" or "lends"': "tricky",
    }
    print(f"\n{'answers to held-out test problems':<40}{'before':>22}{'after':>22}")
    for label, key in rows.items():
        cells = ["{:.1f}% [{:.1f}, {:.1f}]".format(*interval(result[key])) for result in (before, after)]
        print(f"  {label:<38}{cells[0]:>22}{cells[1]:>22}")


def print_rewards(history: list[dict]) -> None:
    last, beta = [entry for entry in history if "eval_loss" in entry][-1], ALIGNMENT["beta"]
    rewards = {
        "reward accuracy": f"{100 * last['eval_rewards/accuracies']:.1f}%",
        "reward margin": f"{last['eval_rewards/margins']:+.2f}",
        "change of the chosen answers' ELBO": f"{last['eval_rewards/chosen'] / beta:+.2f} nats",
        "change of the rejected answers' ELBO": f"{last['eval_rewards/rejected'] / beta:+.2f} nats",
    }
    print("pairs sampled on held-out test problems")
    for label, value in rewards.items():
        print(f"  {label:<38}{'':>22}{value:>22}")


def print_examples(problems, before: dict, after: dict) -> None:
    """The first problems whose answer became right, and the first whose answer became wrong."""
    changes = {"corrected": (False, True), "spoilt": (True, False)}
    for name, change in changes.items():
        rows = [i for i, pair in enumerate(zip(before["right"], after["right"], strict=True)) if pair == change]
        print(f"\n{name}: {len(rows)} of {len(problems)} problems")
        for i in rows[: EXAMPLES_SHOWN if name == "corrected" else 1]:
            print(f"  {problems[i].prompt}")
            print(f"    before  {before['answers'][i]}\n    after   {after['answers'][i]}")


def plot(history: list[dict], before: dict, after: dict, path: Path) -> None:
    """Loss, margin and reward accuracy of the run, and accuracy of the answers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    titles = {"loss": "loss", "rewards/margins": "reward margin", "rewards/accuracies": "reward accuracy"}
    for axis, (key, title) in zip(axes, titles.items(), strict=False):
        for prefix, label, style in (("", "training", "-"), ("eval_", "held out", "o--")):
            points = [(entry["step"], entry[prefix + key]) for entry in history if prefix + key in entry]
            axis.plot(*zip(*points, strict=True), style, label=label)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    keys = {"all": "right", "no tricky verb": "plain", "tricky verb": "tricky"}
    for offset, (label, result) in enumerate({"before": before, "after": after}.items()):
        intervals = [interval(result[key]) for key in keys.values()]
        heights = [height for height, _, _ in intervals]
        errors = [[h - low for h, low, _ in intervals], [high - h for h, _, high in intervals]]
        places = [i + 0.4 * offset - 0.2 for i in range(len(keys))]
        axes[3].bar(places, heights, 0.38, yerr=errors, capsize=3, label=label)
    axes[3].set(title="held-out problems, every step right (%)", ylim=(0, 119), yticks=range(0, 101, 20))
    axes[3].set_xticks(range(len(keys)), keys)
    axes[3].legend(loc="upper center", ncols=2)
    figure.savefig(path, dpi=120)


def count_lines(path: Path) -> int:
    with open(path) as lines:
        return sum(1 for _ in lines)


class Stage:
    """Prints what is being done, and how long it took."""

    def __init__(self, text: str):
        self.text = text

    def __enter__(self):
        print(f"\n== {self.text}", flush=True)
        self.start = time.monotonic()

    def __exit__(self, *_):
        print(f"   {time.monotonic() - self.start:.0f} s", flush=True)


def read_arguments(description: str) -> argparse.Namespace:
    """The arguments that both demos have, and quiet libraries."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the problems, the student, the model and the training")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--threads", type=int, default=1, help="a model of this size is too small to share")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bars()
    return arguments


def main() -> None:
    arguments = read_arguments(__doc__)
    folder = arguments.output_dir / f"seed-{arguments.seed}"

    with Stage("1-2. Pre-train on a careless student's homework, then sample preference pairs from the model"):
        made = prepare(folder, arguments.seed)
    tokenizer, problems = made["tokenizer"], made["splits"]["test"]
    print(f"   {made['model'].num_parameters():,} parameters; {made['pairs']['train']} pairs to train on, for instance")
    print_pair(folder / "pairs" / "train.jsonl")
    with Stage(f"3. Answer {len(problems)} held-out problems"):
        before = test(made["model"], tokenizer, problems)
    with Stage("4. Align with VRPO: examples/vrpo_lora.py"):
        history = align(folder, folder / "vrpo", seed=arguments.seed)
    with Stage("5. Answer the same problems"):
        aligned = PeftModel.from_pretrained(made["model"], folder / "vrpo").eval()
        after = test(aligned, tokenizer, problems)

    print_answers(before, after)
    print_rewards(history)
    print_examples(problems, before, after)
    plot(history, before, after, arguments.output_dir / "demo.png")
    print(f"\nModel in {folder / 'vrpo'}, curves in {arguments.output_dir / 'demo.png'}")


if __name__ == "__main__":
    main()
