"""
ELBO-KTO against a hand-written one: every baseline and loss type, and what the published code's traps would break.
"""

import json
import logging

import pytest
import torch
from conftest import WORDS, make_model, make_pairs, make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from processes import run_forked
from test_trainers import assert_same_gradients, gradients
from test_trainers import make_trainer as make_vrpo_trainer
from trl import KTOTrainer

from trl_diffusion import ELBOKTOConfig, ELBOKTOTrainer, elbo
from trl_diffusion.scoring.door import FusedCausalLMOutput
from trl_diffusion.trainers.elbo_kto.baselines import BASELINES, RunningMeans, Totals
from trl_diffusion.trainers.elbo_kto.composition import ComposedSampler
from trl_diffusion.trainers.elbo_kto.mismatched import row_before

FREE = sorted(set(BASELINES) - {"kl"})  # baselines that need no forward of their own
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
        "elbo/change_chosen",
        "elbo/change_rejected",
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


def test_the_metrics_of_mismatched_pairs_are_those_and_what_trl_calls_kl(tmp_path):
    trainer = make_trainer(tmp_path, make_model(seed=1), ref_model=make_model(seed=2), baseline="kl")
    inputs = batch_of(trainer)
    trainer.model.train()
    with torch.no_grad():
        trainer.compute_loss(trainer.model, inputs)
        policy, reference = (elbos_by_hand(m, trainer, inputs, 1, "KL_") for m in (trainer.model, trainer.ref_model))
    kl = (policy - reference).mean().clamp(min=0).item()
    assert trainer._metrics["train"]["kl"] == trainer._metrics["train"]["kto/baseline"] == [pytest.approx(kl, rel=1e-4)]


class Answering:
    """Stands for a model whose ELBOs are known, in the form in which TRL's own loss asks for them."""

    def __init__(self, **elbos):
        self.elbos = elbos

    def __call__(self, input_ids, **kwargs):
        values = self.elbos[("KL" if input_ids.shape[1] == 3 else "own")]
        terms = torch.nn.functional.pad(values[:, None], (0, input_ids.shape[1] - 2))
        return FusedCausalLMOutput(log_probs=terms, entropy=0 * terms, mean_logits=0 * terms)


