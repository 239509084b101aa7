"""
A run that is killed and resumed is the run that was not: at any step, in the middle of a save, and never from half a
checkpoint, other data or another objective.
"""

import dataclasses
import errno
import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import test_kto
import test_trainers
import torch
from conftest import make_model, make_pairs
from peft import LoraConfig
from processes import kill_myself, run_forked
from test_kto import make_feedback
from transformers import TrainerCallback

from trl_diffusion import DiffusionSFTConfig, DiffusionVRPOConfig, ELBOKTOConfig
from trl_diffusion.resuming import checkpoints, record
from trl_diffusion.resuming.checkpoints import RUN, problem_of, record_of, resolve_checkpoint
from trl_diffusion.trainers.arguments import ELBOArguments

STEPS = 7
SAVED = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "num_mc_samples": 2}


def make_vrpo(folder, **options):
    """Precomputed reference, accumulation, a last batch that is not full, dropout in the adapter."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "disable_dropout": False, **options}
    options = {"dataset": make_pairs(10), "precompute_ref_log_probs": True, **SAVED, **options}
    return test_trainers.make_trainer(folder, **{"peft_config": LoraConfig(r=2, lora_dropout=0.2), **options})


def make_kto(folder, **options):
    """A reference on the draws of each step, running means, a composed order, all weights trained."""
    options = {
        "baseline": "ema_per_class",
        "batch_composition": "balanced",
        "per_device_train_batch_size": 3,
        **options,
    }
    return test_kto.make_trainer(folder, **{"dataset": make_feedback(8), **SAVED, **options})


TRAINERS = {"vrpo": make_vrpo, "kto": make_kto}


def outcome(trainer):
    """TRL counts `num_tokens` from where it was resumed."""
    logged = {e["step"]: {k: v for k, v in e.items() if k != "num_tokens"} for e in trainer.state.log_history[:-1]}
    means = getattr(trainer, "_running_means", None)
    return logged, means and means.means, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What comes out of runs that nobody interrupts, and their folders."""
    found = {}
    for name, make in TRAINERS.items():
        folder = tmp_path_factory.mktemp(name)
        trainer = make(folder)
        trainer.train()
        found[name] = (*outcome(trainer), folder)
    return found


