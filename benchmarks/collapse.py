"""
What keeps an alignment from forgetting: settings of the loss next to each other, by what the answers gain and lose.

    python benchmarks/collapse.py --seeds 1000 1001 --arms "SFT weight 0.05" "SFT weight 2"
    python benchmarks/collapse.py --report

Each cell (arm, seed) is one training run on the base model and the pairs of a start of `demo_starts.py`, with `BASE`
and the changes of the arm. Two things can be lost: the ELBO of chosen responses (displacement, which the trainer logs
and warns of), and problems that were solved before, of which there are few pairs (the plain ones, which only answers
show). Finished cells are kept in `runs/demo_starts/collapse.jsonl` and not run again.
"""

import re
import statistics
import sys
from pathlib import Path

from cells import before_and_after, run_cells
from demo_starts import mean_and_half_width

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import demo

from trl_diffusion.trainers.displacement import CHOSEN, REJECTED

# Those of the demo before this was looked at: the paper's SFT weight, and fewer steps
BASE = {
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 0.05],
    "beta": 1.0,
    "learning_rate": 1e-3,
    "max_steps": 320,
}
ARMS: dict[str, dict] = {
    "SFT weight 0": {"loss_type": ["sigmoid"], "loss_weights": [1.0]},
    "SFT weight 0.05": {},
    "SFT weight 0.2": {"loss_weights": [1.0, 0.2]},
    "SFT weight 0.5": {"loss_weights": [1.0, 0.5]},
    "SFT weight 1": {"loss_weights": [1.0, 1.0]},
    "SFT weight 2": {"loss_weights": [1.0, 2.0]},
    "SFT weight 4": {"loss_weights": [1.0, 4.0]},
    "SFT alone": {"loss_type": ["sft"], "loss_weights": [1.0]},
    "beta 0.2": {"beta": 0.2},
    "beta 0.5, SFT weight 0.5": {"beta": 0.5, "loss_weights": [1.0, 0.5]},
    "beta 3": {"beta": 3.0},
    "apo_zero": {"loss_type": ["apo_zero", "sft"]},
    "apo_down": {"loss_type": ["apo_down", "sft"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm", "sft"], "beta": 10.0},  # a score per token, of which there are ten
    "learning rate 5e-4": {"learning_rate": 5e-4},
    "learning rate 2e-3": {"learning_rate": 2e-3},
    "16 pairs a step, 200 steps": {"per_device_train_batch_size": 16, "max_steps": 200},
}
LIMIT = 0.1  # nats per token: the default of `displacement_warning`


def run_cell(root: Path, arm: str, seed: int) -> dict:
    """Train with the changes of an arm, and test."""
    folder, made = root / f"seed-{seed}", demo.prepare(root / f"seed-{seed}", seed)
    output, changes = folder / re.sub(r"[^\w.]+", "_", f"collapse {arm}"), BASE | ARMS[arm]
    history = demo.align(folder, output, seed=seed, **changes, eval_steps=changes["max_steps"])
    problems = made["splits"]["validation"] + made["splits"]["test"]
    before, after = before_and_after(made, output, problems)
    changed = {name: [entry[name] for entry in history if name in entry] for name in (CHOSEN, REJECTED)}
    margins = [entry["rewards/margins"] for entry in history if "rewards/margins" in entry]
    return {"arm": arm, "seed": seed, "before": before, "after": after, "margins": margins, **changed}


def report(done: dict[tuple[str, int], dict]) -> None:
    """Per arm: what answers gained, with 95% t-intervals, the worst start, and what the trainer had logged of it."""
    titles = ["", "starts", "gain, every step right", "worst", "gain, plain problems", "worst", "gain, with the verbs"]
    titles += ["nats per token, chosen; rejected", "warned"]
    print("\n| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for arm in ARMS:
        rows = [row for (name, _), row in done.items() if name == arm]
        if not rows:
            continue
        gains = {key: [row["after"][key] - row["before"][key] for row in rows] for key in ("right", "plain", "tricky")}
        change = [statistics.mean(row[name][-1] for row in rows) for name in (CHOSEN, REJECTED)]
        cells = [arm, len(rows)]
        for key in ("right", "plain"):
            cells += [mean_and_half_width(gains[key]), f"{min(gains[key]):+.1f}"]
        cells.append(mean_and_half_width(gains["tricky"]))
        cells += ["{:+.3f}; {:+.3f}".format(*change), f"{sum(map(is_warned_of, rows))} of {len(rows)}"]
        print("| " + " | ".join(map(str, cells)) + " |")


def is_warned_of(row: dict) -> bool:
    """By the rule of the trainer, on what was logged."""
    return any(change < -LIMIT and margin > 0 for change, margin in zip(row[CHOSEN], row["margins"], strict=True))


if __name__ == "__main__":
    run_cells(__doc__, list(ARMS), range(1000, 1008), "collapse.jsonl", run_cell, report)
