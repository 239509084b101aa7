"""
What the estimator is worth in the end: right answers on the demo's task after equal training compute, over fresh seeds.

    python benchmarks/estimator_accuracy.py --seeds 0 1 2 3 4
    python benchmarks/estimator_accuracy.py --report

The first four arms are the ablation of the VRPO paper (arXiv 2505.19223): K in {1, 8}, draws shared with the reference
or not, fixed counts, not stratified. The other two are this package's default estimator. All arms run as many forwards
in training, the demo's, so one with fewer draws takes more steps. Everything else is the demo's too. Finished cells are
kept in `runs/estimator_accuracy/results.jsonl` and not run again.
"""

import argparse
import json
from pathlib import Path

import alignment
import torch

# The demo's own budget: policy forwards in training, per pair of a batch and response
FORWARDS = alignment.demo.ALIGNMENT["max_steps"] * alignment.demo.ALIGNMENT["num_mc_samples"]
PAPER = {"mask_scheme": "fixed_count", "stratify": False, "control_variate": "none", "couple_pairs": False}
VRPO = "K=8, shared (VRPO)"
ARMS = {
    "K=1, not shared": PAPER | {"num_mc_samples": 1, "share_draws": False},
    "K=1, shared": PAPER | {"num_mc_samples": 1},
    "K=8, not shared": PAPER | {"num_mc_samples": 8, "share_draws": False},
    VRPO: PAPER | {"num_mc_samples": 8},
    "default, K=4": {"num_mc_samples": 4},
    "default, K=8": {"num_mc_samples": 8},
}


def report_differences(done: dict) -> None:
    """Seed by seed, which takes out what the seeds' base models and pairs are worth."""
    print(f"\npoints above {VRPO!r} of the same seed, with 95% t-intervals")
    for arm in ARMS:
        seeds = [seed for name, seed in done if name == arm and (VRPO, seed) in done]
        if arm != VRPO and seeds:
            points = [done[arm, seed]["right"] - done[VRPO, seed]["right"] for seed in seeds]
            print(f"{arm:<20}{alignment.mean_and_half_width(points):>15}  ({len(seeds)} seeds)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/estimator_accuracy"))
    parser.add_argument("--report", action="store_true", help="only print what is finished")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = arguments.output_dir
    root.mkdir(parents=True, exist_ok=True)
    arms = {name: options | {"max_steps": FORWARDS // options["num_mc_samples"]} for name, options in ARMS.items()}
    for seed in () if arguments.report else arguments.seeds:
        for arm in sorted(arguments.arms, key=list(arms).index):
            done = alignment.read(root)  # another process may be at work on it too
            if (arm, seed) not in done:
                print(json.dumps(alignment.run_cell(root, arm, arms[arm], seed, done)), flush=True)
    done = alignment.read(root)
    alignment.report(done, arms)
    report_differences(done)


if __name__ == "__main__":
    main()
