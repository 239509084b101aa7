"""
What docs/first-run.md starts from: a small model, its data and a benchmark, made from a seed on a CPU.

    python examples/first_run.py

The model answers word problems as a careless student does (word_problems.py), having seen little of his homework.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import word_problems as task

BENCHMARK = """\
task: word_problems
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{solution}}}}"
generation_kwargs: {{until: ["?"], max_gen_toks: {canvas}, do_sample: false}}
filter_list: [{{name: stripped, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def right_words(completions: list[str], solution: list[str], **columns) -> list[float]:
    """A reward function: the share of the words of the right answer that stand in their place."""
    rewards = []
    for text, right in zip(completions, solution, strict=True):
        given, wanted = text.split(), right.split()
        in_place = sum(a == b for a, b in zip(given, wanted, strict=False))
        rewards.append(in_place / max(len(given), len(wanted)))
    return rewards


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(folder: Path, steps: int) -> None:
    torch.set_num_threads(1)  # a model of this size is too small to share
    splits, tokenizer, rng = task.make_splits(seed=0), task.make_tokenizer(), random.Random(0)
    model = task.pretrain(tokenizer, splits, seed=0, steps=steps, goal=0.0)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    homework = splits["pretraining"][:2000]
    rows = [{"prompt": f"{p.prompt} ", "completion": task.students_answer(p, rng)} for p in homework]
    write_rows(folder / "homework" / "train.jsonl", rows)
    for name, problems in (("problems", splits["pairs"][:100]), ("benchmark", splits["test"][:100])):
        split = "train" if name == "problems" else "test"
        rows = [{"prompt": problem.prompt, "solution": problem.answer()} for problem in problems]
        write_rows(folder / name / f"{split}.jsonl", rows)
    benchmark = folder / "benchmark"
    text = BENCHMARK.format(rows=(benchmark / "test.jsonl").resolve(), canvas=task.MAX_NEW_TOKENS)
    (benchmark / "word_problems.yaml").write_text(text)
    answers = [f"{problem.prompt} {problem.answer()}" for problem in splits["test"][:20]]
    (folder / "held-out.txt").write_text(" ".join(answers))
    print(f"A model, its data and a benchmark in {folder}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/first-run"))
    parser.add_argument("--steps", type=int, default=300, help="of pre-training")
    options = parser.parse_args()
    main(options.output_dir, options.steps)
