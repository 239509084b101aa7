"""
The whole way on a CPU: make a small diffusion language model, align it with VRPO, and see what changed.

1. pre-train a model of a quarter of a million parameters on the homework of a careless student (`word_problems.py`);
2. let it answer problems four times each, and pair a right answer of its own with a wrong one;
3. align it on the pairs: `vrpo_lora.py`, which is the script for real models too;
4. answer held-out problems before and after.

Everything is written to `runs/demo`, stage by stage, so that an interrupted demo goes on where it was. Nothing is
downloaded. `demo_kto.py` does the same from the marks on single answers.
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
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

from trl_diffusion.cli.quiet import quiet_start

quiet_start()

import demo_report as report
import torch
import word_problems as task
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from tqdm.auto import tqdm

from trl_diffusion.models import LLaDAModelLM

# Two layers suffice for the sums
MODEL = {"d_model": 96, "n_layers": 2, "mlp_hidden_size": 256, "steps": 600, "goal": 0.95}
PROBLEMS = 2000  # to sample answers to: a few hundred pairs would be learnt by heart
SAMPLING = {"samples": 4, "steps": 8}  # two tokens a step, of a block of four in which one is to be decided at most
HELD_OUT = 80  # problems whose answers are held-out pairs

# Tuned on twelve starts, then frozen (docs/demo.md). An answer here is fifteen tokens and one nat settles which of
# two is greedy, so beta = 1 holds the policy where the paper's 0.2 lets it run on. The SFT term is what keeps the sums:
# it is a mean over tokens, so that its weight of 2 is 0.13 for each nat of an answer, where a pair begins with 0.5.
ALIGNMENT = {
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "num_mc_samples": 4,
    "beta": 1.0,
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 2.0],
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 5,
    "per_device_train_batch_size": 8,
    "max_steps": 480,
}
HOUSEKEEPING = {
    "gradient_checkpointing": False,  # it saves memory, which is not short here, and costs a third of the time
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 40,
    "save_total_limit": 1,
    "disable_tqdm": True,
}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 80, "per_device_eval_batch_size": 16}


@dataclass(frozen=True)
class Act:
    """What one demo does in its own way."""

    method: str
    script: str  # that trains
    data: str  # what it trains on: the name of the rows and of their folder
    columns: tuple[str, ...]  # of a row
    settings: dict  # options of the script
    watched: str  # what can improve while the answers get worse
    reading: str  # where to go on


VRPO = Act(
    method="VRPO",
    script="vrpo_lora.py",
    data="pairs",
    columns=("prompt", "chosen", "rejected"),
    settings=ALIGNMENT,
    watched="Loss, margin and reward accuracy",
    reading='`make demo-kto` does the same from thumbs up and down;\nREADME, "Train", has a run of LLaDA-8B',
)
INTRODUCTION = """\
The task: a model learned word problems from a student who mixes up "borrows" and "lends"; {method} is to cure it.
The numbers: how many held-out problems have every step right; those without the two verbs are to stay as they are.
The picture: its last panel counts. {watched} can improve while the answers get worse."""


# --- the stages ------------------------------------------------------------------------------------------------------


def prepare(folder: Path, seed: int) -> dict:
    """Pre-trained model, tokenizer, splits and rows to train on of a seed; from `folder` if they are there already."""
    discard_if_made_by_other_code(folder, (seed, MODEL, PROBLEMS, SAMPLING, HELD_OUT))
    splits, tokenizer = task.make_splits(seed, pairs=PROBLEMS), task.make_tokenizer()
    if not (folder / "base" / "model.safetensors").exists():
        model = task.pretrain(tokenizer, splits, seed, **MODEL)
        tokenizer.save_pretrained(folder / "base")
        model.save_pretrained(folder / "base")
    model = LLaDAModelLM.from_pretrained(folder / "base").eval()
    made = {"model": model, "tokenizer": tokenizer, "splits": splits}
    for name, problems in {"train": splits["pairs"], "test": splits["test"][:HELD_OUT]}.items():
        sample = partial(task.in_two_processes, task.sample_thumbs, model, tokenizer, problems, seed, **SAMPLING)
        thumbs = keep_rows(folder / "thumbs" / f"{name}.jsonl", sample)
        pairs = keep_rows(folder / "pairs" / f"{name}.jsonl", partial(task.pair_up, thumbs))
        made[name] = {"thumbs": thumbs, "pairs": pairs}
    return made


def discard_if_made_by_other_code(folder: Path, made_with: tuple) -> None:
    """A base model of an earlier version of the task would be compared with this version's problems."""
    key = blake2b(Path(task.__file__).read_bytes() + repr(made_with).encode(), digest_size=8).hexdigest()
    made_by = folder / "made_by"
    if not made_by.exists() or made_by.read_text() != key:
        for name in ("base", "pairs", "thumbs"):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    made_by.write_text(key)


