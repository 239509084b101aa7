"""The command `trl-diffusion`: what it says of itself, what it refuses, and a newcomer's whole way."""

import json
import shlex
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import AutoModelForCausalLM

from trl_diffusion.cli import launch
from trl_diffusion.cli import main as cli
from trl_diffusion.cli.main import COMMANDS, main

ON_THE_CPU = ["--bf16", "False", "--use_cpu"]


def command(name):
    module, attribute, _ = COMMANDS[name]
    return getattr(import_module(f"trl_diffusion.cli.{module}"), attribute)


def length(completions, **kwargs):
    """A reward function that tests name by its import path."""
    return [len(text) for text in completions]


@pytest.fixture
def checkpoint(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_it_says_what_there_is(capsys, arguments):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in (*COMMANDS, "lm-eval")) and "usage: trl-diffusion COMMAND" in text


def test_a_command_that_is_none(capsys):
    assert main(["vrop"]) == 2
    assert capsys.readouterr().err == "trl-diffusion: error: `vrop` is not a command. Did you mean `vrpo`?\n"
    assert main(["zzz"]) == 2
    assert "The commands are sft, sample-pairs," in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself(capsys, tmp_path, monkeypatch, name):
    """Without options: with an example whose options it has, and its defaults."""
    monkeypatch.chdir(tmp_path)
    assert main([name]) == 0
    text = capsys.readouterr().out
    assert f"    trl-diffusion {name} " in text and "Unless you say otherwise:" in text
    options = shlex.split(command(name).example.replace("\\\n", " "))
    more = ["--per_device_train_batch_size", "4"] if name == "elbo-kto" else []
    trains = name in ("sft", "vrpo", "iterative-vrpo", "elbo-kto", "diagnose")
    command(name).parser().parse_args_and_config([*options, *more, *(ON_THE_CPU if trains else [])])


