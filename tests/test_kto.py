"""
ELBO-KTO against a hand-written one: every baseline and loss type, and what the published code's traps would break.
"""

import logging

import pytest
import torch
from conftest import make_model, make_pairs, make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from test_trainers import assert_same_gradients, gradients

from trl_diffusion import ELBOKTOConfig, ELBOKTOTrainer, elbo
from trl_diffusion.trainers.elbo_kto.baselines import BASELINES, RunningMeans, Totals
from trl_diffusion.trainers.elbo_kto.composition import ComposedSampler

FREE = sorted(BASELINES)  # baselines that need no forward of their own
HALF = 0.5


def make_feedback(n=8):
    """Thumbs: completions and labels, three of each four desirable."""
    rows = make_pairs(n)
    return Dataset.from_dict(
        {
            "prompt": rows["prompt"],
            "completion": [row["chosen" if i % 4 else "rejected"] for i, row in enumerate(rows)],
            "label": [bool(i % 4) for i in range(n)],
        }
    )


def make_trainer(tmp_path, model=None, *, ref_model=None, peft_config=None, dataset=None, eval_dataset=None, **options):
    options = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "num_mc_samples": 3,
        "learning_rate": 1e-2,
        "beta": 0.3,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **options,
    }
    if options.get("baseline") == "kl":
        options["train_sampling_strategy"] = "sequential"
    return ELBOKTOTrainer(
        model or make_model(),
        ref_model,
        ELBOKTOConfig(**options),
        train_dataset=dataset or make_feedback(),
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )


def batch_of(trainer, rows=range(4)):
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def elbos_by_hand(model, trainer, inputs, nonce=1, prefix=""):
    ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"]
    maskable = inputs[f"{prefix}completion_mask"].bool()
    return elbo(model, ids, maskable, mask, draws=trainer._sampler(maskable, ids, mask, nonce)).value


def loss_by_hand(r, desirable, z, beta, weight_d=1.0, weight_u=1.0):
    """The paper's objective: mean of lambda_y - v, v = lambda_y sigma(+-s), s = beta (r - z)."""
    s = beta * (r - z)
    weight = torch.where(desirable, weight_d, weight_u)
    return (weight - weight * torch.sigmoid(torch.where(desirable, s, -s))).mean()


def baseline_by_hand(name, r, desirable, running=None):
    n = len(r)
    if name == "leave_one_out":
        return torch.stack([r[torch.arange(n) != i].mean() for i in range(n)])
    if name == "ema":
        return torch.full((n,), running.overall)
    if name == "ema_per_class":
        return torch.tensor([running.by_class[0 if d else 1] for d in desirable])
    return {"batch_mean": r.mean(), "none": torch.tensor(0.0)}[name].expand(n)


@pytest.mark.parametrize("baseline", [*FREE, "kl", "apo_zero_unpaired"])
@pytest.mark.parametrize("share_draws", [True, False])
def test_loss_and_gradient_equal_the_hand_written_ones(tmp_path, baseline, share_draws):
    policy, reference = make_model(seed=1), make_model(seed=2)
    loss_type, options = ("kto", {"baseline": baseline}) if baseline != "apo_zero_unpaired" else (baseline, {})
    trainer = make_trainer(
        tmp_path, policy, ref_model=reference, loss_type=loss_type, desirable_weight=1.2, undesirable_weight=0.7,
        share_draws=share_draws, **options,
    )  # fmt: skip
    inputs = batch_of(trainer)
    running = RunningMeans(0.9, 1.5, [2.0, -1.0])
    if "ema" in baseline:
        trainer._running_means.means = RunningMeans(0.9, 1.5, [2.0, -1.0])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    ours = gradients(trainer.model, loss)

    policy_nonce, reference_nonce = trainer._draw_nonces("train")
    r = elbos_by_hand(policy, trainer, inputs, policy_nonce)
    r = r - elbos_by_hand(reference, trainer, inputs, reference_nonce).detach()
    desirable = inputs["label"]
    if baseline == "kl":
        with torch.no_grad():
            pairs = [
                elbos_by_hand(m, trainer, inputs, nonce, "KL_")
                for m, nonce in ((policy, policy_nonce), (reference, reference_nonce))
            ]
            z = (pairs[0] - pairs[1]).mean().clamp(min=0)
    else:
        z = baseline_by_hand("none" if baseline == "apo_zero_unpaired" else baseline, r.detach(), desirable, running)
    by_hand = loss_by_hand(r, desirable, z, 0.3, 1.2, 0.7)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert_same_gradients(ours, gradients(policy, by_hand))


