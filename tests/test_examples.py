"""The scripts do what their headers say, on a model that is made in a second."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from argparse import SUPPRESS
from pathlib import Path

import elbo_kto_lora
import embedded_default
import iterative_vrpo
import llada_8b
import pytest
import vrpo_lora
import word_problem_rewards
import word_problems as task
from conftest import make_model, make_pairs, make_tokenizer
from peft import LoraConfig
from test_kto import make_feedback
from transformers import TrainingArguments

from trl_diffusion.checks.options import REFUSED
from trl_diffusion.cli.parser import _MOST_USED
from trl_diffusion.trainers.arguments import ELBOArguments

SCRIPTS = {"vrpo_lora": (vrpo_lora, make_pairs), "elbo_kto_lora": (elbo_kto_lora, make_feedback)}


@pytest.fixture
def checkpoint(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_train_and_save(tmp_path, checkpoint, name):
    """LoRA by the command line, with evaluation; the options may stand in a YAML file."""
    script, rows = SCRIPTS[name]
    for split in ("train", "test"):
        rows(8).to_json(tmp_path / "data" / f"{split}.jsonl")
    (tmp_path / "run.yaml").write_text("max_steps: 2\neval_strategy: steps\neval_steps: 2\nnum_mc_samples: 2\n")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--model_name_or_path", str(checkpoint), "--use_peft"]
    arguments += ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    arguments += ["--bf16", "False", "--use_cpu", "--report_to", "none"]
    script.main(*script.make_parser().parse_args_and_config(arguments))
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["target_modules"].endswith("(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)")
    logged = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logged if "eval_loss" in entry] == [2]


def refused(capsys, name, *arguments):
    """The line with which a script ends on these options, before anything is loaded."""
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(name).make_parser().parse_args_and_config(["--use_cpu", "--bf16", "False", *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", [*SCRIPTS, "diagnose_variance"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_mc_sample", "3"], "`--num_mc_sample` is not an option. Did you mean `--num_mc_samples`?"),
        (["--num-mc-sampels=3"], "`--num-mc-sampels` is not an option. Did you mean `--num_mc_samples`?"),
        (["--zzzzz"], "`--zzzzz` is not an option. `--help` lists the options."),
        (["model"], "`model` is not an option. `--help` lists the options."),
        (["--config", "run.yaml"], "`--control_variates` in the YAML file is not an option. Did you mean `--control_v"),
        (["--config=run.yaml"], "`--control_variates` in the YAML file is not an option. Did you mean `--control_v"),
        (["--config", "none.yaml"], "No such file or directory: 'none.yaml'"),
        (["--config", "broken.yaml"], "expected"),
        (["--config"], "`--config` needs a YAML file after it."),
        (["--num_mc_samples", "0"], "`num_mc_samples`"),
        (["--mask_scheme", "gaussian"], "invalid choice: 'gaussian'"),
        ([], "`--model_name_or_path` is missing: give a folder"),
    ],
    ids=str,
)
def test_wrong_options_are_named(tmp_path, monkeypatch, capsys, name, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("control_variates: none\n")
    (tmp_path / "broken.yaml").write_text("beta: [1\n")
    assert message in refused(capsys, name, *arguments)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_quantised_weights_need_an_adapter(tmp_path, capsys, name, option):
    arguments = ["--model_name_or_path", "x", f"--{option}"]
    assert f"`--{option}` makes weights that cannot be trained. Add `--use_peft`" in refused(capsys, name, *arguments)
    arguments += ["--use_cpu", "--bf16", "False", "--per_device_train_batch_size", "4"]
    importlib.import_module(name).make_parser().parse_args_and_config([*arguments, "--use_peft"])
    importlib.import_module("diagnose_variance").make_parser().parse_args_and_config(arguments)
    LoraConfig(base_model_name_or_path="base").save_pretrained(tmp_path)  # one that is there is trained on
    arguments[1] = str(tmp_path)
    importlib.import_module(name).make_parser().parse_args_and_config(arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Give a dataset: `--dataset_name`"),
        (["trian"], r"no split 'trian' \(`--dataset_train_split`\), .*Did you mean `--dataset_train_split train`"),
        (["train", "--eval_strategy", "steps", "--eval_steps", "1"], r"no split 'test' \(`--dataset_test_split`\), .*"
         "Name one of them with `--dataset_test_split`. Without `--eval_strategy` none is needed"),
    ],
    ids=str,
)  # fmt: skip
def test_missing_data_is_named(tmp_path, arguments, message):
    """Before a model is loaded: there is none."""
    make_pairs(2).to_json(tmp_path / "data" / "train.jsonl")
    if arguments:
        arguments = ["--dataset_name", str(tmp_path / "data"), "--dataset_train_split", *arguments]
    arguments += ["--output_dir", str(tmp_path), "--model_name_or_path", "none", "--use_cpu", "--bf16", "False"]
    with pytest.raises(ValueError, match=message):
        vrpo_lora.main(*vrpo_lora.make_parser().parse_args_and_config(arguments))


@pytest.mark.parametrize("name", [*SCRIPTS, "diagnose_variance"])
def test_help_has_our_options_first_and_each_option_once(name):
    """Those of transformers only where all are asked for, but for the most used; what is refused is not offered."""
    parser = importlib.import_module(name).make_parser()
    texts = parser.format_help(), parser.format_help(everything=True)
    for text in texts:
        titles = re.findall(r"^(\w.*):$", text, re.MULTILINE)
        assert titles == [
            *("Of this package", "Model and adapter (TRL)", "Data (TRL)"),
            *("Trainer (TRL)", "Training (transformers)"),
        ]
    short, everything = (re.findall(r"^  --([\w-]+)", text, re.MULTILINE) for text in texts)
    assert len(set(everything)) == len(everything)
    assert set(everything) == {action.dest for action in parser._actions} - {"help", SUPPRESS} - {*REFUSED} | {
        "help-all"
    }
    assert [option for option in everything if option in short] == short
    of_transformers = {field.name for field in dataclasses.fields(TrainingArguments)} - {*REFUSED}
    assert set(short) == set(everything) - of_transformers | {*_MOST_USED}
    ours = texts[0][: texts[0].index("Model and adapter (TRL):")]
    for option in {field.name for field in dataclasses.fields(ELBOArguments)}:
        assert f"\n  --{option} " in ours
    assert "--learning_rate" not in ours and "--beta" not in ours and "--dtype" not in ours


@pytest.mark.parametrize("option", ["--help", "--help-all"])
def test_help_is_printed(capsys, option):
    with pytest.raises(SystemExit, match="0"):
        vrpo_lora.make_parser().parse_args_and_config([option])
    printed = capsys.readouterr().out
    assert "`--help-all` lists all." in " ".join(printed.split())
    assert ("--adam_beta1 X" in printed) == (option == "--help-all") and "--num_mc_samples N" in printed


@pytest.mark.parametrize("quantised, dtype", [(True, "bfloat16"), (False, "float32")])
def test_precision_follows_the_quantisation(tmp_path, quantised, dtype):
    arguments = ["--output_dir", str(tmp_path), "--model_name_or_path", "x", "--use_cpu", "--bf16", "False"]
    arguments += ["--load_in_4bit", "--use_peft"] if quantised else []
    for more, expected in (([], dtype), (["--dtype", "auto"], "auto")):
        *_, model_args, _ = vrpo_lora.make_parser().parse_args_and_config([*arguments, *more])
        assert model_args.dtype == expected


def test_a_start_prints_no_notice_that_no_user_can_do_anything_about(tmp_path, checkpoint):
    """As a command, with layer checkpointing, which is on by default, and an adapter."""
    make_pairs(4).to_json(tmp_path / "data" / "train.jsonl")
    script = Path(vrpo_lora.__file__)
    result = subprocess.run(
        [
            *(sys.executable, str(script), "--model_name_or_path", str(checkpoint)),
            *("--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--use_peft"),
            *("--max_steps", "1", "--bf16", "False", "--use_cpu", "--report_to", "none"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Training completed." in result.stdout
    for notice in ("FutureWarning", "UserWarning", "gemm_4bit_forward", "deprecated"):
        assert notice not in result.stderr


def test_the_embedded_default_is_a_run_of_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(embedded_default, "PRETRAINING_STEPS", 3)
    monkeypatch.setattr(embedded_default, "NUM_PROBLEMS", {"train": 8, "test": 4})
    arguments = embedded_default.embedded_arguments(thumbs=True)
    elbo_kto_lora.main(*elbo_kto_lora.make_parser().parse_args_and_config([*arguments, "--max_steps", "1"]))
    assert (tmp_path / embedded_default.FOLDER / "from-thumbs" / "adapter_model.safetensors").exists()


def test_the_embedded_default_of_rounds(tmp_path, monkeypatch):
    """A model that has learnt nothing has no right answer: another reward tells its answers apart."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(embedded_default, "PRETRAINING_STEPS", 3)
    monkeypatch.setattr(embedded_default, "NUM_PROMPTS", {"train": 8, "test": 4})
    more = ["--max_steps", "1", "--num_rounds", "1", "--reward_funcs", "test_rounds.letters"]
    arguments = iterative_vrpo.make_parser().parse_args_and_config([*embedded_default.embedded_rounds(), *more])
    iterative_vrpo.main(*arguments)
    assert (tmp_path / embedded_default.FOLDER / "from-prompts" / "round-1" / "adapter_model.safetensors").exists()


