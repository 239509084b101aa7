"""VRPO in rounds: each starts from the one before, an interruption changes no number, and bad input."""

import json

import iterative_vrpo
import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset
from processes import run_forked
from safetensors.torch import load_file
from trl import ScriptArguments

from trl_diffusion import DiffusionVRPOTrainer
from trl_diffusion.checks.launch import check_launch_to_use
from trl_diffusion.cli import rounds
from trl_diffusion.cli.main import main

PROMPTS = ["what is one", "say hi", "what is two plus three", "say bye you", "is red green"]
HELD_OUT = ["what is red", "say hi you"]
TRAINING = "--use_cpu --bf16 False --report_to none --max_steps 2 --save_steps 1 --learning_rate 0.05"
SAMPLING = "--num_samples 3 --max_new_tokens 6 --steps 3 --reward_funcs test_rounds.letters"
ROUNDS = "--num_rounds 2 --num_mc_samples 2"
LORA = ("--use_peft", "--lora_r", "4")
KEPT = "rounds-00000.jsonl"


def letters(completions, **kwargs):
    return [float(len(text)) for text in completions]


def letters_after_one(prompts, completions, **kwargs):
    """Nothing to choose between, for all prompts but one."""
    return [float(len(c)) * (p == PROMPTS[0]) for p, c in zip(prompts, completions, strict=True)]


def one_too_few(completions, **kwargs):
    return [0.0 for _ in completions[1:]]


