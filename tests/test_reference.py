"""A reference that is scored before training: on which draws, for how long, and what is stored of it."""

import copy
import logging

import numpy as np
import pytest
import torch
from conftest import make_model, make_pairs
from datasets import load_from_disk
from encoders import make_encoder, make_encoder_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_kto import make_feedback
from test_kto import make_trainer as make_kto_trainer
from test_trainers import batch_of, make_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from trl_diffusion import DiffusionVRPOConfig, DiffusionVRPOTrainer
from trl_diffusion.models import families
from trl_diffusion.models.family import Family
from trl_diffusion.scoring.head import on_draws
from trl_diffusion.scoring.key import scoring_key
from trl_diffusion.trainers import reference
from trl_diffusion.trainers import stored as storing

RUN = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
# (trainer, rows, options): each kind of batch that carries reference values
KINDS = [
    pytest.param(make_trainer, make_pairs, {}, id="vrpo"),
    pytest.param(make_kto_trainer, make_feedback, {"baseline": "batch_mean"}, id="kto"),
    pytest.param(make_kto_trainer, make_feedback, {"baseline": "kl"}, id="kto with mismatched pairs"),
]


def on_disk(dataset, folder):
    """Values are stored beside the rows, which a dataset in memory does not have."""
    dataset.save_to_disk(folder)
    return load_from_disk(folder)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def move_from_the_reference(*trainers):
    """All to the same adapter."""
    for trainer in trainers:
        torch.manual_seed(0)
        for parameter in (p for p in trainer.model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.1)


def stored(trainer):
    columns = [name for name in trainer._reference_columns if name in trainer.train_dataset.column_names]
    return {name: torch.tensor(trainer.train_dataset[name]) for name in columns}


def count_scored(monkeypatch, stop_at=None):
    """Number of batches that the reference has scored; raises before one of them, as an interruption would."""
    scored, parent = [], reference.ReferenceMixin.compute_ref_log_probs

    def counting(self, model, inputs):
        if len(scored) == stop_at:
            raise KeyboardInterrupt
        scored.append(len(inputs["input_ids"]))
        return parent(self, model, inputs)

    monkeypatch.setattr(reference.ReferenceMixin, "compute_ref_log_probs", counting)
    return scored


# Draws


@pytest.mark.parametrize("make, rows, options", KINDS)
def test_epochs_take_the_stored_sets_in_turn(tmp_path, make, rows, options):
    """The losses of a run that scores the reference in each step, on the draws of the epoch's set; exactly."""
    options = {**RUN, **options, "num_train_epochs": 3}
    trainer = make(
        tmp_path,
        peft_config=LoraConfig(r=4),
        dataset=rows(4),
        precompute_ref_log_probs=True,
        num_reference_draw_sets=2,
        **options,
    )
    live = make(tmp_path, peft_config=LoraConfig(r=4), dataset=rows(4), **options)
    move_from_the_reference(trainer, live)
    live._draw_nonces = lambda mode: (live.state.global_step % 2,) * 2  # one step an epoch
    trainer.train()
    live.train()
    assert len(losses(trainer)) == 3
    assert losses(trainer) == losses(live)


def test_one_set_is_that_of_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, precompute_ref_log_probs=True, num_reference_draw_sets=3, **RUN | {"max_steps": 1})
    one = make_trainer(tmp_path, precompute_ref_log_probs=True)
    for name, values in stored(trainer).items():
        assert values.shape == (6, 3)
        assert torch.equal(values[:, 0], stored(one)[name])
        assert not torch.equal(values[:, 1], values[:, 0])


