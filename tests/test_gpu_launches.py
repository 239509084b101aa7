"""Launches that need a GPU: NCCL, FSDP2, and DeepSpeed where it is installed. None has passed yet (docs/trust.md)."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_pairs, make_tokenizer

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "accelerate_configs"
TRAINED = {"multi_gpu": ["--use_peft"], "fsdp2": []}
if importlib.util.find_spec("deepspeed") is not None:
    TRAINED |= {"zero2": [], "zero3": []}


def launch(tmp_path, config, processes):
    output = tmp_path / f"{config}-{processes}"
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data")]
    arguments += ["--dtype", "float32", "--bf16", "False", "--report_to", "none", "--max_steps", "3", "--optim", "sgd"]
    arguments += ["--learning_rate", "0.1", "--logging_steps", "1", "--num_mc_samples", "2", *TRAINED[config]]
    arguments += ["--per_device_train_batch_size", str(4 // processes), "--output_dir", str(output)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "vrpo_lora.py"), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.gpu
@pytest.mark.parametrize("config", TRAINED)
def test_launched_on_gpus_equals_one_process_on_one(tmp_path, config):
    """That a configuration starts and trains; and, where there are two GPUs, that two processes are as one."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    make_pairs(12).to_json(tmp_path / "data" / "train.jsonl")
    losses = launch(tmp_path, config, 1)
    assert losses[0] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6) and losses[2] < losses[0]
    if torch.cuda.device_count() > 1:
        assert launch(tmp_path, config, 2) == pytest.approx(losses, rel=1e-4)