@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_options_are_refused_with_the_nearest(capsys, name):
    with pytest.raises(SystemExit, match="2"):
        main([name, "--model_name_or_pth", "x"])
    error = capsys.readouterr().err
    assert (
        f"trl-diffusion {name}: error: `--model_name_or_pth` is not an option. Did you mean `--model_name_or_path`?"
        in error
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_grouped(capsys, name):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert text.index("Of this package:") < text.index("Model and adapter (TRL):")
    assert f"usage: trl-diffusion {name} [--config FILE.yaml]" in " ".join(text.split())


def test_a_newcomers_way(tmp_path, capsys, checkpoint):
    """sft -> sample-pairs -> vrpo -> merge -> score -> generate, each from what the one before it has written."""
    rows = {
        "prompt": [f"what is {word} " for word in ("one", "two", "three")],
        "completion": ["one", "two plus", "six"],
    }
    for split in ("train", "test"):
        Dataset.from_dict(rows).to_json(tmp_path / "data" / f"{split}.jsonl")
    common = ["--per_device_train_batch_size", "2", "--max_steps", "2", "--report_to", "none", *ON_THE_CPU]
    steps = {
        "sft": ["--model_name_or_path", checkpoint, "--dataset_name", tmp_path / "data", "--eos_padding", "4", *common],
        "sample-pairs": ["--model_name_or_path", tmp_path / "sft", "--dataset_name", tmp_path / "data"]
        + ["--reward_funcs", "test_cli.length", "--max_new_tokens", "6", "--use_cpu"],
        "vrpo": ["--model_name_or_path", tmp_path / "sft", "--dataset_name", tmp_path / "sample-pairs"]
        + ["--use_peft", "--learning_rate", "1e-2", *common],
        "merge": ["--model_name_or_path", tmp_path / "vrpo"],
        "score": ["--model_name_or_path", tmp_path / "merge", "--dataset_name", tmp_path / "data", "--use_cpu"]
        + ["--num_mc_samples", "4"],
    }
    for name, options in steps.items():
        assert main([name, *map(str, options), "--output_dir", str(tmp_path / name)]) == 0, name
    said = capsys.readouterr().out
    assert "rows of 3 prompts" in said and "Merged model in" in said and "perplexity per token" in said
    assert json.loads((tmp_path / "sample-pairs" / "provenance.json").read_text())["reward_functions"] == {
        "length": 1.0
    }
    options = ["--model_name_or_path", str(tmp_path / "merge"), "--max_new_tokens", "4", "--use_cpu"]
    assert main(["generate", *options, "--prompts", "say hi", "what is one"]) == 0
    assert capsys.readouterr().out.startswith("> say hi\n")

    ids = torch.tensor([make_tokenizer()("what is one")["input_ids"]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merge")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    adapted = PeftModel.from_pretrained(base, tmp_path / "vrpo").eval()
    torch.testing.assert_close(merged.eval()(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["merge", "--model_name_or_path", "MODEL"], "is no adapter, so there is nothing to merge"),
        (["merge", "--model_name_or_path", "MODEL", "--load_in_4bit"], "Merging into quantised weights"),
        (["generate", "--model_name_or_path", "MODEL", "--use_cpu", "--prompts", "hi", "--steps", "0"], "`steps`"),
        (["score", "--model_name_or_path", "MODEL", "--use_cpu"], "`--dataset_name` is missing"),
        (["score", "--model_name_or_path", "MODEL", "--text_files", "none.txt"], "none.txt"),
        (["sample-pairs", "--model_name_or_path", "MODEL", "--reward_funcs", "acuracy"], "is not found"),
        (["vrpo", "--model_name_or_path", "MODEL", "--output_dir", "out", *ON_THE_CPU], "Give a dataset"),
        (["vrpo", "--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--test_split_size", "0.5", *ON_THE_CPU]
         + ["--output_dir", "out"], "`--test_split_size` is for `datasets` in a YAML file"),
        (["score", "--model_name_or_path", "MODEL", "--dataset_name", "DATA"],
         "it has ['train']. Name one of them with `--dataset_test_split`.\n"),
        (["score", "--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--text_files", "a.txt"],
         "Both `--text_files` and `--dataset_name` are given"),
        (["score", "--model_name_or_path", "MODEL", "--text_files", "DATA/latin-1"], "is not a text in UTF-8"),
        (["sample-pairs", "--model_name_or_path", "MODEL", "--reward_funcs", "trl.rewards"], "rewards is no function"),
        (["score", "--model_name_or_path", "MODEL", "--dataset_name", "DATA/train.jsonl"], "is a file: give its"),
        (["score", "--model_name_or_path", "MODEL", "--dataset_name", "DISK"], "was written by `save_to_disk`"),
        (["score", "--model_name_or_path", "MODEL", "--dataset_name", "HALF"], "cannot be read: "),
        (["merge", "--model_name_or_path", "MODEL", "--output_dir", "DATA/adapter"], "holds an adapter, which"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_values_that_do_not_fit_end_in_a_line(tmp_path, capsys, monkeypatch, checkpoint, arguments, message):
    monkeypatch.chdir(tmp_path)
    Dataset.from_dict({"text": ["say hi"]}).to_json(tmp_path / "DATA" / "train.jsonl")
    (tmp_path / "DATA" / "latin-1").write_bytes(b"\xe9")
    Dataset.from_dict({"text": ["say hi"]}).save_to_disk(tmp_path / "DISK")
    (tmp_path / "HALF").mkdir()
    (tmp_path / "HALF" / "test.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "DATA" / "adapter").mkdir()
    (tmp_path / "DATA" / "adapter" / "adapter_config.json").write_text("{}")
    assert main([str(checkpoint) if part == "MODEL" else part for part in arguments]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"trl-diffusion {arguments[0]}: error: ") and message in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "--model_name_or_path", "x"], "`--prompts` is missing"),
        (["sample-pairs", "--model_name_or_path", "x"], "`--reward_funcs` is missing"),
        (["score"] + ["--method", "guess"], "invalid choice: 'guess'"),
        (["sample-pairs", "--model_name_or_path", "x", "--reward_funcs", "x", "--temperature", "0"], "greedy answers"),
        (["vrpo", "--model_name_or_path", "ADAPTER", "--use_peft", "--output_dir", "o", *ON_THE_CPU], "for a new one"),
        (["generate", "--use_peft"], "`--use_peft` is not an option"),
        (["score", "--dataset_train_split", "x"], "Did you mean `--dataset_test_split`?"),
        (["sample-pairs", "--dataset_streaming"], "`--dataset_streaming` is not an option"),
        (["iterative-vrpo", "--dataset_streaming"], "`--dataset_streaming` is not an option"),
        (["sft", "--ignore_bias_buffers"], "`--ignore_bias_buffers` is not an option"),
    ],
)  # fmt: skip
def test_missing_options_are_named(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    LoraConfig(base_model_name_or_path="x").save_pretrained("ADAPTER")
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_what_is_pushed_to_the_hub(tmp_path, capsys, monkeypatch, checkpoint):
    """The adapter, its tokenizer and a card, which names nothing of this machine; to a hub that is none."""
    pushed = {}

    class Hub:
        def create_repo(self, name, **options):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, repo_id, folder_path, **options):
            files = [file for file in Path(folder_path).iterdir() if file.is_file()]
            pushed[repo_id] = {file.name: file.read_bytes() for file in files}

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    rows = {"prompt": ["what is one "], "chosen": ["one"], "rejected": ["six"]}
    Dataset.from_dict(rows).to_json(tmp_path / "data" / "train.jsonl")
    options = {"model_name_or_path": checkpoint, "dataset_name": tmp_path / "data", "output_dir": tmp_path / "out"}
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    given += ["--use_peft", "--max_steps", "1", "--save_strategy", "no", "--report_to", "none", *ON_THE_CPU]
    assert main(["vrpo", *given, "--push_to_hub", "--hub_model_id", "me/aligned"]) == 0
    assert "Model pushed to https://huggingface.co/me/aligned." in capsys.readouterr().out
    files = pushed["me/aligned"]
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= {*files}
    card = files["README.md"].decode()
    assert "generate(model, " in card and "me/aligned" in card
    assert str(tmp_path) not in card and "\ndatasets:" not in card


def test_one_value_of_a_list_in_a_yaml_file(tmp_path):
    """Is a list of it, and not of its characters."""
    (tmp_path / "options.yaml").write_text("model_name_or_path: x\nprompts: say hi\n")
    _, arguments = command("generate").parser().parse_args_and_config(["--config", str(tmp_path / "options.yaml")])
    assert arguments.prompts == ["say hi"]
    (tmp_path / "mixture.yaml").write_text("model_name_or_path: x\nloss_type: ipo\ndatasets:\n  path: y\n")
    options = ["--config", str(tmp_path / "mixture.yaml"), "--output_dir", str(tmp_path), *ON_THE_CPU]
    _, training, _, mixture = command("vrpo").parser().parse_args_and_config(options)
    assert training.loss_type == ["ipo"] and [each.path for each in mixture.datasets] == ["y"]


# Several devices


def test_the_names_of_accelerates_configurations(tmp_path):
    assert set(launch.names()) >= {"single_gpu", "multi_gpu", "fsdp2", "zero2", "zero3"}
    for name in launch.names():
        file, rest = launch.configuration(["--beta", "1", "--accelerate_config", name, "--use_peft"])
        assert file.endswith(f"{name}.yaml") and rest == ["--beta", "1", "--use_peft"]
    (tmp_path / "mine.yaml").write_text("")
    assert launch.configuration([f"--accelerate_config={tmp_path / 'mine.yaml'}"]) == (str(tmp_path / "mine.yaml"), [])
    with pytest.raises(ValueError, match="Did you mean `zero3`"):
        launch.configuration(["--accelerate_config", "zero_3"])
    with pytest.raises(ValueError, match="needs a name or a file"):
        launch.configuration(["--accelerate_config"])
    assert launch.configuration(["--num_processes", "2"]) == (None, ["--num_processes", "2"])


def test_a_launch_is_accelerates(monkeypatch, capsys, tmp_path):
    launched = []
    monkeypatch.setattr(launch, "launch_command", launched.append)
    assert (
        main(["vrpo", "--accelerate_config", "multi_gpu", "--beta", "0.3", "--num_processes", "2", "--use_peft"]) == 0
    )
    assert main(["vrpo", "--num_processes=2", "--mixed_precision", "no", "--multi_gpu", "--beta", "0.3"]) == 0
    by_name, by_number = launched
    assert by_name.module and by_name.training_script == cli.__name__
    assert by_name.training_script_args == ["vrpo", "--beta", "0.3", "--use_peft"]
    assert by_name.config_file.endswith("multi_gpu.yaml") and by_name.num_processes == 2
    assert by_number.training_script_args == ["vrpo", "--beta", "0.3"] and by_number.config_file is None
    assert by_number.num_processes == 2 and by_number.mixed_precision == "no" and by_number.multi_gpu
    with pytest.raises(SystemExit, match="2"):
        main(["vrpo", "--accelerate_config", "many"])
    assert "neither a file nor the name of a configuration" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):  # before any process is started
        main(["vrpo", "--accelerate_config", "multi_gpu", "--config", "some.yaml", "--bta", "0.3"])
    assert "`--bta` is not an option. Did you mean `--beta`?" in capsys.readouterr().err
    (tmp_path / "options.yaml").write_text("accelerate_config: multi_gpu\n")
    with pytest.raises(SystemExit, match="2"):
        main(["vrpo", "--config", str(tmp_path / "options.yaml")])
    assert "`--accelerate_config` in the YAML file is not an option. It says how" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--cpu"], [], ["--accelerate_config", "single_gpu"]])
def test_processes_that_would_not_be_started(monkeypatch, capsys, options):
    """Without several GPUs accelerate runs one, and does not say so."""
    monkeypatch.setattr(launch, "launch_command", lambda _: pytest.fail("it is launched"))
    with pytest.raises(SystemExit, match="2"):
        main(["merge", "--num_processes", "2", *options])
    assert "`--num_processes 2` would start one process" in capsys.readouterr().err


def test_a_process_that_fails_has_said_why(monkeypatch):
    """In a line of its own, to which no traceback of the launcher is added."""

    def fails(arguments):
        raise ChildFailedError("main", {0: ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file="none")})

    monkeypatch.setattr(launch, "launch_command", fails)
    assert main(["merge", "--num_processes", "2", "--multi_gpu"]) == 1
