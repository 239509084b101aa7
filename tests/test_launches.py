"""
Real launches by the shipped configuration files, two processes on the CPU: `accelerate launch` of the examples, and
the command that launches itself.

What a file says is what the cells of test_matrix.py are run with; here is the way from the file to the run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import elbo_kto_lora
import pytest
import torch
import vrpo_lora
from accelerate.commands import launch as accelerate_launch
from conftest import make_model, make_pairs, make_tokenizer
from matrix import BETA, Cell, environment_of
from test_kto import make_feedback

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "accelerate_configs"
LN2 = torch.tensor(2.0).log().item()  # in float32, as a loss is
# By script: its rows, and the loss that it starts at
SCRIPTS = {"vrpo_lora": (vrpo_lora, make_pairs, LN2), "elbo_kto_lora": (elbo_kto_lora, make_feedback, 0.5)}
COMMANDS = {"ddp": "vrpo"}  # by the launch: what is run by `trl-diffusion COMMAND --accelerate_config FILE`
# By the launch: the file, the script, what it is told. DeepSpeed makes one step: the engine that scored the reference
# gathers weights in training too, and more steps take long
LAUNCHES = {
    "ddp": ("multi_gpu", "vrpo_lora", ["--use_peft", "--use_cpu"]),
    "fsdp2": ("fsdp2", "elbo_kto_lora", ["--use_cpu"]),
    "zero3": (
        *("zero3", "vrpo_lora"),
        ["--use_peft", "--precompute_ref_log_probs", "--ddp_backend", "gloo", "--max_steps", "1"],
    ),
}
# By file, the launch in the matrix that it stands for
FILES = {
    "single_gpu": "one",
    "multi_gpu": "ddp",
    "fsdp2": "fsdp2",
    "fsdp2_qlora": "fsdp2",
    "zero2": "zero2",
    "zero3": "zero3",
}
# What the matrix says and a file leaves to others
NOT_OF_A_FILE = ("DS_ACCELERATOR", "FSDP_TRANSFORMER_CLS_TO_WRAP")


def environment_by(config):
    """What the launcher sets for the processes that it starts."""
    parser = accelerate_launch.launch_command_parser()
    given = parser.parse_args(["--config_file", str(CONFIGS / f"{config}.yaml"), "script.py"])
    given, _, _ = accelerate_launch._validate_launch_command(given)
    if given.use_deepspeed:
        given.deepspeed_fields_from_accelerate_config = ""
        return accelerate_launch.prepare_deepspeed_cmd_env(given)[1]
    if given.num_processes > 1:
        return accelerate_launch.prepare_multi_gpu_env(given)
    return accelerate_launch.prepare_simple_launcher_cmd_env(given)[1]


def test_every_shipped_file_is_looked_at():
    assert sorted(FILES) == sorted(path.stem for path in CONFIGS.iterdir())


@pytest.mark.parametrize("config", FILES)
def test_the_matrix_is_set_up_by_the_shipped_files(monkeypatch, config):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the launcher writes into it
    cell = Cell(FILES[config], "vrpo", "all", "copy", "bf16", "path", "on", "llada")
    wanted = {name: str(value) for name, value in environment_of(cell).items() if name not in NOT_OF_A_FILE}
    given = environment_by(config)
    assert {name: given.get(name) for name in wanted} == wanted


def arguments_of(folder, name, *options):
    """Two steps of a script, on four rows each, on as many processes as there are."""
    given = ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "data"), "--max_steps", "2"]
    given += ["--optim", "sgd", "--learning_rate", "1.0", "--beta", str(BETA), "--num_mc_samples", "2"]
    given += ["--logging_steps", "1", "--save_strategy", "no", "--report_to", "none"]
    return [*given, "--output_dir", str(folder / name), *options]


def logged_in(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES)
def test_launched_examples_equal_one_process(folder, launch):
    """
    By the shipped file, in its precision, against the script without a launcher in float32. The start is exact; a step
    later the scores are right to bfloat16's one part in 2^8.
    """
    config, name, options = LAUNCHES[launch]
    script, rows, start = SCRIPTS[name]
    rows(8).to_json(folder / "data" / "train.jsonl")
    one = arguments_of(folder, "one", "--use_cpu", "--bf16", "False", "--per_device_train_batch_size", "4")
    one += [option for option in options if option in ("--use_peft", "--precompute_ref_log_probs")]
    script.main(*script.make_parser().parse_args_and_config(one))
    command = [sys.executable, "-m"]
    if launch in COMMANDS:
        command += ["trl_diffusion.cli.main", COMMANDS[launch], "--accelerate_config", config]
        command += ["--num_processes", "2", "--main_process_port", "0"]
    else:
        command += ["accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
        command += ["--num_processes", "2", "--main_process_port", "0", str(ROOT / "tests" / "launched.py"), launch]
        command += [str(ROOT / "examples" / f"{name}.py")]
    command += arguments_of(folder, "two", *options)
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "tests"))
    environment = {**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command += ["--per_device_train_batch_size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, logged = logged_in(folder / "one"), logged_in(folder / "two")
    assert [entries[0]["loss"] for entries in (expected, logged)] == [start, start]
    scores = sum(abs(value) for key, value in expected[0].items() if key.startswith("logps/"))
    for entry, wanted in zip(logged[1:], expected[1:], strict=False):
        assert entry["loss"] == pytest.approx(wanted["loss"], abs=BETA * scores * 2**-8)
    assert expected[1]["loss"] != start
