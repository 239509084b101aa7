"""
What preference optimisation gains on the demo's task, over fresh seeds, next to the obvious alternatives.

    python benchmarks/alignment.py --seeds 0 1 2 3 4 --arms vrpo sft_on_chosen
    python benchmarks/alignment.py --report

Each cell (arm, seed) is one training run on the base model and pairs of that seed, with the settings of the demo and
the changes of the arm. Finished cells are kept in `runs/alignment/results.jsonl` and not run again, so the benchmark
can be stopped and continued. The gain is in percentage points of held-out test problems with every step right.

The estimator is stratified fixed counts; `estimator_accuracy.py` compares estimators. `naive` is DPO with one draw per
ELBO, not shared with the reference: with eight times the steps it uses as many draws as VRPO; `naive_equal_time` gets
as many steps as fit into the wall time that VRPO took.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from peft import PeftModel

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import demo

FIXED_COUNTS = {"mask_scheme": "fixed_count", "control_variate": "none", "couple_pairs": False}
NAIVE = {"num_mc_samples": 1, "share_draws": False}
EQUAL_DRAWS = demo.ALIGNMENT["max_steps"] * demo.ALIGNMENT["num_mc_samples"]
ARMS = {
    "vrpo": {},  # the demo's settings but for the estimator
    "vrpo_no_sft": {"loss_type": ["sigmoid"], "loss_weights": [1.0]},
    "vrpo_sft_1": {"loss_weights": [1.0, 1.0]},
    "vrpo_unshared": {"share_draws": False},
    "sft_on_chosen": {"loss_type": ["sft"], "loss_weights": [1.0]},
    "naive": NAIVE | {"max_steps": EQUAL_DRAWS},
    "naive_equal_time": NAIVE,  # needs the cells `vrpo` and `naive` of the same seed
}
# Two-sided 95% quantiles of Student's t, by degrees of freedom
T_QUANTILE = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def run_cell(root: Path, arm: str, changes: dict, seed: int, done: dict) -> dict:
    """Train with `changes` to the demo's settings, and test."""
    made = demo.prepare(root / f"seed-{seed}", seed)
    if ("base", seed) not in done:
        done["base", seed] = keep(root, {"arm": "base", "seed": seed, **scores(made["model"], made)})
    steps = changes.get("max_steps", demo.ALIGNMENT["max_steps"])
    output = root / f"seed-{seed}" / arm.replace(" ", "_").replace(",", "")
    history = demo.align(root / f"seed-{seed}", output, eval_steps=steps, seed=seed, **changes)
    aligned = PeftModel.from_pretrained(made["model"], output).eval()
    return keep(root, {"arm": arm, "seed": seed, "steps": steps, **scores(aligned, made), **metrics(history)})


def changes_of(arm: str, seed: int, done: dict) -> dict:
    changes = FIXED_COUNTS | ARMS[arm]
    if arm == "naive_equal_time":
        seconds_per_step = done["naive", seed]["seconds"] / EQUAL_DRAWS
        changes["max_steps"] = round(done["vrpo", seed]["seconds"] / seconds_per_step)
    return changes


def scores(model, made) -> dict:
    result = demo.test(model, made["tokenizer"], made["splits"]["test"])
    return {key: 100 * demo.task.share(result[key]) for key in ("right", "plain", "tricky", "final number")}


def metrics(history: list[dict]) -> dict:
    """Rewards on held-out pairs after the last step, and the seconds of training without that evaluation."""
    evaluations = [entry for entry in history if "eval_loss" in entry]
    runtime = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
    rewards = {
        name: evaluations[-1][f"eval_rewards/{name}"] for name in ("accuracies", "margins", "chosen", "rejected")
    }
    return rewards | {"seconds": runtime - sum(entry["eval_runtime"] for entry in evaluations)}


def keep(root: Path, row: dict) -> dict:
    with open(root / "results.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def read(root: Path, cell: str = "arm") -> dict[tuple[str, int], dict]:
    """Finished cells by (`cell`, seed)."""
    path = root / "results.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return {(row[cell], row["seed"]): row for row in rows}


def mean_and_half_width(values: list[float]) -> str:
    """Mean and the half-width of its 95% t-interval."""
    if len(values) < 2:
        return f"{values[0]:+.1f}"
    half = T_QUANTILE[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.1f} ± {half:.1f}"


def report(done: dict, arms=tuple(ARMS)) -> None:
    seeds = sorted({seed for arm, seed in done if arm == "base"})
    print("\nheld-out test problems with every step right, in percent; gains in points with 95% t-intervals")
    print(f"{'arm':<20}" + "".join(f"{f'seed {seed}':>8}" for seed in seeds) + f"{'gain':>15}{'plain':>15}", end="")
    print(f"{'tricky':>15}{'reward acc.':>13}{'steps':>7}{'seconds':>9}")
    for arm in ["base", *arms]:
        rows = {seed: done[arm, seed] for seed in seeds if (arm, seed) in done}
        if not rows:
            continue
        line = f"{arm:<20}" + "".join(f"{rows[s]['right']:8.1f}" if s in rows else f"{'':>8}" for s in seeds)
        if arm != "base":
            for key in ("right", "plain", "tricky"):
                gains = [row[key] - done["base", seed][key] for seed, row in rows.items()]
                line += f"{mean_and_half_width(gains):>15}"
            mean = {key: statistics.mean(row[key] for row in rows.values()) for key in ("accuracies", "seconds")}
            steps = round(statistics.mean(row["steps"] for row in rows.values()))
            line += f"{mean['accuracies']:>13.2f}{steps:>7}{mean['seconds']:>9.0f}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only print what is finished")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    done = read(arguments.output_dir)
    for seed in () if arguments.report else arguments.seeds:
        for arm in sorted(arguments.arms, key=list(ARMS).index):
            done = read(arguments.output_dir)  # another process may be at work on it too
            if (arm, seed) not in done:
                changes = changes_of(arm, seed, done)
                done[arm, seed] = run_cell(arguments.output_dir, arm, changes, seed, done)
                print(json.dumps(done[arm, seed]), flush=True)
    report(done)


if __name__ == "__main__":
    main()
