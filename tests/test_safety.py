"""What SECURITY.md promises: no foreign code, no foreign pickle, no network."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_pairs
from peft import LoraConfig
from test_reference import on_disk
from test_trainers import make_trainer

from trl_diffusion import DiffusionVRPOConfig, ELBOKTOConfig
from trl_diffusion.resuming.checkpoints import RUN, problem_of

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "trl_diffusion").rglob("*.py"))
# What reads or runs what somebody else wrote, or talks to somebody else
FORBIDDEN_MODULES = {
    *("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"),
    *("socket", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "smtplib"),
    *("subprocess", "ctypes", "runpy"),
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_reads_pickles_runs_texts_or_opens_connections(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES
        elif isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") not in FORBIDDEN_CALLS
            assert ast.unparse(node.func) not in ("torch.load", "os.system", "os.popen", "numpy.load", "np.load")
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                assert not (keyword.arg == "trust_remote_code" and value is True)
                assert not (keyword.arg in ("weights_only", "safe_serialization") and value is False)


@pytest.mark.parametrize("config", [DiffusionVRPOConfig, ELBOKTOConfig])
def test_remote_code_is_off_unless_asked_for(tmp_path, config):
    assert config(str(tmp_path), bf16=False, use_cpu=True).trust_remote_code is False


def test_remote_code_in_a_model_folder_is_not_run(tmp_path):
    """A folder whose configuration asks for a module of its own."""
    (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "somebodys", "auto_map": auto}))
    with pytest.raises(OSError, match="could not be loaded: The repository .* contains custom code"):
        make_trainer(tmp_path / "out", str(tmp_path))
    assert not (tmp_path / "ran").exists()


class Payload:
    """Unpickling it leaves a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, peft_config=LoraConfig(r=2), max_steps=1, save_strategy="steps", save_steps=1).train()
    return folder / "checkpoint-1"


def test_weights_are_saved_as_safetensors(checkpoint):
    """The one pickle of weights' size is the optimiser's, which is read with `weights_only=True`."""
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert {path.name for path in checkpoint.glob("*.bin")} <= {"training_args.bin"}


def poison(checkpoint, folder, name, content):
    """A copy of a checkpoint with another file in it, which its own list vouches for."""
    shutil.copytree(checkpoint, folder)
    torch.save(content, folder / name)
    run = json.loads((folder / RUN).read_text())
    run["files"][name] = (folder / name).stat().st_size
    (folder / RUN).write_text(json.dumps(run))
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_payload_in_a_checkpoint_is_not_unpickled(tmp_path, checkpoint, name):
    poisoned = poison(checkpoint, tmp_path / "checkpoint-1", name, {"state": Payload(tmp_path / "ran")})
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=2), max_steps=3, save_strategy="steps", save_steps=1)
    assert problem_of(poisoned) == ""
    with pytest.raises(Exception, match="Weights only load failed"):
        trainer.train(resume_from_checkpoint=str(poisoned))
    assert not (tmp_path / "ran").exists()
    torch.load(poisoned / name, weights_only=False)  # the payload would have worked
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("is_listed", [False, True])
def test_pickled_weights_are_not_unpickled(tmp_path, checkpoint, is_listed):
    """They are no checkpoint; nor does a list that names them make them one that runs code."""
    poisoned = poison(checkpoint, tmp_path / "checkpoint-1", "adapter_model.bin", {"weight": Payload(tmp_path / "ran")})
    (poisoned / "adapter_model.safetensors").unlink()
    if is_listed:
        run = json.loads((poisoned / RUN).read_text())
        del run["files"]["adapter_model.safetensors"]
        (poisoned / RUN).write_text(json.dumps(run))
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=2), max_steps=2)
    with pytest.raises(
        Exception, match="Weights only load failed" if is_listed else "adapter_model.safetensors is missing"
    ):
        trainer.train(resume_from_checkpoint=str(poisoned))
    assert not (tmp_path / "ran").exists()


OFFLINE = """
import socket, sys
asked = []
def refuse(*arguments, **_):
    asked.append(arguments)
    raise OSError("no network here")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.connect_ex = refuse
sys.path[:0] = [{tests!r}]
import trl_diffusion
for name in trl_diffusion.__all__:
    getattr(trl_diffusion, name)
import os
from test_trainers import LoraConfig, make_trainer, make_pairs
os.environ.pop("HF_HUB_OFFLINE")  # set by the tests; huggingface_hub has read it, so tell it too
import huggingface_hub.constants
huggingface_hub.constants.HF_HUB_OFFLINE = False
options = dict(peft_config=LoraConfig(r=2), eval_dataset=make_pairs(2), eval_strategy="steps", eval_steps=1,
               save_strategy="steps", save_steps=1, precompute_ref_log_probs=True)
make_trainer({out!r}, max_steps=1, **options).train()
trainer = make_trainer({out!r}, max_steps=2, **options)
trainer.train(resume_from_checkpoint=True)
trainer.save_model()
trainer.create_model_card()
print("ASKED", asked)
"""


@pytest.mark.slow
def test_a_run_asks_the_network_for_nothing(tmp_path):
    """Import of everything, training, evaluation, saving, resuming and the model card, in a process of its own."""
    code = OFFLINE.format(tests=str(ROOT / "tests"), out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ASKED []" in done.stdout


def test_stored_references_are_keyed_by_content(tmp_path):
    """Rows on disk, of which others are chosen: stored values are not found; of the same rows they are."""
    rows, stored, files = on_disk(make_pairs(5), tmp_path / "rows"), [], []
    for chosen in (range(4), range(1, 5), range(4)):
        trainer = make_trainer(tmp_path, dataset=rows.select(chosen), precompute_ref_log_probs=True)
        stored.append(trainer.train_dataset["ref_chosen_logps"])
        files.append(len(list((tmp_path / "rows").glob("reference-values-*"))))
    assert stored[0] != stored[1] and stored[2] == stored[0]
    assert stored[0][1:] == pytest.approx(stored[1][:3], rel=1e-6)
    assert files == [1, 2, 2]
