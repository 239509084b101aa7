"""
Training runs on the base models of `demo_starts.py`: a cell is an arm of a comparison and the seed of a start.

Cells are kept in a file as they finish, and not run again.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from counters import machine
from demo_starts import ROOT
from peft import PeftModel

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import demo

Cells = dict[tuple[str, int], dict]


def before_and_after(made: dict, output: Path, problems: list) -> tuple[dict, dict]:
    """Shares of right answers of what `demo.prepare` made, and of it with the adapter in `output`."""
    before = demo.shares(demo.test(made["model"], made["tokenizer"], problems))
    aligned = PeftModel.from_pretrained(made["model"], output).eval()
    return before, demo.shares(demo.test(aligned, made["tokenizer"], problems))


def read(path: Path, name: str) -> Cells:
    """Finished cells by (arm, seed); `name` is what their rows call an arm."""
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return {(row[name], row["seed"]): row for row in rows}


def keep(path: Path, row: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def run_cells(
    description: str,
    arms: Sequence[str],
    seeds: range,
    file: str,
    run_cell: Callable[[Path, str, int], dict],
    report: Callable[[Cells], None],
    name: str = "arm",
    root: Path = ROOT,
) -> None:
    """The command line of a comparison: run what is asked for and not finished, and report all that is."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument(f"--{name}s", dest="arms", nargs="+", choices=list(arms), default=list(arms))
    parser.add_argument("--output_dir", type=Path, default=root)
    parser.add_argument("--report", action="store_true", help="only print what is finished")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / file
    for seed in () if arguments.report else arguments.seeds:
        for arm in sorted(arguments.arms, key=list(arms).index):
            if (arm, seed) not in read(path, name):  # another process may be at work on it too
                keep(path, run_cell(arguments.output_dir, arm, seed))
    report(read(path, name))
    print(machine())