class Killed(TrainerCallback):
    """Gradients are there, the optimiser has not moved."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            kill_myself()


def train_and_be_killed(make, folder, when):
    trainer = make(folder)
    if isinstance(when, int):
        trainer.add_callback(Killed(when))
    else:
        kill_while_writing(when, step=4)
    trainer.train()


def kill_while_writing(name, step):
    """Half of the file is there, and then there is no process."""
    import safetensors.torch
    import transformers.trainer_callback as states

    def half(write):
        def write_half(content, path, *args, **kwargs):
            path = Path(path)
            if path.parent.name != f"checkpoint-{step}" or path.name != name:
                return write(content, path, *args, **kwargs)
            write(content, path, *args, **kwargs)
            os.truncate(path, path.stat().st_size // 2)
            kill_myself()

        return write_half

    torch.save = half(torch.save)
    for module in (safetensors.torch, __import__("peft.peft_model", fromlist=["x"])):
        for attribute in ("save_file", "safe_save_file"):
            if hasattr(module, attribute):
                setattr(module, attribute, half(getattr(module, attribute)))
    import transformers.modeling_utils as modeling

    modeling.safe_save_file = half(modeling.safe_save_file)
    states.TrainerState.save_to_json = half(states.TrainerState.save_to_json)


KILLS = [
    ("vrpo", 1, None),
    ("vrpo", 6, "checkpoint-4"),
    ("vrpo", "adapter_model.safetensors", "checkpoint-2"),
    ("vrpo", "optimizer.pt", "checkpoint-2"),
    ("vrpo", "trainer_state.json", "checkpoint-2"),
    ("kto", 3, "checkpoint-2"),
    ("kto", "model.safetensors", "checkpoint-2"),
    ("kto", "rng_state.pth", "checkpoint-2"),
]


@pytest.mark.parametrize("name, when, last_whole", KILLS)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, whole, caplog, name, when, last_whole):
    """To the last bit: losses, every metric, running means and weights."""
    make = TRAINERS[name]
    (code,) = run_forked(train_and_be_killed, make, tmp_path / "run", when, folder=tmp_path)
    assert code == -signal.SIGKILL, (tmp_path / "rank0.log").read_text()[-2000:]
    trainer = make(tmp_path / "run")
    if last_whole is None:
        with pytest.raises(ValueError, match="found no whole checkpoint.*it holds none.*Start anew"):
            trainer.train(resume_from_checkpoint=True)
        return
    resumed_from = resolve_checkpoint(True, str(tmp_path / "run"))
    assert Path(resumed_from).name == last_whole
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    passed_over = [r.getMessage() for r in caplog.records if "is passed over" in r.getMessage()]
    assert len(passed_over) == (isinstance(when, str))
    assert all("checkpoint-4" in message and last_whole in message for message in passed_over)
    logged, means, weights = outcome(trainer)
    assert logged == whole[name][0]
    assert means == whole[name][1]
    for key, weight in weights.items():
        assert torch.equal(weight, whole[name][2][key]), key


def train_on_two(folder, killed=False, resume=False):
    """The second process is killed while it writes its random state: by then the first has written all that it has."""
    trainer = make_kto(folder / "run", per_device_train_batch_size=2)
    if killed and os.environ["RANK"] == "1":
        kill_while_writing("rng_state_1.pth", step=4)
    trainer.train(resume_from_checkpoint=resume)
    torch.save(outcome(trainer), folder / f"outcome{os.environ['RANK']}.pt")
    trainer.accelerator.end_training()


def test_one_of_two_processes_is_killed(tmp_path):
    """A checkpoint that lacks the part of one process is none, whatever the others have written."""
    for name, killed, resume in (("whole", False, False), ("cut", True, False), ("cut", False, True)):
        (tmp_path / name).mkdir(exist_ok=True)
        codes = run_forked(train_on_two, tmp_path / name, killed, resume, processes=2, folder=tmp_path)
        assert [code == 0 for code in codes] == [not killed] * 2, (tmp_path / "rank0.log").read_text()[-2000:]
        if killed:
            assert codes[1] == -signal.SIGKILL
            assert problem_of(tmp_path / name / "run" / "checkpoint-2") == ""
            assert problem_of(tmp_path / name / "run" / "checkpoint-4") == "trainer_state.json is missing"
    listed = json.loads((tmp_path / "cut" / "run" / "checkpoint-4" / RUN).read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(listed)
    for rank in range(2):
        files = (tmp_path / name / f"outcome{rank}.pt" for name in ("whole", "cut"))
        whole, resumed = (torch.load(file, weights_only=False) for file in files)
        assert resumed[:2] == whole[:2]
        assert all(torch.equal(resumed[2][key], weight) for key, weight in whole[2].items())


# Half checkpoints


def cut(path):
    os.truncate(path, path.stat().st_size - 1 if path.suffix != ".json" else path.stat().st_size // 2)


def test_a_checkpoint_lists_what_is_read_when_it_is_resumed(whole):
    """Whatever transformers and PEFT write, and nothing that is not read."""
    listed = json.loads((whole["vrpo"][3] / "checkpoint-7" / RUN).read_text())["files"]
    assert {*FILES} - {"trainer_state.json", RUN} <= set(listed)
    assert {"training_args.bin", "README.md"}.isdisjoint(listed)
    assert "model.safetensors" in json.loads((whole["kto"][3] / "checkpoint-7" / RUN).read_text())["files"]


FILES = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", RUN]


@pytest.mark.parametrize("how, word", [(cut, "cut short"), (Path.unlink, "missing")], ids=["cut", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_half_a_checkpoint_is_not_resumed(tmp_path, whole, caplog, name, how, word):
    shutil.copytree(whole["vrpo"][3], tmp_path / "run")
    broken = tmp_path / "run" / "checkpoint-7"
    assert problem_of(broken) == ""
    how(broken / name)
    assert name in problem_of(broken) and word in problem_of(broken)
    with caplog.at_level(logging.WARNING):
        found = resolve_checkpoint(True, str(tmp_path / "run"))
    assert found == str(tmp_path / "run" / "checkpoint-6")
    (message,) = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert "checkpoint-7" in message and name in message and word in message
    with pytest.raises(ValueError, match=f"is no whole checkpoint: .*{name}.*{word}"):
        resolve_checkpoint(str(broken), str(tmp_path / "run"))


def test_what_nobody_reads_may_go(tmp_path, whole):
    folder = shutil.copytree(whole["vrpo"][3] / "checkpoint-4", tmp_path / "checkpoint-4")
    (folder / "training_args.bin").unlink()
    (folder / "README.md").write_text("Mine.")
    assert problem_of(folder) == ""


def test_what_is_listed_in_another_version_is_not_guessed(tmp_path, whole):
    folder = shutil.copytree(whole["vrpo"][3] / "checkpoint-4", tmp_path / "checkpoint-4")
    (folder / RUN).write_text(json.dumps({"version": 2}))
    assert problem_of(folder) == f"{RUN} has the version 2, and this one of trl_diffusion reads 1"


def test_a_checkpoint_under_the_number_of_another(tmp_path, whole):
    shutil.copytree(whole["vrpo"][3] / "checkpoint-4", tmp_path / "checkpoint-9")
    assert problem_of(tmp_path / "checkpoint-9") == "trainer_state.json is of step 4"


def test_a_checkpoint_of_the_model_only(tmp_path):
    make_vrpo(tmp_path, max_steps=1, save_steps=1, save_only_model=True).train()
    with pytest.raises(ValueError, match=f"{RUN} is missing .was it saved by another program.*save_only_model=True"):
        resolve_checkpoint(str(tmp_path / "checkpoint-1"), str(tmp_path))


def test_what_a_command_line_gives(tmp_path, whole):
    folder = str(whole["vrpo"][3])
    assert resolve_checkpoint("True", folder) == resolve_checkpoint(True, folder) == f"{folder}/checkpoint-7"
    assert resolve_checkpoint(None, folder) is resolve_checkpoint("false", folder) is None
    with pytest.raises(ValueError, match="nowhere is no folder"):
        resolve_checkpoint(str(tmp_path / "nowhere"), folder)


def test_processes_that_found_different_checkpoints(whole, monkeypatch):
    monkeypatch.setattr(checkpoints, "gather_object", lambda outcome: [*outcome, ("", "checkpoint-2")])
    with pytest.raises(ValueError, match="found different checkpoints.*'checkpoint-7', 'checkpoint-2'"):
        resolve_checkpoint(True, str(whole["vrpo"][3]))
    monkeypatch.setattr(checkpoints, "gather_object", lambda outcome: [*outcome, ("rank 1 has none", None)])
    with pytest.raises(ValueError, match="rank 1 has none"):
        resolve_checkpoint(True, str(whole["vrpo"][3]))


# A full disk


def full(content, path, *args, save=torch.save, **kwargs):
    if "checkpoint-4" in str(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return save(content, path, *args, **kwargs)


def test_a_full_disk_loses_nothing(tmp_path, whole, monkeypatch):
    """The save of step 4 fails; what was saved before is resumed, and the run ends as if nothing had been."""
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written to `output_dir=.*No space left"):
        make_vrpo(tmp_path).train()
    monkeypatch.undo()
    trainer = make_vrpo(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert outcome(trainer)[0] == whole["vrpo"][0]


def test_half_of_a_checkpoint_over_a_whole_one_is_none(tmp_path, whole, monkeypatch):
    """New weights beside the old optimiser, which is as long as the new one would be."""
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(whole["vrpo"][3] / name, tmp_path / name)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint-4 could not be written"):
        make_vrpo(tmp_path, learning_rate=1e-3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert problem_of(tmp_path / "checkpoint-4").startswith(f"{RUN} is missing")


# Another run

REFUSED = [
    ("vrpo", {"beta": 0.5}, "`beta` was 0.2 and is 0.5 .the objective is another one"),
    ("vrpo", {"loss_type": "ipo"}, r"`loss_type` was \['sigmoid'\] and is \['ipo'\]"),
    ("vrpo", {"loss_type": "robust", "label_smoothing": 0.1}, "`label_smoothing` was 0.0 and is 0.1"),
    ("vrpo", {"f_divergence_type": "js_divergence"}, "`f_divergence_type` was 'reverse_kl' and is 'js_divergence'"),
    ("vrpo", {"discopop_tau": 0.1}, "`discopop_tau` was 0.05 and is 0.1"),
    ("vrpo", {"peft_config": LoraConfig(r=2, lora_dropout=0.2, lora_alpha=64)}, "`adapter` was .*scaled in another"),
    ("vrpo", {"peft_config": LoraConfig(r=2, lora_dropout=0.2, use_rslora=True)}, "`adapter` was .*'use_rslora': True"),
    ("vrpo", {"model": make_model(seed=9)}, "`reference` was .*a sample of which is compared"),
    ("kto", {"model": make_model(seed=9)}, "`reference` was .*a sample of which is compared"),
    ("vrpo", {"seed": 7}, "`seed` was 42 and is 7 .it orders the rows"),
    ("vrpo", {"data_seed": 7}, "`seed` was 42 and is 7"),
    ("vrpo", {"dataset": make_pairs(12)}, "`data` was .*the rows that were seen and those to come"),
    ("vrpo", {"dataset": make_pairs(10).shuffle(seed=1)}, "`data` was"),
    (
        "vrpo",
        {"gradient_accumulation_steps": 1},
        "`rows_per_step` was 4 and is 2 .batch size x processes x accumulation",
    ),
    ("kto", {"baseline": "batch_mean"}, "`baseline` was 'ema_per_class' and is 'batch_mean'"),
    ("kto", {"desirable_weight": 2.0}, "`desirable_weight` was 1.0 and is 2.0"),
    ("kto", {"batch_composition": "alternating"}, "`batch_composition` was 'balanced' and is 'alternating'"),
    ("kto", {"peft_config": LoraConfig(r=2)}, "`weights` was .*use the same model and `peft_config`"),
]


@pytest.mark.parametrize("name, change, message", REFUSED)
def test_another_run_is_refused(tmp_path, whole, name, change, message):
    trainer = TRAINERS[name](tmp_path, **change)
    with pytest.raises(ValueError, match=f"checkpoint-7 is of another run: .*{message}"):
        trainer.train(resume_from_checkpoint=str(whole[name][3] / "checkpoint-7"))
    assert trainer.state.global_step == 0


WARNED = [
    ({"draw_seed": 7}, "`draw_seed` was 42 and is 7; masks are drawn from another seed"),
    ({"num_mc_samples": 3}, "`num_mc_samples` was 2 and is 3; the noise of every estimate changes"),
    ({"mask_scheme": "bernoulli"}, "`mask_scheme` was 'mirror' and is 'bernoulli'"),
    ({"stratify": False}, "`stratify` was True and is False"),
    ({"level_concentration": 0.5}, "`level_concentration` was None and is 0.5; the noise of every estimate changes"),
    ({"control_variate": "none"}, "`control_variate` was None and is 'none'; the noise of every estimate"),
    ({"share_draws": False}, "`share_draws` was True and is False"),
    (
        {"precompute_ref_log_probs": False},
        "`precompute_ref_log_probs` was True and is False; masks are the same in",
    ),
]


@pytest.mark.parametrize("change, message", WARNED)
def test_other_noise_is_warned_of(tmp_path, whole, caplog, change, message):
    trainer = make_vrpo(tmp_path, **change)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(whole["vrpo"][3] / "checkpoint-6"))
    found = [r.getMessage() for r in caplog.records if "Resuming" in r.getMessage()]
    assert len(found) == 1 and message in found[0]
    assert trainer.state.global_step == STEPS


MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 2, "precompute_ref_log_probs": False, "peft_config": None}


def test_a_reference_that_moves_goes_on_from_where_it_was(tmp_path):
    uncut = make_vrpo(tmp_path, **MOVING)
    uncut.train()
    resumed = make_vrpo(tmp_path, **MOVING)
    first = [p.detach().clone() for p in resumed.ref_model.parameters()]
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert outcome(resumed)[0] == outcome(uncut)[0]
    for ours, expected in zip(resumed.ref_model.parameters(), uncut.ref_model.parameters(), strict=True):
        assert torch.equal(ours, expected)
    assert not all(map(torch.equal, first, resumed.ref_model.parameters()))


def test_a_reference_that_moves_is_part_of_the_run(tmp_path):
    make_vrpo(tmp_path, **MOVING, max_steps=2).train()
    for change, message in (
        ({"sync_ref_model": False}, "`sync_ref_model` was {'every': 2, 'alpha': 0.6} and is False .the objective is"),
        ({"ref_model_mixup_alpha": 0.5}, "`sync_ref_model` was .* and is {'every': 2, 'alpha': 0.5}"),
    ):
        with pytest.raises(ValueError, match=message):
            make_vrpo(tmp_path, **{**MOVING, **change}).train(resume_from_checkpoint=True)
    content = json.loads((tmp_path / "checkpoint-2" / RUN).read_text())
    del content["files"]["reference.safetensors"]  # as where it was sharded
    (tmp_path / "checkpoint-2" / RUN).write_text(json.dumps(content))
    (tmp_path / "checkpoint-2" / "reference.safetensors").unlink()
    with pytest.raises(ValueError, match="`sync_ref_model=True` moves the reference along, and .* does not hold it"):
        make_vrpo(tmp_path, **MOVING).train(resume_from_checkpoint=True)


def test_a_new_version_of_the_draws_is_warned_of(tmp_path, whole, caplog, monkeypatch):
    monkeypatch.setattr(record, "DRAW_VERSION", record.DRAW_VERSION + 1)
    with caplog.at_level(logging.WARNING):
        make_vrpo(tmp_path).train(resume_from_checkpoint=str(whole["vrpo"][3] / "checkpoint-6"))
    (message,) = [r.getMessage() for r in caplog.records if "Resuming" in r.getMessage()]
    assert "`draw_version` was" in message and "the same seed gives other masks" in message


SILENT = [
    {"elbo_gradient": "graph"},
    {"draws_per_forward": 1},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    {"num_train_epochs": 9, "logging_steps": 1},
]


@pytest.mark.parametrize("change", SILENT)
def test_what_changes_no_number_is_not_mentioned(tmp_path, whole, caplog, change):
    """The batch may be cut otherwise: accumulation is exact."""
    trainer = make_vrpo(tmp_path, **change)
    with caplog.at_level(logging.WARNING):
        record.compare(record_of(whole["vrpo"][3] / "checkpoint-6"), trainer._record, trainer.args.differences, "")
    assert not [r for r in caplog.records if "Resuming" in r.getMessage()]


@pytest.mark.parametrize("config", [DiffusionVRPOConfig, ELBOKTOConfig, DiffusionSFTConfig])
def test_every_option_of_ours_says_what_a_difference_means(config):
    inherited = {field.name for field in dataclasses.fields(config.__bases__[1])}
    assert issubclass(config.__bases__[0], ELBOArguments)
    assert {field.name for field in dataclasses.fields(config)} - inherited <= set(config.differences)


def test_a_stream_cannot_be_compared(tmp_path, caplog):
    stream = make_pairs(10).to_iterable_dataset()
    options = {"dataset": stream, "precompute_ref_log_probs": False}
    make_vrpo(tmp_path, **options).train()
    with caplog.at_level(logging.WARNING):
        make_vrpo(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert any("training data are a stream" in r.getMessage() for r in caplog.records)


def test_the_fingerprint_is_of_the_content(tmp_path):
    """Not of the way to it, which is what the fingerprint of `datasets` is of."""
    pairs = make_pairs(6)
    prints = [
        make_vrpo(tmp_path, dataset=dataset)._record["data"]
        for dataset in (pairs, pairs.select(range(6)), type(pairs).from_list(pairs.to_list()), pairs.select(range(5)))
    ]
    assert prints[0] == prints[1] == prints[2] != prints[3]
