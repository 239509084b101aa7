"""
A run on many processes is the run on one: losses and weights of DDP on two and four, and of FSDP2 on two, against one
process with the same global batches. Processes are forked and talk through gloo.
"""

import json
import os

import pytest
import test_kto
import test_sft
import test_trainers
import torch
from accelerate.utils import gather_object
from conftest import make_pairs
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from processes import FSDP, fsdp_on_the_cpu, run_forked
from safetensors.torch import load_file
from test_kto import make_feedback

from trl_diffusion.resuming.checkpoints import problem_of

# Plain SGD with a large step: what differs in a gradient differs as much in the weights
COMMON = {"max_steps": 2, "num_mc_samples": 2, "optim": "sgd", "learning_rate": 1.0, "gradient_accumulation_steps": 2}


def lora():
    return LoraConfig(r=4)


CELLS = {
    "vrpo lora": (test_trainers.make_trainer, lora, {}),
    "vrpo lora precomputed": (test_trainers.make_trainer, lora, {"precompute_ref_log_probs": True}),
    "vrpo lora adaptive": (test_trainers.make_trainer, lora, {"control_variate": "adaptive", "couple_pairs": True}),
    "vrpo full": (test_trainers.make_trainer, None, {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.05]}),
    "kto lora batch_mean": (test_kto.make_trainer, lora, {"batch_composition": "balanced"}),
    "kto lora leave_one_out": (test_kto.make_trainer, lora, {"baseline": "leave_one_out"}),
    "kto full ema_per_class": (test_kto.make_trainer, None, {"baseline": "ema_per_class"}),
    "kto full precomputed": (test_kto.make_trainer, None, {"precompute_ref_log_probs": True}),
    "sft lora examples": (test_sft.make_trainer, lora, {"loss_average": "examples"}),
    "sft full": (test_sft.make_trainer, None, {}),
    "rows left over": (
        test_trainers.make_trainer,
        lora,
        {"dataloader_drop_last": True, "precompute_ref_log_probs": True, "gradient_accumulation_steps": 1},
    ),
}
ROWS_OF = {test_trainers.make_trainer: "vrpo", test_kto.make_trainer: "kto", test_sft.make_trainer: "sft"}
ON_FOUR = ["vrpo lora precomputed", "vrpo full", "kto lora batch_mean"]
WITH_FSDP = [
    "sft full",
    "vrpo lora",
    "vrpo lora precomputed",
    "vrpo full",
    "kto lora batch_mean",
    "kto full ema_per_class",
]


def make_cell(name, folder, processes=1, **options):
    make, adapter, own = CELLS[name]
    rows = "left over" if name == "rows left over" else ROWS_OF[make]
    rows = load_from_disk(str(folder / rows))
    if "precompute_ref_log_probs" in own and make is test_trainers.make_trainer:  # on disk, or in memory
        rows = Dataset.from_list(list(rows))
    options = {**COMMON, "per_device_train_batch_size": 4 // processes, **own, **options}
    return make(folder / "out", dataset=rows, peft_config=adapter and adapter(), **options)


def outcome(trainer):
    """What has to be equal: losses, and what was trained, gathered where it is sharded."""
    weights = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    weights = {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in weights.items()}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], weights