def test_splits_do_not_leak():
    """No problem is met twice under another name: content is numbers and verbs."""
    splits = task.make_splits(seed=5, pretraining=3000)
    contents = {name: {problem.content for problem in problems} for name, problems in splits.items()}
    names = list(contents)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not contents[first] & contents[second]
    for name in ("test", "validation", "pairs"):
        assert len(contents[name]) == len(splits[name])


def test_answers_are_judged_by_every_step():
    problem = task.Problem("Ben", "coins", 14, (("borrows", 5), ("sells", 3)))
    assert problem.answer() == "14 + 5 = 19 ; 19 - 3 = 16 ; so 16"
    assert task.is_right(problem, "14 + 5 = 19 ; 19 - 3 = 16 ; so 16")
    lucky = "14 - 5 = 19 ; 19 - 3 = 16 ; so 16"
    assert not task.is_right(problem, lucky) and task.is_final_number_right(problem, lucky)
    (row,) = word_problem_rewards.prompts_of([problem])
    answers = {"completions": [f" {problem.answer()}", lucky, ""], "prompts": [row["prompt"]] * 3}
    assert word_problem_rewards.every_step_right(**answers, answer=[row["answer"]] * 3) == [1.0, 0.0, 0.0]


def test_the_8b_benchmark_has_the_lengths_it_says():
    from trl_diffusion import LLaDAConfig

    tokenizer = llada_8b.make_tokenizer(LLaDAConfig(**llada_8b.TINY))
    (row,) = llada_8b.make_pairs(1)
    assert len(tokenizer(row["prompt"])["input_ids"]) == llada_8b.PROMPT_TOKENS
    for name in ("chosen", "rejected"):
        ids = tokenizer(row["prompt"] + row[name] + tokenizer.eos_token)["input_ids"]
        assert len(ids) == llada_8b.PROMPT_TOKENS + llada_8b.RESPONSE_TOKENS
