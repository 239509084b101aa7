"""
What the demo reaches from one start to the next: other problems, students, models, and roundings.

    python benchmarks/demo_starts.py --seeds 2000 2001 2002
    python benchmarks/demo_starts.py --report

A start is the whole demo, run as its command: pre-training, answers, alignment, test. How sums are rounded decides, in
the end, which base model a seed makes, so that it is another one on another CPU. To have some of that on one machine,
seeds take turns at the instructions that torch uses (`INSTRUCTIONS`). Finished stages are
kept in `runs/demo_starts`: the same command goes on where it was stopped, and `alignment.py` and `kto_baselines.py`
train on the bases that are there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from counters import machine

DEMOS = {"vrpo": "demo.py", "elbo-kto": "demo_kto.py"}
ROOT = Path("runs/demo_starts")
INSTRUCTIONS = ("default", "avx2")  # ATEN_CPU_CAPABILITY, in turns
# Two-sided 95% quantiles of Student's t, by degrees of freedom
T_QUANTILE = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23, 11: 2.20}


def instructions_of(seed: int) -> str:
    return INSTRUCTIONS[seed % len(INSTRUCTIONS)]


def run_start(root: Path, method: str, seed: int) -> None:
    """Run a demo; its output goes to a file."""
    script = Path(__file__).parents[1] / "examples" / DEMOS[method]
    command = [sys.executable, script, "--seed", seed, "--output_dir", root]
    instructions = instructions_of(seed)
    environment = os.environ | ({} if instructions == "default" else {"ATEN_CPU_CAPABILITY": instructions})
    with open(root / f"{method}-{seed}.log", "a") as log:
        subprocess.run(list(map(str, command)), env=environment, stdout=log, stderr=log, check=True)


def results(root: Path, method: str) -> dict[int, dict]:
    """Shares of right answers before and after, in percent, of finished starts by seed."""
    paths = root.glob(f"seed-*/{method}/result.json")
    found = {int(path.parts[-3].removeprefix("seed-")): json.loads(path.read_text()) for path in paths}
    return dict(sorted(found.items()))


def mean_and_half_width(values: list[float]) -> str:
    """Mean and the half-width of its 95% t-interval."""
    if len(values) < 2:
        return f"{values[0]:+.1f}"
    half = T_QUANTILE[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.1f} ± {half:.1f}"


def report(found: dict[int, dict]) -> None:
    print("\n| seed | instructions | every step right | gain | without the two verbs | with them |")
    print("|---|---|---|---|---|---|")
    gains: dict[str, list[float]] = {"right": [], "plain": [], "tricky": []}
    for seed, result in found.items():
        cells = []
        for key, kept in gains.items():
            before, after = (result[when][key] for when in ("before", "after"))
            kept.append(after - before)
            cells += [f"{before:.1f} -> {after:.1f}"] + [f"{kept[-1]:+.1f}"] * (key == "right")
        print(f"| {seed} | {instructions_of(seed)} | {' | '.join(cells)} |")
    for key, kept in gains.items():
        spread = f", standard deviation {statistics.stdev(kept):.1f}" if len(kept) > 1 else ""
        print(f"{key}: {mean_and_half_width(kept)} points over {len(kept)} starts{spread}, worst {min(kept):+.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(2000, 2012)))
    parser.add_argument("--method", choices=list(DEMOS), default="vrpo")
    parser.add_argument("--output_dir", type=Path, default=ROOT)
    parser.add_argument("--report", action="store_true", help="only print what is finished")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = arguments.output_dir
    root.mkdir(parents=True, exist_ok=True)
    for seed in () if arguments.report else arguments.seeds:
        if seed not in results(root, arguments.method):
            run_start(root, arguments.method, seed)
            print(json.dumps({"seed": seed, **results(root, arguments.method)[seed]}), flush=True)
    report(results(root, arguments.method))
    print(machine())


if __name__ == "__main__":
    main()
