"""
Does a long run leak? 2,000 steps of a small model with evaluations, checkpoints and three resumes in between.

    python benchmarks/soak.py

Reported are the slope of the resident memory in KiB per 100 steps with its standard error (least squares, each stretch
between two resumes with a level of its own, its first 100 steps left out, in which caches fill), how much it rose from
the end of the first stretch to that of the last, open files, and what is left when the process has ended: children,
and files in its temporary folder.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
EVERY, WARM_UP = 10, 100


def slope(stretches: list[list[tuple[float, float]]]) -> tuple[float, float]:
    """Least-squares slope that the stretches have in common, and its standard error, per 100 steps."""
    centred = []
    for points in stretches:
        mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
        centred += [(x - mean_x, y - mean_y) for x, y in points]
    spread = sum(x * x for x, _ in centred)
    per_step = sum(x * y for x, y in centred) / spread
    residual = sum((y - per_step * x) ** 2 for x, y in centred)
    freedom = len(centred) - len(stretches) - 1
    return 100 * per_step, 100 * (residual / freedom / spread) ** 0.5


def child(folder: Path, steps: int, stretches: int) -> None:
    """Train, with a new trainer that resumes the last one's checkpoint at the start of each stretch."""
    import psutil
    import word_problems as task
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import TrainerCallback

    from trl_diffusion import DiffusionVRPOConfig, DiffusionVRPOTrainer

    disable_progress_bars()
    process, seen = psutil.Process(), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % EVERY == 0:
                gc.collect()
                seen[-1].append((state.global_step, process.memory_info().rss / 1024, process.num_fds()))

    tokenizer = task.make_tokenizer()
    problems = task.make_splits(0, pretraining=1)["pairs"]
    answers = [problem.answer() for problem in problems]
    rows = [
        {"prompt": p.prompt, "chosen": a, "rejected": r}
        for p, a, r in zip(problems[1:], answers[1:], answers, strict=False)
    ]
    rows = [row for row in rows if row["chosen"] != row["rejected"]]
    for i in range(stretches):
        seen.append([])
        end = steps * (i + 1) // stretches
        args = DiffusionVRPOConfig(
            str(folder / "out"), max_steps=end, per_device_train_batch_size=2, num_mc_samples=2, learning_rate=1e-4,
            lr_scheduler_type="constant", eval_strategy="steps", eval_steps=100, save_strategy="steps", save_steps=100,
            save_total_limit=2, logging_steps=50, report_to=[], disable_tqdm=True, bf16=False, use_cpu=True,
        )  # fmt: skip
        trainer = DiffusionVRPOTrainer(
            task.make_model(tokenizer, d_model=64, n_layers=2, mlp_hidden_size=128),
            args=args,
            train_dataset=Dataset.from_list(rows[:400]),
            eval_dataset=Dataset.from_list(rows[400:420]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4),
            callbacks=[Watch()],
        )
        trainer.train(resume_from_checkpoint=i > 0)
    children = [other.name() for other in process.children(recursive=True)]
    checkpoints = sorted(path.name for path in (folder / "out").glob("checkpoint-*"))
    (folder / "result.json").write_text(json.dumps({"seen": seen, "children": children, "checkpoints": checkpoints}))


def main(steps: int, stretches: int) -> dict:
    """Run the child and report."""
    from counters import machine

    with tempfile.TemporaryDirectory() as name:
        folder, temporary = Path(name), Path(name) / "tmp"
        temporary.mkdir()
        command = [sys.executable, __file__, "--child", name, "--steps", str(steps), "--stretches", str(stretches)]
        subprocess.run(command, check=True, env={**os.environ, "TMPDIR": str(temporary)}, stdout=subprocess.DEVNULL)
        result = json.loads((folder / "result.json").read_text())
        left = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*"))
    memory = [[(step, rss) for step, rss, _ in points] for points in result["seen"]]
    settled = [[p for p in points if p[0] > points[0][0] + WARM_UP] for points in memory]
    per_100, error = slope(settled)
    files = [[number for *_, number in points] for points in result["seen"]]
    return {
        "steps": steps,
        "resident memory, KiB per 100 steps": f"{per_100:.1f} +- {error:.1f}",
        "at the end of each stretch, MiB": [round(points[-1][1] / 1024, 1) for points in memory],
        "open files at the end of each stretch": [numbers[-1] for numbers in files],
        "children at the end": result["children"],
        "temporary files after the end": left,
        "checkpoints kept": result["checkpoints"],
        "machine": machine(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--stretches", type=int, default=4)
    parser.add_argument("--child", type=Path, help="used by the script itself")
    given = parser.parse_args()
    if given.child:
        child(given.child, given.steps, given.stretches)
    else:
        for name, value in main(given.steps, given.stretches).items():
            print(f"{name}: {value}")
