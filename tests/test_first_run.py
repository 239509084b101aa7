"""docs/first-run.md: its commands take their options and read what was written before; and what it starts from."""

import shlex
import sys
from importlib import import_module

import first_run as example
import lm_eval
import whole_way as page
import word_problems as task
from datasets import load_dataset
from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from trl_diffusion.cli.main import COMMANDS
from trl_diffusion.evaluation import harness


def taken(command, monkeypatch):
    """The name of a command and the options that it would take, by its own parser."""
    words = [word for word in shlex.split(command) if not word.startswith("PYTHONPATH=")]
    assert words[0] == "trl-diffusion"
    name, options = words[1], words[2:]
    if name == "lm-eval":
        monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--model", "trl_diffusion", *options])
        arguments = vars(HarnessCLI().parse_args())
        known = {name: value for name, value in arguments["model_args"].items() if name != "pretrained"}
        harness._check(known, arguments["batch_size"], "x", None)
        return name, arguments
    module, attribute, _ = COMMANDS[name]
    parser = getattr(import_module(f"trl_diffusion.cli.{module}"), attribute).parser()
    return name, {k: v for part in parser.parse_args_and_config(options) for k, v in vars(part).items()}


def test_every_command_has_known_options(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    first, *others = page.commands()
    assert first == "python examples/first_run.py"
    names, written = [], {"base", "homework", "problems", "benchmark"}
    for command in others:
        name, options = taken(command, monkeypatch)
        names.append(name)
        model = options.get("model_name_or_path") or options["model_args"]["pretrained"]
        read = [model, options.get("dataset_name") or "runs/first-run/problems"]
        assert {path.removeprefix("runs/first-run/") for path in read} <= written
        written.add(str(options.get("output_dir") or "").removeprefix("runs/first-run/"))
    assert names == ["sft", "sample-pairs", "vrpo", "score", "generate", "lm-eval", "lm-eval"]
    assert [page.named(command) for command in others] == names


def test_what_the_page_starts_from(tmp_path, monkeypatch):
    make_splits = task.make_splits
    monkeypatch.setattr(task, "make_splits", lambda seed: make_splits(seed, 8, 8, 8, pretraining=500))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    example.main(tmp_path, steps=1)
    (problem, *_), homework = (load_dataset(str(tmp_path / name), split="train") for name in ("problems", "homework"))
    assert example.right_words([problem["solution"], "so", ""], [problem["solution"]] * 3) == [1.0, 0.0, 0.0]
    first, *rest = problem["solution"].split()
    assert example.right_words([f"{first} {' '.join('x' * len(rest))}"], [problem["solution"]]) == [1 / (1 + len(rest))]
    assert set(homework.column_names) == {"prompt", "completion"} and len(homework) == 500
    manager = TaskManager(include_path=str(tmp_path / "benchmark"), include_defaults=False)
    lm = get_model("trl_diffusion")(str(tmp_path / "base"), device="cpu", batch_size=4)
    found = lm_eval.evaluate(lm, manager.load(["word_problems"]), bootstrap_iters=0, limit=4)
    assert found["n-samples"]["word_problems"] == {"original": 8, "effective": 4}
    samples = found["samples"]["word_problems"]
    right = [sample["resps"][0][0].split() == sample["doc"]["solution"].split() for sample in samples]
    assert found["results"]["word_problems"]["exact_match,stripped"] == sum(right) / 4