@pytest.mark.parametrize("baseline", [*FREE, "kl"])
@pytest.mark.parametrize("route", ["adapter off", "copy", "precomputed"])
def test_a_policy_equal_to_its_reference_has_loss_one_half_exactly(tmp_path, baseline, route):
    trainer = make_trainer(
        tmp_path,
        peft_config=LoraConfig(r=4) if route == "adapter off" else None,
        precompute_ref_log_probs=route == "precomputed",
        baseline=baseline,
        learning_rate=0.0,
        max_steps=2,
        bf16=route != "adapter off",
    )
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history[:-1]] == [HALF, HALF]


def test_forwards_are_those_of_policy_and_reference(tmp_path, monkeypatch):
    """No forward on mismatched pairs, and none twice."""
    trainer = make_trainer(tmp_path, make_model(seed=1), ref_model=make_model(seed=2), num_mc_samples=2)
    count = {"policy": 0, "reference": 0}
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        model.model.register_forward_hook(lambda *_, name=name: count.__setitem__(name, count[name] + 1))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch_of(trainer))
    assert count == {"policy": 4, "reference": 4}  # one of both draws for each of four rows
    assert not any("KL" in column for column in trainer.train_dataset.column_names)


def test_leave_one_out_is_the_batch_mean_scaled():
    """r_i - z_(-i) = n/(n-1) (r_i - mean r)."""
    r, desirable = torch.randn(7, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 2 == 0
    totals = Totals.of(r, desirable)
    left_out, mean = (BASELINES[name](r, desirable, totals, None) for name in ("leave_one_out", "batch_mean"))
    torch.testing.assert_close(r - left_out, 7 / 6 * (r - mean))


def test_totals_add_up_over_any_split():
    r, desirable = torch.randn(8, generator=torch.Generator().manual_seed(1)) * 100, torch.arange(8) % 3 == 0
    whole = Totals.of(r, desirable)
    for split in ([1, 7], [3, 3, 2], [8]):
        parts = [Totals.of(a, b) for a, b in zip(r.split(split), desirable.split(split), strict=True)]
        torch.testing.assert_close(sum(p.total for p in parts), whole.total)
        assert torch.equal(sum(p.count for p in parts), whole.count)


def test_running_means():
    running, alpha = RunningMeans(0.9), 0.1
    first, second = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4.0, 8.0])
    running.update(Totals.of(first, torch.tensor([True, True, False])))
    assert running.overall == pytest.approx(alpha * 3) and running.by_class == pytest.approx([alpha * 1.5, alpha * 6])
    running.update(Totals.of(second, torch.tensor([True, True])))
    assert running.overall == pytest.approx(0.9 * alpha * 3 + alpha * 6)
    assert running.by_class == pytest.approx([0.9 * alpha * 1.5 + alpha * 6, alpha * 6])


def test_running_means_are_updated_after_the_loss_and_not_by_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, make_model(seed=1), ref_model=make_model(seed=2), baseline="ema", ema_decay=0.5)
    inputs = batch_of(trainer)
    for mode, expected in (("eval", 0.0), ("train", 0.0)):
        trainer.model.train(mode == "train")
        trainer.compute_loss(trainer.model, inputs)
        assert trainer._metrics[mode]["kto/baseline"] == [expected]
    r = elbos_by_hand(trainer.model, trainer, inputs) - elbos_by_hand(trainer.ref_model, trainer, inputs)
    assert trainer._running_means.means.overall == pytest.approx(0.5 * r.mean().item(), rel=1e-5)