def test_evaluation_has_one_set(tmp_path):
    options = {"peft_config": LoraConfig(r=4), "eval_dataset": {"a": make_pairs(4), "train": make_pairs(3)}}
    trainer = make_trainer(tmp_path, precompute_ref_log_probs=True, num_reference_draw_sets=2, max_steps=3, **options)
    live = make_trainer(tmp_path, **options)
    move_from_the_reference(trainer, live)
    trainer.state.epoch = 1.0  # the second set's turn in training
    found, expected = trainer.evaluate(), live.evaluate()
    for key in ("eval_a_loss", "eval_train_loss"):
        assert found[key] == expected[key] != torch.tensor(2.0).log().item()


def test_one_of_the_trainers_own_sets_is_evaluated_as_it_is(tmp_path):
    sets = {"a": make_pairs(4), "b": make_pairs(3)}
    trainer = make_trainer(tmp_path, precompute_ref_log_probs=True, eval_dataset=sets, peft_config=LoraConfig(r=4))
    move_from_the_reference(trainer)
    together = trainer.evaluate()
    for name in sets:
        found = trainer.evaluate(trainer.eval_dataset[name], None, f"eval_{name}")  # in TRL's order, too
        assert found[f"eval_{name}_loss"] == together[f"eval_{name}_loss"]
    with pytest.raises(ValueError, match="or give the rows as they were before a trainer prepared them"):
        trainer.evaluate(trainer.train_dataset)


def test_a_run_that_is_resumed_in_its_second_epoch_takes_the_second_set(tmp_path):
    def run(folder, until, resume=False):
        trainer = make_trainer(
            folder,
            peft_config=LoraConfig(r=4),
            precompute_ref_log_probs=True,
            num_reference_draw_sets=2,
            save_strategy="steps",
            save_steps=1,
            lr_scheduler_type="constant",
            **RUN | {"max_steps": until},
        )
        trainer.train(resume_from_checkpoint=resume)
        return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}

    whole = run(tmp_path / "whole", 4)
    for until in (2, 3, 4):  # cut between the epochs, and inside the second
        resumed = run(tmp_path / "cut", until, resume=until > 2)
    assert resumed == whole


# What is stored


@pytest.mark.parametrize("make, rows, options", KINDS)
def test_interrupted_scoring_goes_on_where_it_stopped(tmp_path, monkeypatch, make, rows, options):
    monkeypatch.setattr(reference, "_ROWS_PER_PART", 4)
    options = {**options, **RUN, "precompute_ref_log_probs": True, "num_reference_draw_sets": 2}
    uncut = stored(make(tmp_path, dataset=rows(6), **options))
    dataset = on_disk(rows(6), tmp_path / "rows")
    with monkeypatch.context() as context:
        scored = count_scored(context, stop_at=4)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, dataset=dataset, **options)
        assert len(scored) == 4  # both parts of the first set, and half of a part of the second
    with monkeypatch.context() as context:
        scored = count_scored(context)
        resumed = stored(make(tmp_path, dataset=dataset, **options))
        assert len(scored) == 3  # the second set
    with monkeypatch.context() as context:
        scored = count_scored(context)
        again = stored(make(tmp_path, dataset=dataset, **options))
        assert not scored
    assert uncut.keys() == resumed.keys() and uncut
    for name, values in uncut.items():
        assert torch.equal(resumed[name], values) and torch.equal(again[name], values)


@pytest.mark.parametrize(
    "options", [{"num_mc_samples": 2}, {"seed": 7}, {"mask_scheme": "bernoulli"}, {"stratify": False}], ids=str
)
def test_another_estimator_does_not_find_them(tmp_path, monkeypatch, options):
    dataset = on_disk(make_pairs(), tmp_path / "rows")
    make_trainer(tmp_path, dataset=dataset, precompute_ref_log_probs=True)
    scored = count_scored(monkeypatch)
    make_trainer(tmp_path, dataset=dataset, precompute_ref_log_probs=True)
    assert not scored
    make_trainer(tmp_path, dataset=dataset, precompute_ref_log_probs=True, **options)
    assert len(scored) == 2


