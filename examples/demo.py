"""
The whole way on a CPU: make a small diffusion language model, align it with VRPO, and see what changed.

1. pre-train a half-million-parameter LLaDA on the homework of a careless student (`word_problems.py`);
2. let it answer problems several times, and pair a right answer of its own with a wrong one;
3. align it on the pairs: `vrpo_lora.py`, which is the script for real models too;
4. answer held-out problems before and after.

Everything is written to `runs/demo`, stage by stage, so that an interrupted demo goes on where it was. Nothing is
downloaded.
"""

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path

from trl_diffusion.cli.quiet import quiet_start

quiet_start()

import demo_report as report
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
    "save_strategy": "steps",
    "save_steps": 20,
    "save_total_limit": 1,
    "disable_tqdm": True,
}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 20, "per_device_eval_batch_size": 16}
INTRODUCTION = """\
The task: a model learned word problems from a student who mixes up "borrows" and "lends"; VRPO is to cure it of that.
The numbers: how many held-out problems have every step right; those without the two verbs are to stay as they are.
The picture: its last panel counts. Loss, margin and reward accuracy can improve while the answers get worse."""


# --- the stages ------------------------------------------------------------------------------------------------------


def prepare(folder: Path, seed: int) -> dict:
    """Pre-trained model, tokenizer, splits and pairs of a seed; from `folder` if they are there already."""
    discard_if_made_by_other_code(folder, seed)
    splits, tokenizer = task.make_splits(seed), task.make_tokenizer()
    if not (folder / "base" / "model.safetensors").exists():
        model = task.pretrain(tokenizer, splits, seed)
        tokenizer.save_pretrained(folder / "base")
        model.save_pretrained(folder / "base")
    model = LLaDAModelLM.from_pretrained(folder / "base").eval()
    for name, problems in {"train": splits["pairs"], "test": splits["test"][:200]}.items():
        make = partial(task.sample_in_two_processes, task.sample_pairs, model, tokenizer, problems, seed)
        keep_rows(folder / "pairs" / f"{name}.jsonl", make)
    sizes = {name: count_lines(folder / "pairs" / f"{name}.jsonl") for name in ("train", "test")}
    return {"model": model, "tokenizer": tokenizer, "splits": splits, "pairs": sizes}


def discard_if_made_by_other_code(folder: Path, seed: int) -> None:
    """A base model of an earlier version of the task would be compared with this version's problems."""
    key = blake2b(Path(task.__file__).read_bytes() + str(seed).encode(), digest_size=8).hexdigest()
    made_by = folder / "made_by"
    if not made_by.exists() or made_by.read_text() != key:
        for name in ("base", "pairs", "thumbs"):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    made_by.write_text(key)


def keep_rows(path: Path, make: Callable) -> None:
    """Write the rows that `make` makes, once, and whole or not at all."""
    if not path.exists():
        part = path.with_suffix(".part")
        make().to_json(part)
        part.rename(path)


def align(folder: Path, output: Path, script="vrpo_lora.py", data="pairs", settings=ALIGNMENT, **changes) -> list[dict]:
    """
    Run a training script on the base model and the data of `folder`; returns what the trainer logged. A run that was
    interrupted goes on from its last checkpoint, and one that is finished is not run again.
    """
    options = settings | HOUSEKEEPING | EVALUATION | changes
    options |= {"output_dir": output, "model_name_or_path": folder / "base", "dataset_name": folder / data}
    begin_or_go_on(output, options, (folder / "made_by").read_text())
    if not (output / "trainer_state.json").exists():
        if any(output.glob("checkpoint-*")):
            options["resume_from_checkpoint"] = True
        run_script(script, options, output / "training.log")
        shutil.rmtree(output / f"checkpoint-{options['max_steps']}", ignore_errors=True)
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def begin_or_go_on(output: Path, options: dict, made_by: str) -> None:
    """Start anew where other options, or another base model, were in use."""
    wanted, used = json.dumps([made_by, options], default=str, sort_keys=True), output / "options.json"
    if used.exists() and used.read_text() != wanted:
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    used.write_text(wanted)


def run_script(script: str, options: dict, log: Path) -> None:
    """Run a training script in a process of its own, with one progress bar instead of its output."""
    command = [sys.executable, Path(__file__).with_name(script), *as_flags(options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(log, "a") as file, tqdm(total=options["max_steps"], desc="aligning") as bar:
        run = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        for line in run.stdout:
            file.write(line)
            if line.startswith("{'loss'"):
                logged = ast.literal_eval(line)
                bar.update(options["logging_steps"])
                shown = {"loss": "loss", "reward margin": "rewards/margins", "reward accuracy": "rewards/accuracies"}
                bar.set_postfix({name: logged[key] for name, key in shown.items() if key in logged})
    if run.wait():
        raise RuntimeError(f"{script} failed:\n{log.read_text()[-3000:]}")


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


# --- running them ----------------------------------------------------------------------------------------------------


def count_lines(path: Path) -> int:
    with open(path) as lines:
        return sum(1 for _ in lines)


@contextmanager
def stage(text: str):
    """Print what is being done, and how long it took."""
    print(f"\n== {text}", flush=True)
    start = time.monotonic()
    yield
    print(f"   {time.monotonic() - start:.0f} s", flush=True)


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


def interruptible(run: Callable[[], None]) -> None:
    """Run a demo; if it is interrupted, say what is kept."""
    try:
        run()
    except KeyboardInterrupt:
        print("\nStopped. Finished stages and the last checkpoint of the alignment are kept: the same command goes on.")
        sys.exit(130)


def main() -> None:
    arguments = read_arguments(__doc__)
    folder = arguments.output_dir / f"seed-{arguments.seed}"
    print(INTRODUCTION)
    with stage("1-2. Pre-train on a careless student's homework, then sample preference pairs from the model"):
        made = prepare(folder, arguments.seed)
    tokenizer, problems = made["tokenizer"], made["splits"]["test"]
    print(f"   {made['model'].num_parameters():,} parameters; {made['pairs']['train']} pairs to train on, for instance")
    report.print_row(folder / "pairs" / "train.jsonl", ("prompt", "chosen", "rejected"))
    with stage(f"3. Answer {len(problems)} held-out problems"):
        before = test(made["model"], tokenizer, problems)
    with stage("4. Align with VRPO: examples/vrpo_lora.py"):
        history = align(folder, folder / "vrpo", seed=arguments.seed)
    with stage("5. Answer the same problems"):
        aligned = PeftModel.from_pretrained(made["model"], folder / "vrpo").eval()
        after = test(aligned, tokenizer, problems)

    report.print_answers(before, after)
    report.print_rewards(history, ALIGNMENT["beta"])
    report.print_examples(problems, before, after)
    report.plot(history, before, after, arguments.output_dir / "demo.png")
    print("\n" + report.verdict(before, after))
    print(
        f"\nNext: look at {arguments.output_dir / 'demo.png'}; `make demo-kto` does the same from thumbs up and down;"
        f'\nREADME, "Train a model", has the command for LLaDA-8B. The adapter is in {folder / "vrpo"}.'
    )


if __name__ == "__main__":
    interruptible(main)