def keep_rows(path: Path, make: Callable[[], Dataset]) -> Dataset:
    """The rows that `make` makes, made and written once, and whole or not at all."""
    if not path.exists():
        part = path.with_suffix(".part")
        make().to_json(part)
        part.rename(path)
    return Dataset.from_list(list(map(json.loads, path.read_text().splitlines())))


def align(folder: Path, output: Path, act: Act = VRPO, **changes) -> list[dict]:
    """
    Run the act's script on the base model and the rows of `folder`; returns what the trainer logged. A run that was
    interrupted goes on from its last checkpoint, and one that is finished is not run again.
    """
    options = act.settings | HOUSEKEEPING | EVALUATION | changes
    options |= {"output_dir": output, "model_name_or_path": folder / "base", "dataset_name": folder / act.data}
    begin_or_go_on(output, options, (folder / "made_by").read_text())
    if not (output / "trainer_state.json").exists():
        done = max((int(path.name.partition("-")[2]) for path in output.glob("checkpoint-*")), default=0)
        if done:
            options["resume_from_checkpoint"] = True
        run_script(act.script, options, output / "training.log", done)
        shutil.rmtree(output / f"checkpoint-{options['max_steps']}", ignore_errors=True)
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def begin_or_go_on(output: Path, options: dict, made_by: str) -> None:
    """Start anew where other options, or another base model, were in use."""
    wanted, used = json.dumps([made_by, options], default=str, sort_keys=True), output / "options.json"
    if used.exists() and used.read_text() != wanted:
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    used.write_text(wanted)


SHOWN = {"loss": "loss", "reward margin": "rewards/margins", "reward accuracy": "rewards/accuracies"}


def run_script(script: str, options: dict, log: Path, done: int) -> None:
    """Run a training script in a process of its own, with one progress bar of all steps instead of its output."""
    command = [sys.executable, Path(__file__).with_name(script), *as_flags(options)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (
        open(log, "a") as file,
        tqdm(total=options["max_steps"], initial=done, desc="aligning") as bar,
        subprocess.Popen(list(map(str, command)), env=environment, **streams) as run,
    ):
        try:
            for line in run.stdout:
                file.write(line)
                if line.startswith("{'loss'"):
                    logged = ast.literal_eval(line)
                    bar.update(options["logging_steps"])
                    bar.set_postfix({name: logged[key] for name, key in SHOWN.items() if key in logged})
        except KeyboardInterrupt:  # the script may not have been sent it
            run.terminate()
            raise
    if run.returncode:
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


def shares(tested: dict) -> dict:
    """What `test` found, in percent."""
    return {key: 100 * task.share(tested[key]) for key in ("right", "plain", "tricky", "final number")}


# --- running them ----------------------------------------------------------------------------------------------------


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


def run(act: Act, description: str) -> None:
    """A demo from beginning to end; if it is interrupted, say what is kept."""
    try:
        _run(act, read_arguments(description))
    except KeyboardInterrupt:
        print("\nStopped. Finished stages and the last checkpoint of the alignment are kept: the same command goes on.")
        sys.exit(130)


def _run(act: Act, arguments: argparse.Namespace) -> None:
    folder = arguments.output_dir / f"seed-{arguments.seed}"
    output, picture = folder / act.method.lower(), arguments.output_dir / f"{act.method.lower()}.png"
    print(INTRODUCTION.format(method=act.method, watched=act.watched))
    with stage("1-2. Pre-train on a careless student's homework; let the model answer problems, and mark its answers"):
        made = prepare(folder, arguments.seed)
    tokenizer, problems = made["tokenizer"], made["splits"]["test"]
    rows = made["train"][act.data]
    print(f"   {made['model'].num_parameters():,} parameters; {len(rows)} {act.data} to train on, for instance")
    report.print_row(rows[0], act.columns)
    with stage(f"3. Answer {len(problems)} held-out problems"):
        before = test(made["model"], tokenizer, problems)
    with stage(f"4. Align with {act.method}: examples/{act.script}"):
        history = align(folder, output, act, seed=arguments.seed)
    with stage("5. Answer the same problems"):
        aligned = PeftModel.from_pretrained(made["model"], output).eval()
        after = test(aligned, tokenizer, problems)

    (output / "result.json").write_text(json.dumps({"before": shares(before), "after": shares(after)}))
    report.print_answers(before, after)
    report.print_rewards(history, act.settings["beta"])
    report.print_examples(problems, before, after)
    report.plot(history, before, after, f"{act.method} on {act.data} of its own answers", picture)
    print("\n" + report.verdict(before, after))
    print(f"\nNext: look at {picture}; {act.reading}. The adapter is in {output}.")


if __name__ == "__main__":
    run(VRPO, __doc__)