# Name, model, options: what a reference value depends on beside weights and draws
SETTINGS = [
    pytest.param({"rms_norm_eps": 0.1}, {}, id="epsilon of the norms"),
    pytest.param({"rope_theta": 10.0}, {}, id="rotary frequencies"),
    pytest.param({"n_heads": 8}, {}, id="heads"),
    pytest.param({}, {"bf16": True}, id="precision"),
]


def test_the_mask_token_counts():
    """A tokenizer has one, and any other is refused before a score is stored."""
    model = make_model()
    assert scoring_key(model, 2, "no") != scoring_key(model, 4, "no")


@pytest.mark.parametrize("config, options", SETTINGS)
def test_the_same_weights_used_otherwise_do_not_find_them(tmp_path, monkeypatch, config, options):
    dataset = on_disk(make_pairs(), tmp_path / "rows")
    options = {"dataset": dataset, "precompute_ref_log_probs": True, **options}
    make_trainer(tmp_path, make_model(), **{**options, "bf16": False})
    scored = count_scored(monkeypatch)
    make_trainer(tmp_path, make_model(), **{**options, "bf16": False})
    assert not scored
    mask_token_id = config.pop("mask_token_id", None)
    model = make_model(**config)
    if mask_token_id is not None:
        model.config.mask_token_id = mask_token_id
    make_trainer(tmp_path, model, **options)
    assert len(scored) == 2


def test_the_same_adapter_scaled_otherwise_does_not_find_them(tmp_path, monkeypatch):
    """The reference of an adapter that was trained before is a copy of it."""
    dataset = on_disk(make_pairs(), tmp_path / "rows")

    def score(alpha):
        torch.manual_seed(0)
        model = get_peft_model(
            make_model(), LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False)
        )
        return stored(make_trainer(tmp_path, model, dataset=dataset, precompute_ref_log_probs=True))

    one, scored = score(2), count_scored(monkeypatch)
    again, other = score(2), score(8)
    assert len(scored) == 2
    for name, values in one.items():
        assert torch.equal(again[name], values) and not torch.equal(other[name], values)


def test_another_model_does_not_find_them(tmp_path, monkeypatch):
    dataset, scored = on_disk(make_pairs(), tmp_path / "rows"), count_scored(monkeypatch)
    options = {"peft_config": LoraConfig(r=4), "dataset": dataset, "precompute_ref_log_probs": True}
    one, again, other = (stored(make_trainer(tmp_path, make_model(seed=seed), **options)) for seed in (0, 0, 1))
    assert len(scored) == 4
    for name, values in one.items():
        assert torch.equal(again[name], values) and not torch.equal(other[name], values)


@pytest.mark.parametrize("damage", ["cut", "another number", "not a number", "another format", "another key"])
@pytest.mark.parametrize("make, rows, options", [KINDS[0], KINDS[2]])
def test_damaged_values_are_computed_again(tmp_path, monkeypatch, caplog, make, rows, options, damage):
    dataset = on_disk(rows(6), tmp_path / "rows")
    trainer = make(tmp_path, dataset=dataset, precompute_ref_log_probs=True, **options)
    (file,) = (tmp_path / "rows").glob("reference-values-*")
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-2])
    elif damage in ("another format", "another key"):
        tensors, about = load_file(file), safe_open(file, "numpy").metadata()
        save_file(tensors, file, metadata=about | ({"format": "0"} if damage == "another format" else {"key": "other"}))
    else:
        (first,) = next(iter(stored(trainer).values()))[:1].numpy()
        assert content.count(first.tobytes()) == 1
        other = np.float32(np.nan) if damage == "not a number" else first + 1
        file.write_bytes(content.replace(first.tobytes(), other.tobytes()))
    scored = count_scored(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="trl_diffusion"):
        again = make(tmp_path, dataset=dataset, precompute_ref_log_probs=True, **options)
    assert scored and "train dataset are damaged and computed again" in caplog.text
    for name, values in stored(trainer).items():
        assert torch.equal(stored(again)[name], values)
    rescored = len(scored)
    make(tmp_path, dataset=dataset, precompute_ref_log_probs=True, **options)
    assert len(scored) == rescored  # whole again