@pytest.mark.parametrize("loss_type, baseline", [("kto", "kl"), ("apo_zero_unpaired", None)])
def test_the_loss_is_that_of_trl_where_trl_has_one(tmp_path, loss_type, baseline):
    """TRL's own `_compute_loss`, given the ELBOs as numbers, and ours: loss, gradient and the metrics they share."""
    trainer = make_trainer(
        tmp_path, loss_type=loss_type, baseline=baseline, desirable_weight=1.2, undesirable_weight=0.7
    )
    generator = torch.Generator().manual_seed(0)
    own, ref, mismatched, ref_mismatched = (torch.randn(5, generator=generator) * 3 for _ in range(4))
    label = torch.tensor([True, False, True, True, False])
    ids, mask = torch.ones(5, 4, dtype=torch.long), torch.tensor([[0, 1, 1, 1]] * 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask, "label": label}
    inputs |= {f"KL_{name}": inputs[name][:, :3] for name in ("input_ids", "attention_mask", "completion_mask")}
    inputs |= {"ref_logps": ref, "ref_KL_logps": ref_mismatched}
    trainer.model.train()
    trainer.precompute_ref_logps = True
    results = []
    for compute in (
        lambda model: KTOTrainer._compute_loss(trainer, model, inputs, False),
        lambda model: trainer._losses(rows := trainer._score(model, inputs), rows).mean(),
    ):
        leaf = own.clone().requires_grad_()
        loss = compute(Answering(own=leaf, KL=mismatched))
        loss.backward()
        results.append((loss, leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    theirs = {key: values[0] for key, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    trainer._log_rows("train", trainer._score(Answering(own=own, KL=mismatched), inputs))
    ours = {key: values[0] for key, values in trainer._metrics["train"].items()}
    shared = ["rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "num_tokens"]
    for key in shared + ["kl"] * (baseline == "kl"):
        assert ours[key] == pytest.approx(theirs[key] * (2 if key == "num_tokens" else 1), rel=1e-5), key
    assert set(theirs) - set(ours) == {"entropy", "logits/chosen", "logits/rejected", *(() if baseline else ("kl",))}


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
        columns = [column for column in trainer.train_dataset.column_names if column.endswith("completion_ids")]
        assert len(columns) == 1 + len(options)
        for column in columns:
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


# Both trainers


@pytest.mark.parametrize("make", [make_trainer, make_vrpo_trainer])
def test_many_responses_to_one_prompt_are_warned_of_where_draws_are_coupled(tmp_path, caplog, make):
    """Two pairs of one prompt among three pairs, and four rows of it among six; not the two responses of a pair."""
    rows = make_pairs(3)
    several = Dataset.from_dict({**rows.to_dict(), "prompt": [rows["prompt"][i] for i in (0, 1, 0)]})
    found = []
    for dataset, couple_pairs in ((several, True), (several, False), (rows, True)):
        caplog.clear()
        trainer = make(tmp_path, dataset=dataset, couple_pairs=couple_pairs, per_device_train_batch_size=6, max_steps=2)
        with caplog.at_level(logging.WARNING):
            trainer.train()
        found.append([r.getMessage() for r in caplog.records if "responses to one prompt" in r.getMessage()])
    assert found[1:] == [[], []]
    assert len(found[0]) == 1 and "holds 4 responses" in found[0][0] and "`couple_pairs=False`" in found[0][0]


# Mismatched pairs


def test_each_row_is_paired_with_the_one_before_it_in_its_batch():
    for rows, together in ((8, 4), (9, 4), (10, 4), (5, 2), (2, 4), (3, 1000)):
        before = row_before(rows, together)
        assert all(i != other for i, other in enumerate(before)), (rows, together)
        for start in range(0, rows - (rows % together == 1), together):
            batch = range(start, min(start + together, rows))
            assert sorted(before[start : batch.stop]) == list(batch)
            assert before[start + 1 : batch.stop] == list(batch)[:-1]
    assert row_before(9, 4)[-1] == 7


def make_counted(n, completions=None):
    words = WORDS[:n]
    return Dataset.from_dict(
        {
            "prompt": [f"say {word} " for word in words],
            "completion": completions or words,
            "label": [i % 2 == 0 for i in range(n)],
        }
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_row_that_cannot_be_scored_takes_no_other_with_it(tmp_path, stream):
    """The second of eight is empty. The others stay, and their batches exchange completions among themselves."""
    dataset = make_counted(8, ["", *WORDS[1:8]])
    dataset = dataset.to_iterable_dataset() if stream else dataset
    trainer = make_trainer(tmp_path, dataset=dataset, baseline="kl", max_steps=1)
    own, other = ([row[c][0] for row in trainer.train_dataset] for c in ("completion_ids", "KL_completion_ids"))
    assert own == [make_tokenizer()(word)["input_ids"][0] for word in WORDS[1:8]]
    assert sorted(own[:4]) == sorted(other[:4]) and sorted(own[4:]) == sorted(other[4:])
    assert all(a != b for a, b in zip(own, other, strict=True))


def test_a_pair_too_long_is_cut_and_its_rows_stay(tmp_path):
    rows = {"prompt": ["say ", "say " * 8], "completion": ["six " * 8, "two"], "label": [True, False]}
    trainer = make_trainer(tmp_path, dataset=Dataset.from_dict(rows), baseline="kl", max_length=12)
    assert len(trainer.train_dataset) == 2
    assert batch_of(trainer, range(2))["KL_input_ids"].shape[1] == 12


@pytest.mark.parametrize("stream", [False, True])
def test_a_last_row_on_its_own_does_not_meet_itself(tmp_path, stream):
    """It is paired with the one before it; a stream, which does not know that any more, leaves it out."""
    dataset = make_counted(5)
    dataset = dataset.to_iterable_dataset() if stream else dataset
    trainer = make_trainer(tmp_path, dataset=dataset, baseline="kl", max_steps=1)
    rows = list(trainer.train_dataset)
    assert len(rows) == (4 if stream else 5)
    assert all(row["completion_ids"] != row["KL_completion_ids"] for row in rows)
    assert stream or rows[4]["KL_completion_ids"] == rows[3]["completion_ids"]


def test_one_row_has_nothing_to_be_paired_with(tmp_path):
    with pytest.raises(ValueError, match="the train dataset has one row.*`baseline='ema'`"):
        make_trainer(tmp_path, dataset=make_counted(1), baseline="kl")


# Evaluation


@pytest.mark.parametrize("baseline", [*FREE, "kl"])
def test_evaluation_does_not_depend_on_its_batches(tmp_path, baseline):
    """Rows sorted by class, as unpaired pairs are, and a smaller last batch; the loss is that of the whole set."""
    policy, reference, rows = make_model(seed=1), make_model(seed=2), make_pairs(5)
    found = []
    for size in (1, 4, 10):
        trainer = make_trainer(
            tmp_path, policy, ref_model=reference, baseline=baseline, eval_dataset=rows, per_device_eval_batch_size=size
        )
        if trainer._running_means:
            trainer._running_means.means = RunningMeans(0.9, 1.5, [2.0, -1.0])
        found.append(trainer.evaluate())
        for timing in [key for key in found[-1] if "runtime" in key or "per_second" in key or "preparation" in key]:
            del found[-1][timing]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5, abs=1e-6)

    inputs = trainer.data_collator(list(trainer.eval_dataset))
    with torch.no_grad():
        r = elbos_by_hand(policy, trainer, inputs, 0) - elbos_by_hand(reference, trainer, inputs, 0)
        if baseline == "kl":
            z = [elbos_by_hand(model, trainer, inputs, 0, "KL_") for model in (policy, reference)]
            z = (z[0] - z[1]).mean().clamp(min=0)
        else:
            z = baseline_by_hand(baseline, r, inputs["label"], RunningMeans(0.9, 1.5, [2.0, -1.0]))
    assert inputs["label"].tolist() == sorted(inputs["label"].tolist(), reverse=True)
    assert found[0]["eval_loss"] == pytest.approx(loss_by_hand(r, inputs["label"], z, 0.3).item(), rel=1e-5)
    means = [0.3 * r[inputs["label"] == label].mean().item() for label in (True, False)]
    assert found[0]["eval_rewards/margins"] == pytest.approx(means[0] - means[1], rel=1e-4)


def test_an_evaluation_set_called_train_is_paired_as_any_other(tmp_path):
    sets = {"train": make_pairs(5), "other": make_pairs(5)}
    prepared = make_trainer(tmp_path, baseline="kl", dataset=make_pairs(5), eval_dataset=sets)
    of_train, of_other = (prepared.eval_dataset[name]["KL_completion_ids"][:] for name in sets)
    assert of_train == of_other != prepared.train_dataset["KL_completion_ids"][:]


def evaluate_and_write(folder, baseline, size):
    trainer = make_trainer(
        folder / "out", make_model(seed=1), ref_model=make_model(seed=2), baseline=baseline, dataset=make_pairs(4),
        eval_dataset=make_pairs(5), per_device_eval_batch_size=size,
    )  # fmt: skip
    found = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        (folder / f"{size}.json").write_text(json.dumps(found))
    if trainer.accelerator.num_processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("baseline", ["batch_mean", "kl"])
def test_evaluation_does_not_depend_on_the_number_of_processes(tmp_path, baseline):
    """Ten rows for two processes with three a batch: the last batch is filled up with rows that count once."""
    evaluate_and_write(tmp_path, baseline, 10)
    assert run_forked(evaluate_and_write, tmp_path, baseline, 3, processes=2, folder=tmp_path) == [0, 0]
    one, two = (json.loads((tmp_path / f"{size}.json").read_text()) for size in (10, 3))
    keys = [key for key in one if "/" in key or key == "eval_loss"]
    assert len(keys) > 12 and one["eval_kto/num_desirable"] == 5
    assert {key: two[key] for key in keys} == pytest.approx({key: one[key] for key in keys}, rel=1e-5, abs=1e-6)


def test_the_best_checkpoint_by_its_margin(tmp_path):
    trainer = make_trainer(
        tmp_path, peft_config=LoraConfig(r=4), eval_dataset=make_pairs(4), max_steps=2, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, per_device_eval_batch_size=4,
        metric_for_best_model="rewards/margins", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    margins = [entry["eval_rewards/margins"] for entry in trainer.state.log_history if "eval_rewards/margins" in entry]
    assert len(margins) == 2 and trainer.state.best_metric == max(margins)


def test_an_evaluation_set_of_one_class_is_warned_of(tmp_path, caplog):
    trainer = make_trainer(tmp_path, eval_dataset=make_feedback().filter(lambda row: row["label"]))
    with caplog.at_level(logging.WARNING):
        trainer.evaluate()
    found = [record.getMessage() for record in caplog.records if "An evaluation set" in record.getMessage()]
    assert len(found) == 1 and "6 desirable and 0 undesirable" in found[0]


OPTIONS = [
    ({"per_device_train_batch_size": 1}, "`baseline='batch_mean'` compares a row with its global micro-batch.*'ema'"),
    ({"per_device_train_batch_size": 1, "baseline": "leave_one_out"}, "`baseline='leave_one_out'` compares"),
    ({"baseline": "median"}, r"`baseline` must be one of .*'kl'.*got 'median'"),
    ({"baseline": "ema", "ema_decay": 1.0}, r"`ema_decay` must be in \[0, 1\), got 1.0"),
    ({"batch_composition": "sorted"}, "`batch_composition` must be one of .*got 'sorted'"),
    ({"loss_type": "apo_zero_unpaired", "baseline": "ema"}, "compares with zero: `baseline='ema'` would be ignored"),
    (
        {"baseline": "kl", "train_sampling_strategy": "sequential", "per_device_train_batch_size": 1},
        "exchanges the completions of a batch, and `per_device_train_batch_size=1`",
    ),
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