def train_cells(names, folder, processes):
    for name in names:
        trainer = make_cell(name, folder, processes)
        trainer.train()
        result = outcome(trainer)
        if trainer.is_world_process_zero():
            torch.save(result, folder / f"{name} {processes}.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def train_cells_with_fsdp(names, folder, processes):
    with fsdp_on_the_cpu():
        train_cells(names, folder, processes)


def save_and_resume_with_fsdp(name, folder, processes):
    """Saves at step 2 of 3; goes on from there in a new trainer. Both outcomes, of AdamW."""
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    with fsdp_on_the_cpu():
        whole = make_cell(name, folder, processes, **options)
        whole.train()
        results = [outcome(whole)]
        for checkpoint in sorted((folder / "out").glob("checkpoint-*")):
            assert problem_of(checkpoint) == "", checkpoint
        resumed = make_cell(name, folder, processes, **options)
        resumed.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
        results.append(outcome(resumed))
        whole.save_model(str(folder / "saved"))
    if whole.is_world_process_zero():
        torch.save(results, folder / f"resumed {name}.pt")
    whole.accelerator.wait_for_everyone()
    whole.accelerator.end_training()


def logs(folder):
    return "".join(path.read_text()[-3000:] for path in sorted(folder.glob("rank*.log")))


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    make_pairs(16).save_to_disk(str(folder / "vrpo"))
    make_pairs(15).save_to_disk(str(folder / "left over"))
    make_feedback(16).save_to_disk(str(folder / "kto"))
    test_sft.make_completions(16).save_to_disk(str(folder / "sft"))
    # Forked like the others: what the parent has cached must not be what they would compute
    assert run_forked(train_cells, list(CELLS), folder, 1, folder=folder) == [0], logs(folder)
    return folder


def assert_the_same(folder, name, processes):
    losses, weights = torch.load(folder / f"{name} 1.pt")
    other_losses, other = torch.load(folder / f"{name} {processes}.pt")
    other = {n.removeprefix("module."): w for n, w in other.items()}
    assert len(losses) == 2 and losses[0] != losses[1]
    assert other_losses == pytest.approx(losses, rel=1e-6)
    scale = max(w.abs().max().item() for w in weights.values())
    assert weights.keys() == other.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(other[key], weight, rtol=1e-6, atol=2e-6 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("processes, names", [(2, list(CELLS)), (4, ON_FOUR)], ids=["2", "4"])
def test_ddp_equals_one_process(on_one, processes, names):
    codes = run_forked(train_cells, names, on_one, processes, processes=processes, folder=on_one)
    assert codes == [0] * processes, logs(on_one)
    for name in names:
        assert_the_same(on_one, name, processes)


@pytest.mark.slow
def test_fsdp2_equals_one_process(on_one):
    """The full cells need the head's gradient to be summed over the processes; it is sharded on its own."""
    codes = run_forked(train_cells_with_fsdp, WITH_FSDP, on_one, 2, processes=2, folder=on_one, environment=FSDP)
    assert codes == [0, 0], logs(on_one)
    for name in WITH_FSDP:
        assert_the_same(on_one, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vrpo lora", "kto full ema_per_class"])
def test_fsdp2_saves_and_resumes(on_one, tmp_path, name):
    for rows in ("vrpo", "kto"):
        os.symlink(on_one / rows, tmp_path / rows)
    codes = run_forked(save_and_resume_with_fsdp, name, tmp_path, 2, processes=2, folder=tmp_path, environment=FSDP)
    assert codes == [0, 0], logs(tmp_path)
    (losses, weights), (resumed_losses, resumed) = torch.load(tmp_path / f"resumed {name}.pt")
    assert resumed_losses == losses
    assert all(torch.equal(resumed[n], w) for n, w in weights.items())
    (saved,) = (tmp_path / "saved").glob("*model.safetensors")
    saved = load_file(saved)
    for key, weight in weights.items():
        assert torch.equal(saved[key.replace(".default", "")], weight), key


# Rows that do not fill the last batch


def meet_rows(folder, processes, drop_last):
    """The rows of each step, in the order in which one epoch meets them."""
    trainer = test_trainers.make_trainer(
        folder / "out",
        dataset=load_from_disk(str(folder / "left over")),
        per_device_train_batch_size=4 // processes,
        train_sampling_strategy="sequential",
        dataloader_drop_last=drop_last,
    )
    ids = [row["prompt_ids"] + row["chosen_ids"] for row in trainer.train_dataset]
    met = []
    for batch in trainer.get_train_dataloader():
        chosen = [
            row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        met.append(gather_object([ids.index(row) for row in chosen[: len(chosen) // 2]]))
    return met


def meet_rows_both_ways(folder, processes):
    met = [meet_rows(folder, processes, drop_last) for drop_last in (False, True)]
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / f"met {processes}.json").write_text(json.dumps(met))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_rows_that_do_not_fill_the_last_batch(on_one):
    """One process leaves the last batch short; several fill it from the start, unless it is dropped."""
    full = [[4 * step + i for i in range(4)] for step in range(3)]
    assert [meet_rows(on_one, 1, drop_last) for drop_last in (False, True)] == [[*full, [12, 13, 14]], full]
    assert run_forked(meet_rows_both_ways, on_one, 2, processes=2, folder=on_one) == [0, 0], logs(on_one)
    assert json.loads((on_one / "met 2.json").read_text()) == [[*full, [12, 13, 14, 0]], full]


def train_kto_on_nine_rows(folder):
    rows = make_feedback(9).remove_columns("label").add_column("label", [bool(int(c)) for c in "000111110"])
    options = {"train_sampling_strategy": "sequential", "num_train_epochs": 1, "num_mc_samples": 2}
    trainer = test_kto.make_trainer(folder / "out", peft_config=lora(), dataset=rows, **options)
    trainer.train()
    if trainer.accelerator.is_main_process:
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_class_that_trl_does_not_see_in_the_last_batch(tmp_path):
    """
    TRL's counts of the classes are those of as many processes as there are rows left over: here of the first, which
    has undesirable rows only. Rewards are of all rows.
    """
    assert run_forked(train_kto_on_nine_rows, tmp_path, processes=2, folder=tmp_path) == [0, 0], logs(tmp_path)
    first, last = (e for e in json.loads((tmp_path / "history.json").read_text()) if "loss" in e)
    for entry, desirable in ((first, 5), (last, 4)):
        assert (entry["kto/num_desirable"], entry["kto/num_undesirable"]) == (desirable, 8 - desirable)
        assert entry["rewards/margins"] == pytest.approx(entry["rewards/chosen"] - entry["rewards/rejected"])
        assert entry["rewards/chosen"] != 0 or entry is first
