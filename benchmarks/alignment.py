"""
The demo next to the obvious alternatives, and with other estimators: right answers after equal training compute.

    python benchmarks/alignment.py --seeds 2000 2001 --arms "SFT on the chosen answers" "K=8"
    python benchmarks/alignment.py --report

Each cell (arm, seed) is one training run on the base model and the pairs of a start of `demo_starts.py`, with the
settings of the demo and the changes of the arm. All arms run as many forwards of the policy as the demo, so one with
fewer draws takes more steps. Finished cells are kept in `runs/demo_starts/alignment.jsonl` and not run again. Gains are
in percentage points of held-out test problems with every step right; arms are compared with the demo start by start,
which takes out what the starts are worth.
"""

import re
import statistics
import sys
from pathlib import Path

from cells import before_and_after, run_cells
from demo_starts import mean_and_half_width

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import demo

# Policy forwards in training, per response of a batch
FORWARDS = demo.ALIGNMENT["max_steps"] * demo.ALIGNMENT["num_mc_samples"]
PAPER = {"mask_scheme": "fixed_count", "stratify": False, "control_variate": "none", "couple_pairs": False}
DEMO = "the demo"
ARMS = {
    DEMO: {},
    "no SFT term": {"loss_type": ["sigmoid"], "loss_weights": [1.0]},
    "SFT weight 0.05, the paper's": {"loss_weights": [1.0, 0.05]},
    "SFT on the chosen answers": {"loss_type": ["sft"], "loss_weights": [1.0]},
    "K=1": {"num_mc_samples": 1},
    "K=2": {"num_mc_samples": 2},
    "K=8": {"num_mc_samples": 8},
    "K=4, not shared": {"share_draws": False},
    "the paper's estimator, K=4": PAPER | {"num_mc_samples": 4},
    "the paper's estimator, K=8": PAPER | {"num_mc_samples": 8},
    "naive DPO: K=1, not shared": PAPER | {"num_mc_samples": 1, "share_draws": False},
}


def run_cell(root: Path, arm: str, seed: int) -> dict:
    """Train with the changes of an arm, and test."""
    folder = root / f"seed-{seed}"
    made = demo.prepare(folder, seed)
    steps = FORWARDS // ARMS[arm].get("num_mc_samples", demo.ALIGNMENT["num_mc_samples"])
    output = folder / ("vrpo" if arm == DEMO else re.sub(r"\W+", "_", arm).strip("_"))
    changes = {} if arm == DEMO else ARMS[arm] | {"max_steps": steps, "eval_steps": steps}
    history = demo.align(folder, output, seed=seed, **changes)
    before, after = before_and_after(made, output, made["splits"]["test"])
    runtime = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
    return {"arm": arm, "seed": seed, "steps": steps, "before": before, "after": after, "seconds": runtime}


def report(done: dict[tuple[str, int], dict]) -> None:
    """Gains, and start by start the difference to the baseline, with 95% t-intervals."""
    print(f"\n| | starts | steps | every step right | gain | worst | without the two verbs | above {DEMO} |")
    print("|---|---|---|---|---|---|---|---|")
    for arm in ARMS:
        rows = {seed: row for (name, seed), row in done.items() if name == arm}
        if not rows:
            continue
        gains = {key: [row["after"][key] - row["before"][key] for row in rows.values()] for key in ("right", "plain")}
        ends = [statistics.mean(row[when]["right"] for row in rows.values()) for when in ("before", "after")]
        above = [
            row["after"]["right"] - done[DEMO, seed]["after"]["right"]
            for seed, row in rows.items()
            if (DEMO, seed) in done and arm != DEMO
        ]
        cells = [arm, len(rows), next(iter(rows.values()))["steps"], "{:.1f} -> {:.1f}".format(*ends)]
        cells += [mean_and_half_width(gains["right"]), f"{min(gains['right']):+.1f}"]
        cells += [mean_and_half_width(gains["plain"]), mean_and_half_width(above) if above else ""]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    run_cells(__doc__, list(ARMS), range(2000, 2008), "alignment.jsonl", run_cell, report)
