"""
The second act of `demo.py`: the same small model, aligned with ELBO-KTO from thumbs instead of pairs.

1. take the pre-trained model of `demo.py`, or make it;
2. let it answer each problem twice, and mark every answer as right or wrong: no pairs, and no answer but its own;
3. align it on the marked answers: `elbo_kto_lora.py`, which is the script for real models too;
4. answer held-out problems before and after.
"""

from functools import partial
from pathlib import Path

import demo
import demo_report as report
import word_problems as task
from peft import PeftModel

# Tuned on validation problems of other starts, then frozen
ALIGNMENT = demo.ALIGNMENT | {
    "loss_type": "kto",
    "batch_composition": "balanced",
    "beta": 0.3,
    "learning_rate": 1.5e-3,
}
ALIGNMENT.pop("loss_weights")


def prepare(folder: Path, seed: int) -> dict:
    """The base model of the first act, and its marked answers."""
    made = demo.prepare(folder, seed)
    for name, problems in {"train": made["splits"]["pairs"], "test": made["splits"]["test"][:100]}.items():
        model, tokenizer = made["model"], made["tokenizer"]
        make = partial(task.sample_in_two_processes, task.sample_thumbs, model, tokenizer, problems, seed + 1)
        demo.keep_rows(folder / "thumbs" / f"{name}.jsonl", make)
    return made


def align(folder: Path, output: Path, **changes) -> list[dict]:
    """Run the ELBO-KTO script on the marked answers; returns what the trainer logged."""
    return demo.align(folder, output, script="elbo_kto_lora.py", data="thumbs", settings=ALIGNMENT, **changes)


def main() -> None:
    arguments = demo.read_arguments(__doc__)
    folder = arguments.output_dir / f"seed-{arguments.seed}"
    print(demo.INTRODUCTION.replace("VRPO", "ELBO-KTO").replace(", margin and reward accuracy", " and margin"))
    with demo.stage("1-2. The model of `make demo`, and its own answers with a mark on each"):
        made = prepare(folder, arguments.seed)
    tokenizer, problems = made["tokenizer"], made["splits"]["test"]
    print(f"   {demo.count_lines(folder / 'thumbs' / 'train.jsonl')} marked answers to train on, for instance")
    report.print_row(folder / "thumbs" / "train.jsonl", ("prompt", "completion", "label"))
    with demo.stage(f"3. Answer {len(problems)} held-out problems"):
        before = demo.test(made["model"], tokenizer, problems)
    with demo.stage("4. Align with ELBO-KTO: examples/elbo_kto_lora.py"):
        history = align(folder, folder / "elbo-kto", seed=arguments.seed)
    with demo.stage("5. Answer the same problems"):
        aligned = PeftModel.from_pretrained(made["model"], folder / "elbo-kto").eval()
        after = demo.test(aligned, tokenizer, problems)
    report.print_answers(before, after)
    report.print_examples(problems, before, after)
    report.plot(history, before, after, arguments.output_dir / "demo-kto.png")
    print("\n" + report.verdict(before, after))
    print(
        f"\nNext: look at {arguments.output_dir / 'demo-kto.png'}; docs/elbo-kto-trainer.md says what the options do."
        f"\nThe adapter is in {folder / 'elbo-kto'}."
    )


if __name__ == "__main__":
    demo.interruptible(main)
