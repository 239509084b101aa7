"""
Block diffusion on the whole way: a small SDAR is pre-trained, aligned on pairs of its own answers, and tested.

    python benchmarks/block_word_problems.py --seeds 0 2 4
    ATEN_CPU_CAPABILITY=avx2 python benchmarks/block_word_problems.py --seeds 1 3 5
    python benchmarks/block_word_problems.py --report

The task and the settings of the alignment are those of the demo (`examples/demo.py`); the model has blocks of four
tokens, and answers block by block. Finished stages and starts are kept in `runs/block_word_problems`. About five
minutes of a core for a start.
"""

import os
import random
import sys
from functools import partial
from itertools import count
from pathlib import Path

import torch
from block_models import block_loss, make_sdar
from cells import before_and_after, run_cells
from demo_starts import mean_and_half_width
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import demo
import word_problems as task

ROOT = Path("runs/block_word_problems")
ARM = "SDAR, blocks of 4"
MODEL = {"block": 4, "width": 96, "layers": 2, "longest": 64}
BATCH, STEPS, GOAL = 48, 400, 0.95
PROBLEMS = 600  # to sample four answers to: the sampler runs answers one by one
MAX_STEPS = 240  # of the alignment: pairs are fewer than in the demo, too


def homework(tokenizer, problems: list, rng: random.Random):
    """
    Endless batches of `(B, L)` ids and the length of the prompt: prompt, answer and ends of text. Prompts of a batch
    have one length, and answers fill a canvas of one length, which varies from batch to batch as in the demo.
    """
    by_length: dict[int, list] = {}
    for problem in problems:
        ids = (tokenizer(text)["input_ids"] for text in (problem.prompt, task.students_answer(problem, rng)))
        prompt, answer = ids
        by_length.setdefault(len(prompt), []).append((prompt, answer))
    lengths, sizes = list(by_length), list(map(len, by_length.values()))
    while True:
        (length,) = rng.choices(lengths, sizes)
        rows = rng.sample(by_length[length], BATCH)
        canvas = rng.randint(max(len(answer) for _, answer in rows) + 1, task.MAX_NEW_TOKENS)
        end = tokenizer.eos_token_id
        yield torch.tensor([p + a + [end] * (canvas - len(a)) for p, a in rows]), length


def pretrain(tokenizer, splits: dict, seed: int):
    torch.manual_seed(seed)
    model = make_sdar(tokenizer, **MODEL)
    batches, draws = homework(tokenizer, splits["pretraining"], random.Random(seed)), count()
    plain = [problem for problem in splits["validation"] if not problem.is_tricky]

    def loss_of(_):
        return block_loss(model, *next(batches), seed=next(draws))

    return task.train_to_calculate(model, tokenizer, plain, loss_of, STEPS, GOAL)


def prepare(folder: Path, seed: int) -> dict:
    """Pre-trained model, its tokenizer and problems; the pairs it is aligned on are left in `folder`."""
    demo.discard_if_made_by_other_code(folder, (seed, MODEL, BATCH, STEPS, GOAL, PROBLEMS, demo.SAMPLING))
    splits, tokenizer = task.make_splits(seed, pairs=PROBLEMS), task.make_tokenizer()
    if not (folder / "base" / "model.safetensors").exists():
        model = pretrain(tokenizer, splits, seed)
        tokenizer.save_pretrained(folder / "base")
        model.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    sample = partial(task.sample_pairs, model, tokenizer, splits["pairs"], seed, **demo.SAMPLING)
    pairs = demo.keep_rows(folder / "pairs" / "train.jsonl", sample)
    return {"model": model, "tokenizer": tokenizer, "splits": splits, "pairs": pairs}


def run_cell(root: Path, arm: str, seed: int) -> dict:
    """A start: everything."""
    folder = root / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    made = prepare(folder, seed)
    history = demo.align(folder, folder / "vrpo", seed=seed, max_steps=MAX_STEPS, eval_strategy="no")
    before, after = before_and_after(made, folder / "vrpo", made["splits"]["test"])
    instructions = os.environ.get("ATEN_CPU_CAPABILITY", "default")
    row = {"arm": arm, "seed": seed, "instructions": instructions, "pairs": len(made["pairs"])}
    return row | {"first loss": history[0]["loss"], "before": before, "after": after}


def report(done: dict) -> None:
    print("\n| seed | instructions | pairs | every step right | gain | without the two verbs | with them |")
    print("|---|---|---|---|---|---|---|")
    gains: dict[str, list[float]] = {"right": [], "plain": [], "tricky": []}
    for (_, seed), row in sorted(done.items()):
        ways = {}
        for key, kept in gains.items():
            ways[key] = "{:.1f} -> {:.1f}".format(row["before"][key], row["after"][key])
            kept.append(row["after"][key] - row["before"][key])
        cells = [seed, row["instructions"], row["pairs"], ways["right"], f"{gains['right'][-1]:+.1f}"]
        print("| " + " | ".join(map(str, [*cells, ways["plain"], ways["tricky"]])) + " |")
    for key, kept in gains.items() if done else ():
        print(f"{key}: {mean_and_half_width(kept)} points over {len(kept)} starts, worst {min(kept):+.1f}")


if __name__ == "__main__":
    run_cells(__doc__, [ARM], range(4), "results.jsonl", run_cell, report, root=ROOT)