def test_a_folder_that_cannot_be_written_to_costs_a_warning(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storing, "save_file", full)
    with caplog.at_level(logging.WARNING, logger="trl_diffusion"):
        trainer = make_trainer(
            tmp_path, dataset=on_disk(make_pairs(), tmp_path / "rows"), precompute_ref_log_probs=True
        )
    assert "No space left on device" in caplog.text and "computed again by the next run" in caplog.text
    in_memory = make_trainer(tmp_path, precompute_ref_log_probs=True)
    for name, values in stored(trainer).items():
        assert torch.equal(stored(in_memory)[name], values)


def test_a_corrected_family_does_not_find_them(tmp_path, monkeypatch):
    """Equal weights, rows and draws; what changed is where the logits of a token stand."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    config.mask_token_id, config.is_causal = 2, False
    torch.manual_seed(0)
    weights = LlamaForCausalLM(config).state_dict()

    def score(shift, dataset):
        monkeypatch.setattr(families, "FAMILIES", [Family(model_types=("llama",), logit_shift=shift)])
        model = LlamaForCausalLM(config)
        model.load_state_dict(weights)
        return stored(make_trainer(tmp_path, model, dataset=dataset, precompute_ref_log_probs=True))

    dataset = on_disk(make_pairs(), tmp_path / "rows")
    wrong, right, expected = score(0, dataset), score(1, dataset), score(1, make_pairs())
    for name, values in expected.items():
        assert torch.equal(right[name], values) and not torch.equal(wrong[name], values)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_reference_draw_sets": 0}, "`num_reference_draw_sets` must be an integer of at least 1, got 0"),
        ({"num_reference_draw_sets": 2}, "`num_reference_draw_sets=2` is for `precompute_ref_log_probs=True`"),
        (
            {"num_reference_draw_sets": 4, "precompute_ref_log_probs": True, "num_train_epochs": 3},
            "`num_reference_draw_sets=4` is more than `num_train_epochs=3`",
        ),
    ],
)
def test_refusals(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionVRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_batches_carry_a_value_for_each_set(tmp_path):
    trainer = make_trainer(tmp_path, precompute_ref_log_probs=True, num_reference_draw_sets=2, max_steps=1)
    assert batch_of(trainer)["ref_chosen_logps"].shape == (3, 2)


@pytest.mark.parametrize("where", ["copy", "given", "adapter off", "precomputed"])
def test_the_reference_has_no_dropout(tmp_path, where):
    """Whatever the mode is that a model came in; only `disable_dropout=False` leaves it to the policy."""
    model = make_encoder("bert", mask_token_id=2).train()
    options = {"disable_dropout": False, "precompute_ref_log_probs": where == "precomputed"}
    args = DiffusionVRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    trainer = DiffusionVRPOTrainer(
        *(model, copy.deepcopy(model) if where == "given" else None, args),
        train_dataset=make_pairs(3),
        processing_class=make_encoder_tokenizer(),
        peft_config=LoraConfig(r=2) if where == "adapter off" else None,
    )
    inputs = batch_of(trainer)
    trainer.model.train()
    scorer = on_draws(trainer.ref_model or trainer.model, 0)
    found = torch.cat(trainer.compute_ref_log_probs(scorer, inputs))
    assert trainer.model.training
    if where == "precomputed":
        found = torch.cat([inputs[name] for name in trainer._reference_columns])
    trainer.model.eval()
    with torch.no_grad():
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        ask = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
        policy = on_draws(trainer.model, 0)(**ask, fused_lm_head=True).log_probs.sum(1)  # it has learnt nothing
    torch.testing.assert_close(found, policy, rtol=1e-6, atol=0)