@pytest.mark.parametrize("baseline", ["batch_mean", "ema", "ema_per_class"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, baseline):
    """Losses, weights and running means, to the last bit."""

    def run(folder, max_steps, resume=False):
        trainer = make_trainer(
            folder, peft_config=LoraConfig(r=4), baseline=baseline, max_steps=max_steps, save_strategy="steps",
            save_steps=2, lr_scheduler_type="constant", batch_composition="balanced", per_device_train_batch_size=3,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        means = trainer._running_means and trainer._running_means.means
        return losses, means, [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]

    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "cut", 2)
    resumed = run(tmp_path / "cut", 5, resume=True)
    assert resumed[:2] == whole[:2]
    assert all(torch.equal(a, b) for a, b in zip(resumed[2], whole[2], strict=True))


def test_resuming_a_run_with_another_baseline_is_refused(tmp_path):
    options = {"peft_config": LoraConfig(r=4), "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, max_steps=1, **options).train()
    with pytest.raises(ValueError, match="`baseline` was 'batch_mean' and is 'ema'"):
        make_trainer(tmp_path, max_steps=2, baseline="ema", **options).train(resume_from_checkpoint=True)


def test_precomputed_reference_gives_the_losses_of_an_online_one(tmp_path):
    """On the draws for which it was computed."""
    losses = []
    for precompute in (False, True):
        trainer = make_trainer(tmp_path, make_model(seed=1), precompute_ref_log_probs=precompute)
        trainer.model.load_state_dict(make_model(seed=2).state_dict())
        trainer.state.global_step = -1  # the nonce of precomputed draws
        trainer.model.train()
        losses.append(trainer.compute_loss(trainer.model, batch_of(trainer)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and abs(losses[0] - HALF) > 1e-3


def test_metrics(tmp_path):
    trainer = make_trainer(tmp_path, make_model(seed=1), ref_model=make_model(seed=2))
    inputs = batch_of(trainer)
    trainer.model.train()
    with torch.no_grad():
        trainer.compute_loss(trainer.model, inputs)
    logged = {key: values[0] for key, values in trainer._metrics["train"].items() if isinstance(values, list)}
    assert set(logged) == {
        "num_tokens",
        *(f"{kind}/{which}" for kind in ("rewards", "logps") for which in ("chosen", "rejected")),
        "rewards/margins",
        *(f"kto/{kind}_{which}" for kind in ("num", "margins") for which in ("desirable", "undesirable")),
        "kto/baseline",
        "kto/saturation",
        "elbo/mask_ratio",
        "elbo/score_variance",
        "elbo/score_standard_error",
    }
    with torch.no_grad():
        r = elbos_by_hand(trainer.model, trainer, inputs) - elbos_by_hand(trainer.ref_model, trainer, inputs)
    d, s = inputs["label"], 0.3 * (r - r.mean())
    expected = {
        "rewards/chosen": 0.3 * r[d].mean(),
        "rewards/rejected": 0.3 * r[~d].mean(),
        "rewards/margins": 0.3 * (r[d].mean() - r[~d].mean()),
        "kto/baseline": r.mean(),
        "kto/margins_desirable": s[d].mean(),
        "kto/margins_undesirable": -s[~d].mean(),
        "kto/saturation": (1 - 4 * torch.sigmoid(s) * torch.sigmoid(-s)).mean(),
        "kto/num_desirable": 3,
        "kto/num_undesirable": 1,
    }
    for name, value in expected.items():
        assert logged[name] == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.parametrize("precompute", [False, True])
def test_diagnostics_do_not_mix_in_mismatched_pairs(tmp_path, precompute):
    """With a policy equal to its reference the score has no variance; against a precomputed one it is not known."""
    trainer = make_trainer(tmp_path, baseline="kl", precompute_ref_log_probs=precompute, learning_rate=0.0, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0].get("elbo/score_variance") == (None if precompute else 0.0)


def test_paired_data_are_unpaired(tmp_path):
    trainer = make_trainer(tmp_path, dataset=make_pairs(4), max_steps=1)
    assert sorted(trainer.train_dataset["label"]) == [False] * 4 + [True] * 4
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == HALF


def test_end_of_text_is_part_of_the_completion(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "say hi"}],
        "completion": [{"role": "assistant", "content": "hi"}],
        "label": True,
    }
    for options in ({}, {"baseline": "kl"}):
        trainer = make_trainer(tmp_path, dataset=Dataset.from_list([row, {**row, "label": False}]), **options)
        for column in trainer._completion_columns:
            assert trainer._tokenizer.decode(trainer.train_dataset[0][column]) == "hi <|eot_id|> <|endoftext|>"


# Batches


@pytest.mark.parametrize("composition", ["balanced", "alternating"])
def test_compositions_meet_each_row_once(composition):
    labels = [i % 5 == 0 for i in range(40)]
    sampler = ComposedSampler(labels, composition, seed=3)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert list(sampler) == list(sampler) and len(sampler) == 40
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(40))
    assert orders[0] != orders[1]


def test_balanced_batches_hold_their_share():
    labels = [i % 5 == 0 for i in range(40)]  # 8 of 40
    order = [labels[i] for i in ComposedSampler(labels, "balanced", seed=0)]
    for size in (5, 8, 10):
        for start in range(0, 40 - size + 1, size):
            assert abs(sum(order[start : start + size]) - size / 5) < 1


def test_alternating_rows_alternate():
    labels = [i % 5 == 0 for i in range(40)]
    order = [labels[i] for i in ComposedSampler(labels, "alternating", seed=0)]
    assert order == [True, False] * 8 + [False] * 24


def test_the_trainer_meets_balanced_batches(tmp_path):
    trainer = make_trainer(tmp_path, dataset=make_feedback(16), batch_composition="balanced", num_train_epochs=2)
    trainer.train()
    counts = [(e["kto/num_desirable"], e["kto/num_undesirable"]) for e in trainer.state.log_history[:-1]]
    assert counts == [(3.0, 1.0)] * 8


def test_a_one_class_batch_is_warned_of_with_counts(tmp_path, caplog):
    trainer = make_trainer(tmp_path, dataset=make_feedback().filter(lambda row: row["label"]), max_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    found = [record.getMessage() for record in caplog.records if "global micro-batch" in record.getMessage()]
    assert len(found) == 1 and "4 desirable and 0 undesirable" in found[0] and "balanced" in found[0]


@pytest.mark.parametrize("baseline", ["batch_mean", "leave_one_out"])
def test_a_last_batch_of_one_row_has_no_baseline(tmp_path, baseline, caplog):
    trainer = make_trainer(
        tmp_path, make_model(seed=1), ref_model=make_model(seed=2), dataset=make_feedback(5), baseline=baseline
    )
    inputs = batch_of(trainer, [1])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    r = elbos_by_hand(trainer.model, trainer, inputs) - elbos_by_hand(trainer.ref_model, trainer, inputs)
    assert loss.item() == pytest.approx((1 - torch.sigmoid(0.3 * r)).item(), rel=1e-5)


OPTIONS = [
    ({"per_device_train_batch_size": 1}, "`baseline='batch_mean'` compares a row with its global micro-batch.*'ema'"),
    ({"per_device_train_batch_size": 1, "baseline": "leave_one_out"}, "`baseline='leave_one_out'` compares"),
    ({"baseline": "median"}, r"`baseline` must be one of \['batch_mean', .*'kl'\], got 'median'"),
    ({"baseline": "ema", "ema_decay": 1.0}, r"`ema_decay` must be in \[0, 1\), got 1.0"),
    ({"batch_composition": "sorted"}, "`batch_composition` must be one of .*got 'sorted'"),
    ({"loss_type": "apo_zero_unpaired", "baseline": "ema"}, "compares with zero: `baseline='ema'` would be ignored"),
    ({"baseline": "kl"}, "needs `train_sampling_strategy='sequential'`, got 'random'"),
    ({"batch_composition": "balanced", "train_sampling_strategy": "sequential"}, "both order the rows"),
    ({"activation_offloading": True}, "`activation_offloading=True` is not supported"),
    ({"num_mc_samples": 0}, "`num_mc_samples` must be an integer of at least 1"),
    ({"baseline": "ema", "ema_decay": None}, r"`ema_decay` must be a number, got None"),
    ({"baseline": 3}, "`baseline` must be a text or None, got 3"),
    ({"loss_type": "kot"}, r"`loss_type` must be among \['kto', 'apo_zero_unpaired'\], got 'kot'"),
    ({"desirable_weight": -1.0}, "`desirable_weight` must be a finite number of at least 0, got -1.0"),
    ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "are both 0, so nothing is learnt"),
    ({"beta": float("nan")}, "`beta` must be a finite number above 0, got nan"),
]


@pytest.mark.parametrize("options, message", OPTIONS)
def test_options_that_contradict_each_other(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ELBOKTOConfig(**{"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, **options})


def test_a_dataset_without_labels(tmp_path):
    with pytest.raises(ValueError, match=r"columns \['completion', 'prompt'\].*`completion` and `label`"):
        make_trainer(tmp_path, dataset=make_feedback().remove_columns("label"))
