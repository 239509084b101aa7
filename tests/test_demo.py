"""The demos end to end, with a model that has learnt nothing: what they keep, what they print, and where they go on."""

import importlib
import json

import cells
import demo
import demo_kto
import demo_report
import pytest
import word_problems as task
from datasets import Dataset
from peft import LoraConfig, get_peft_model

TOY = {"d_model": 16, "n_layers": 1, "mlp_hidden_size": 16, "steps": 2, "goal": 0.0}


def marked_answers(sample, model, tokenizer, problems, *_, **__):
    """In the place of sampling: a right and a wrong answer to each problem, since the model has none that is right."""
    return Dataset.from_list(
        [
            {"prompt": problem.prompt, "completion": f" {text}", "label": task.is_right(problem, text)}
            for problem in problems
            for text in (problem.answer(), "so 1")
        ]
    )


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MODEL", TOY)
    monkeypatch.setattr(demo, "PROBLEMS", 8)
    monkeypatch.setattr(demo, "HELD_OUT", 4)
    monkeypatch.setattr(demo, "HOUSEKEEPING", demo.HOUSEKEEPING | {"max_steps": 1, "logging_steps": 1})
    monkeypatch.setattr(demo, "EVALUATION", demo.EVALUATION | {"eval_steps": 1})
    monkeypatch.setattr(demo.task, "in_two_processes", marked_answers)
    make_splits = task.make_splits
    monkeypatch.setattr(task, "make_splits", lambda *args, **sizes: make_splits(*args, **sizes, pretraining=500))
    monkeypatch.setattr("sys.argv", ["demo.py", "--output_dir", str(tmp_path)])
    return tmp_path


def run_here(script, options, log, done):
    """In the place of a process of its own, which the other demo has: importing all again takes longer than the run."""
    module = importlib.import_module(script.removesuffix(".py"))
    flags = list(map(str, demo.as_flags(options)))
    module.main(*module.make_parser().parse_args_and_config(flags, fail_with_unknown_args=True))


@pytest.mark.parametrize("act", [demo.VRPO, demo_kto.ELBO_KTO], ids=lambda act: act.method)
def test_a_demo_runs_through_and_a_rerun_trains_nothing_again(toy, capsys, monkeypatch, act):
    if act is not demo.VRPO:
        monkeypatch.setattr(demo, "run_script", run_here)
    demo.run(act, "")
    printed = capsys.readouterr().out
    output = toy / "seed-0" / act.method.lower()
    result = json.loads((output / "result.json").read_text())
    for when in ("before", "after"):
        assert set(result[when]) == {"right", "plain", "tricky", "final number"}
    assert (toy / f"{act.method.lower()}.png").exists()
    assert f"{act.method} is to cure it" in printed and "None" not in printed
    assert "Nothing was gained: +0.0 points" in printed  # after one step at a learning rate that warms up
    rest = printed[printed.index("Next: ") :]
    assert str(output) in rest and f"{act.method.lower()}.png" in rest

    for module, name in ((task, "pretrain"), (demo, "run_script"), (task, "in_two_processes")):
        monkeypatch.setattr(module, name, lambda *args, name=name, **kwargs: pytest.fail(f"{name} ran again"))
    demo.run(act, "")
    assert json.loads((output / "result.json").read_text()) == result


def test_an_interrupted_demo_says_what_is_kept_and_goes_on_there(toy, capsys, monkeypatch):
    begun = []

    def interrupt(script, options, log, done):
        begun.append((options.get("resume_from_checkpoint"), done))
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_script", interrupt)
    with pytest.raises(SystemExit, match="130"):
        demo.run(demo.VRPO, "")
    assert "the same command goes on" in capsys.readouterr().out
    assert (toy / "seed-0" / "pairs" / "train.jsonl").exists()
    (toy / "seed-0" / "vrpo" / "checkpoint-1").mkdir()
    with pytest.raises(SystemExit, match="130"):
        demo.run(demo.VRPO, "")
    assert begun == [(None, 0), (True, 1)]


def test_pairs_are_a_right_and_a_wrong_answer_to_one_prompt():
    marks = [("a", "1", False), ("a", "2", True), ("a", "3", True), ("b", "1", True), ("c", "1", False)]
    rows = [{"prompt": prompt, "completion": text, "label": label} for prompt, text, label in marks]
    assert list(task.pair_up(Dataset.from_list(rows))) == [{"prompt": "a", "chosen": "2", "rejected": "1"}]


@pytest.mark.parametrize(
    "before, after, says",
    [(40, 95, "(nearly) gone: +55.0"), (40, 50, "weaker: +10.0"), (40, 40, "Nothing was gained"), (40, 5, "got worse")],
)
def test_the_verdict_says_what_came_out(before, after, says):
    shares = [{"right": [i < n for i in range(100)], "plain": [True]} for n in (before, after)]
    assert says in demo_report.verdict(*shares)
    forgotten = [shares[0], shares[1] | {"plain": [False]}]
    assert "forgot some sums: -100.0" in demo_report.verdict(*forgotten)


@pytest.mark.parametrize("solved, kept", [(0.5, False), (0.85, True), (1.0, True)])
def test_a_student_model_need_not_reach_the_goal_but_has_to_calculate(monkeypatch, solved, kept):
    splits = task.make_splits(0, test=1, validation=40, pairs=1, pretraining=50)
    right = {problem.prompt: problem.answer() for problem in splits["validation"]}
    rounds = []
    monkeypatch.setattr(task, "train", lambda model, loss_of, steps, boldness: rounds.append((steps, boldness)))
    monkeypatch.setattr(
        task, "answer", lambda model, tokenizer, prompts, **_: [
            right[prompt] if i < solved * len(prompts) else "so 1" for i, prompt in enumerate(prompts)
        ],
    )  # fmt: skip

    def pretrain():
        return task.pretrain(task.make_tokenizer(), splits, 0, steps=8, goal=0.95, d_model=16, n_layers=1)

    if kept:
        assert not pretrain().training
    else:
        with pytest.raises(RuntimeError, match=r"answers only 5\d% of the plain problems"):
            pretrain()
    assert rounds == [(8, 1.0), (4, 0.5), (2, 0.25)][: 1 if solved == 1 else 3]


def test_the_base_of_a_comparison_is_tested_without_the_adapter(tmp_path, monkeypatch):
    """An adapter is put into the layers of the model that it is loaded on."""
    tokenizer = task.make_tokenizer()
    model = task.make_model(tokenizer, d_model=16, n_layers=1, mlp_hidden_size=16)
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    made = {"model": task.LLaDAModelLM.from_pretrained(tmp_path / "base").eval(), "tokenizer": tokenizer}
    problem = next(iter(task.make_splits(0, test=1, validation=1, pairs=1, pretraining=1)["test"]))
    ids = tokenizer(problem.prompt, return_tensors="pt")["input_ids"]
    expected = [each.eval()(input_ids=ids).logits for each in (made["model"], adapted)]
    assert not expected[0].equal(expected[1])
    monkeypatch.setattr(demo, "test", lambda model, *_: model(input_ids=ids).logits)
    monkeypatch.setattr(demo, "shares", lambda tested: tested)
    found = cells.before_and_after(made, tmp_path / "adapter", [problem])
    assert [one.equal(other) for one, other in zip(found, expected, strict=True)] == [True, True]