@pytest.fixture
def run(tmp_path):
    """Run the script into a folder."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for split, prompts in {"train": PROMPTS, "test": HELD_OUT}.items():
        Dataset.from_dict({"prompt": prompts}).to_json(tmp_path / "prompts" / f"{split}.jsonl")

    def run_into(name, *more):
        paths = {"model_name_or_path": "model", "dataset_name": "prompts", "output_dir": name}
        given = " ".join(f"--{option} {tmp_path / path}" for option, path in paths.items())
        arguments = [*f"{given} {TRAINING} {SAMPLING} {ROUNDS}".split(), *more]
        iterative_vrpo.main(*iterative_vrpo.make_parser().parse_args_and_config(arguments))
        return tmp_path / name

    return run_into


def kept(folder):
    return {row["number"]: row for row in map(json.loads, (folder / KEPT).read_text().splitlines()[1:])}


def weights_after(folder, number):
    return load_file(folder / f"round-{number}" / "adapter_model.safetensors")


def test_an_interruption_in_the_middle_of_a_round_changes_no_number(run, monkeypatch, capsys):
    """Nor does a reward function that fails. A round starts at its reference, which is the policy of the one before."""
    starts, train, step = [], DiffusionVRPOTrainer.train, torch.optim.AdamW.step

    def watched(trainer, *args, **kwargs):
        inputs = trainer.data_collator([trainer.train_dataset[0]])
        loss = trainer.compute_loss(trainer.model.eval(), inputs).item()
        adapter = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        starts.append((loss, adapter))
        return train(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionVRPOTrainer, "train", watched)
        whole = run("whole", *LORA)
    assert [loss for loss, _ in starts] == [torch.tensor(2.0).log().item()] * 2
    after = weights_after(whole, 1)
    assert all(torch.equal(p, after[n.replace(".default", "")]) for n, p in starts[1][1].items()) and len(after)
    printed = capsys.readouterr().out
    for number, row in kept(whole).items():
        line = f"{number or 'before':<8}{'5 of 5' if number else '':>16}{row['reward']:>36.4f}"
        assert line in printed.splitlines()
    assert f"The model is in {whole / 'round-2'}." in printed

    steps = iter(range(10))

    def killed_in_the_second_round(*args, **kwargs):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("test_rounds.letters", one_too_few)
        with pytest.raises(ValueError, match="`one_too_few` returned 1 rewards for 2 answers.*Answers are kept"):
            run("part", *LORA)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", killed_in_the_second_round)
        run("part", *LORA)
    part = run("part", *LORA)
    assert kept(part) == kept(whole) and next(steps) == 4
    for number in (1, 2):
        theirs = weights_after(whole, number)
        assert all(torch.equal(weight, theirs[name]) for name, weight in weights_after(part, number).items())

    monkeypatch.setattr(rounds, "load_to_use", lambda *_: pytest.fail("a finished round is run again"))
    run("part", *LORA, "--batch_size", "2")
    for other, message in (("lora_dropout", "was '0.05' and is '0.5'"), ("weight_decay", "was '0.0' and is '0.5'")):
        with pytest.raises(ValueError, match=f"is of another run: `{other}` {message}"):
            run("part", *LORA, f"--{other}", "0.5")
    with pytest.raises(ValueError, match="is of another run: `learning_rate` was '0.05' and is '0.1'.*another `output"):
        run("part", *LORA, "--learning_rate", "0.1")


def test_rounds_take_the_next_prompts_and_end_where_there_is_nothing_to_compare(run, capsys):
    """All weights trained, one row a round. What is reported is the mean reward of greedy answers."""
    options = ("--prompts_per_round", "1", "--max_steps", "1", "--reward_funcs", "test_rounds.letters_after_one")
    folder = run("out", *options)
    printed = capsys.readouterr().out
    assert "The rounds end here, as there is nothing left to compare. None of 1 prompts gave a row" in printed
    assert kept(folder)[1] == {"number": 1, "pairs": 1, "prompts": 1, "reward": 0.0} and set(kept(folder)) == {0, 1}
    assert f"The model is in {folder / 'round-1'}." in printed
    held_out = rounds.Rounds.__dict__["_next_prompts"]
    asked = [held_out(_three_of_five(), number)["prompt"] for number in (1, 2)]
    assert asked == [PROMPTS[:3], [*PROMPTS[3:], PROMPTS[0]]]


def _three_of_five():
    """What `_next_prompts` reads."""
    arguments = type("Arguments", (), {"prompts_per_round": 3})
    return type("Some", (), {"arguments": arguments, "prompts": Dataset.from_dict({"prompt": PROMPTS})})


@torch.no_grad()
def test_the_reward_of_held_out_prompts_by_hand(tmp_path):
    model, tokenizer, lengths = make_model(), make_tokenizer(), []
    for prompt in HELD_OUT:
        ids = tokenizer([prompt], return_tensors="pt").input_ids
        answer = model.generate(ids, max_new_tokens=6, steps=3)[0, ids.shape[1] :].tolist()
        words = answer[: next((i for i, token in enumerate(answer) if token in (0, 5)), 6)]
        text = tokenizer.decode(words, skip_special_tokens=True)
        lengths.append(len(f" {text}") if text else 0)
    options = {"output_dir": str(tmp_path), "max_new_tokens": 6, "steps": 3}
    assert rounds.mean_reward(model, tokenizer, HELD_OUT, letters, **options) == sum(lengths) / 2
    given = [lambda completions, **_: [None for _ in completions], lambda completions, **_: [2.0, None]]
    assert rounds.mean_reward(model, tokenizer, HELD_OUT, given, **options) == 2.0
    with pytest.raises(ValueError, match=r"None of the reward functions \['<lambda>'\] applies to any of 2 answers"):
        rounds.mean_reward(model, tokenizer, HELD_OUT, given[:1], **options)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--eval_strategy", "steps", "--eval_steps", "1"], "`--eval_strategy steps` is not for rounds"),
        (["--resume_from_checkpoint", "True"], "`--resume_from_checkpoint True` is not for rounds"),
        (["--dataset_test_split", "validation"], "`--held_out_prompts 100` of the 5 prompts leaves none to train on"),
        (["--dataset_train_split", "trian"], "no split 'trian'"),
        (["--reward_funcs", "acuracy"], "`--reward_funcs acuracy` is not found"),
    ],
    ids=str,
)  # fmt: skip
def test_what_rounds_are_not_for_is_refused_before_a_model_is_loaded(run, monkeypatch, more, message):
    monkeypatch.setattr(rounds, "load_to_use", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(ValueError, match=message):
        run("out", *more)


def test_held_out_prompts_are_not_trained_on(run, tmp_path):
    script_args = ScriptArguments(dataset_name=str(tmp_path / "prompts"))
    script_args.dataset_train_split, script_args.dataset_test_split = "train", "validation"
    assert [some["prompt"] for some in rounds.prompts_of(script_args, 2)] == [PROMPTS[:3], PROMPTS[3:]]
    script_args.dataset_test_split = "test"
    assert [some["prompt"] for some in rounds.prompts_of(script_args, 1)] == [PROMPTS, HELD_OUT[:1]]


def test_fewer_than_one_is_an_error_of_a_line(capsys):
    given = ["--model_name_or_path", "x", "--use_cpu", "--bf16", "False", "--reward_funcs", "accuracy_reward"]
    for name in ("num_rounds", "prompts_per_round", "held_out_prompts"):
        with pytest.raises(SystemExit, match="2"):
            main(["iterative-vrpo", *given, f"--{name}", "0"])
        assert f"`--{name}` must be at least 1, got 0." in capsys.readouterr().err


def test_a_launch_that_shards_weights_is_refused_where_a_model_answers(monkeypatch):
    """Where transformers would fill them on the first process only."""
    check_launch_to_use()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP2 shards the weights.*Launch this with `multi_gpu`"):
        check_launch_to_use()


def rounds_in_a_process(run):
    run("two", *LORA, "--num_rounds", "1", "--max_steps", "1", "--per_device_train_batch_size", "2")


def test_two_processes_share_the_answers_and_the_rows_of_a_round(run, tmp_path):
    """As one process with batches of both."""
    assert run_forked(rounds_in_a_process, run, processes=2, folder=tmp_path) == [0, 0], [
        path.read_text()[-2000:] for path in tmp_path.glob("rank*.log")
    ]
    one = run("one", *LORA, "--num_rounds", "1", "--max_steps", "1", "--per_device_train_batch_size", "4")
    two = tmp_path / "two"
    assert kept(two) == kept(one) and (two / "rounds-00001.jsonl").read_text() == (two / KEPT).read_text()
    expected = weights_after(one, 1)
    for name, weight in weights_after(two, 1).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
