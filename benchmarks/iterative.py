"""
Three rounds of VRPO next to one at equal compute: as many answers sampled, and as many forwards in training.

    python benchmarks/iterative.py --seeds 2000 2001
    python benchmarks/iterative.py --report

One round is the demo, on the base models and pairs of the starts of `demo_starts.py`. Three rounds are
`examples/iterative_vrpo.py` on the same base model with the settings of the demo: each has a third of the problems,
answered by the policy so far, and a third of the steps, in which the learning rate rises and falls. Finished cells are
kept in `runs/demo_starts/iterative.jsonl` and not run again, and one that was interrupted goes on. Figures are percent
of held-out problems, those of the test and of the validation split, with every step right.
"""

import json
import statistics
import sys
from pathlib import Path

from cells import before_and_after, run_cells
from demo_starts import mean_and_half_width

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import demo
import iterative_vrpo
from word_problem_rewards import prompts_of

ARMS = {"one round": 1, "three rounds": 3}
SAMPLING = {"num_samples": 4, "max_new_tokens": 16, "steps": 8, "block_length": 4, "batch_size": 50}  # as in the demo
REWARD = {"reward_funcs": "word_problem_rewards.every_step_right", "held_out_prompts": 200}


def run_cell(root: Path, arm: str, seed: int) -> dict:
    """Train, and test."""
    folder, made = root / f"seed-{seed}", demo.prepare(root / f"seed-{seed}", seed)
    if ARMS[arm] == 1:
        output, pairs = folder / demo.VRPO.method.lower(), [len(made["train"]["pairs"])]
        demo.align(folder, output, seed=seed)
    else:
        output, pairs = run_rounds(folder, made["splits"], ARMS[arm], seed)
    problems = made["splits"]["validation"] + made["splits"]["test"]
    before, after = before_and_after(made, output, problems)
    return {"arm": arm, "seed": seed, "before": before, "after": after, "pairs": pairs}


def run_rounds(folder: Path, splits: dict, rounds: int, seed: int) -> tuple[Path, list[int]]:
    """The last model, and the number of pairs of each round."""
    for name, problems in {"train": splits["pairs"], "test": splits["validation"]}.items():
        prompts_of(problems).to_json(folder / "prompts" / f"{name}.jsonl")
    output = folder / "three_rounds"
    options = demo.ALIGNMENT | demo.HOUSEKEEPING | SAMPLING | REWARD
    options |= {"model_name_or_path": folder / "base", "dataset_name": folder / "prompts", "output_dir": output}
    options |= {"num_rounds": rounds, "prompts_per_round": demo.PROBLEMS // rounds, "seed": seed}
    options["max_steps"] = demo.ALIGNMENT["max_steps"] // rounds
    flags = list(map(str, demo.as_flags(options)))
    iterative_vrpo.main(*iterative_vrpo.make_parser().parse_args_and_config(flags))
    kept = [json.loads(line) for line in (output / "rounds-00000.jsonl").read_text().splitlines()[1:]]
    return output / f"round-{rounds}", [row["pairs"] for row in kept[1:]]


def report(done: dict[tuple[str, int], dict]) -> None:
    """Means over starts, and start by start the difference of the arms with 95% t-intervals."""
    print("\n| | starts | every step right | without the two verbs | with them | worst | pairs of a round |")
    print("|---|---|---|---|---|---|---|")
    for arm in ARMS:
        rows = [row for (name, _), row in done.items() if name == arm]
        if not rows:
            continue
        means = {
            key: [statistics.mean(row[when][key] for row in rows) for when in ("before", "after")]
            for key in ("right", "plain", "tricky")
        }
        cells = [arm, len(rows), *("{:.1f} -> {:.1f}".format(*ends) for ends in means.values())]
        cells.append(f"{min(row['after']['right'] for row in rows):.1f}")
        cells.append(
            ", ".join(f"{statistics.mean(some):.0f}" for some in zip(*(row["pairs"] for row in rows), strict=True))
        )
        print("| " + " | ".join(map(str, cells)) + " |")
    one, three = ARMS
    both = [seed for name, seed in done if name == three and (one, seed) in done]
    for key in ("right", "plain", "tricky") if both else ():
        above = [done[three, seed]["after"][key] - done[one, seed]["after"][key] for seed in both]
        print(f"{key}: {three} above {one} by {mean_and_half_width(above)} points over {len(above)} starts")


if __name__ == "__main__":
    run_cells(__doc__, list(ARMS), range(2000, 2008), "iterative.jsonl", run_cell, report)
