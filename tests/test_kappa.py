"""The adaptive control variate: kappa is learnt from past steps only, and is part of a checkpoint."""

import json

import pytest
import torch
from conftest import make_model
from peft import LoraConfig
from test_kto import make_trainer as make_kto_trainer
from test_trainers import batch_of, make_trainer

from trl_diffusion import DiffusionSFTConfig, DiffusionVRPOConfig, ELBOKTOConfig, elbo
from trl_diffusion.estimators import levels
from trl_diffusion.estimators.control_variate import ControlVariate
from trl_diffusion.estimators.kappa import RunningKappa
from trl_diffusion.trainers.running import RunningKappaCallback

ADAPTIVE = {"control_variate": "adaptive", "num_mc_samples": 4}
INITIAL = ControlVariate().kappa
CPU = {"use_cpu": True, "bf16": False}


def kappa_of(trainer) -> RunningKappa:
    return trainer._callback(RunningKappaCallback).kappa


def test_running_kappa_finds_the_best_one():
    """Of b = 0.4 h + noise: the variance of b - kappa h is least at 0.4."""
    generator = torch.Generator().manual_seed(0)
    kappa = RunningKappa(initial=1.0)
    assert kappa.value == 1.0
    for _ in range(200):
        h = torch.randn(100, generator=generator).double()
        b = 3 + 0.4 * h + torch.randn(100, generator=generator)
        kappa.observe((b * h).sum().item(), (h * h).sum().item(), 100)
        before = kappa.value
        kappa.end_step()
    assert before != kappa.value  # a step is not part of its own past
    effective = 100 / (1 - 0.98)
    prior = 64 * (1.0 - 0.4) / (64 + effective)
    assert abs(kappa.value - 0.4 - prior) < 4 * 10**0.5 / effective**0.5  # b varies by 3^2 + 1 about 0.4 h


@pytest.mark.parametrize("product, square, expected", [(-5.0, 1.0, 0.0), (5.0, 1.0, 2.0), (0.0, 0.0, 0.3)])
def test_running_kappa_stays_between_0_and_2(product, square, expected):
    kappa = RunningKappa(initial=0.3)
    kappa.observe(product, square, 1e9)
    kappa.end_step()
    assert kappa.value == pytest.approx(expected, abs=1e-6)


def moments_by_hand(trainer, inputs, policy, reference):
    """Product and square of the scores of pairs with two units of two draws, from estimates with kappa 0 and 1."""
    maskable, beta, samples = inputs["completion_mask"].bool(), trainer.beta, {}
    for kappa in (0.0, 1.0):
        draws = trainer._sampler(maskable, inputs["input_ids"], inputs["attention_mask"], 1, kappa)
        first, second = (
            elbo(model, inputs["input_ids"], maskable, inputs["attention_mask"], draws=draws).samples.double()
            for model in (policy, reference)
        )
        chosen, rejected = (beta * (first - second)).chunk(2, dim=1)
        samples[kappa] = chosen - rejected
    b, h = samples[0.0] / 4, (samples[0.0] - samples[1.0]) / 4
    apart = b[0] + b[1] - b[2] - b[3]
    product = apart * (h[0] + h[1]) - apart * (h[2] + h[3])
    return product.sum().item(), h.sum(0).square().sum().item(), float(b.shape[1])


def test_a_step_uses_the_kappa_of_the_steps_before_it(tmp_path):
    policy, reference = make_model(seed=1), make_model(seed=2)
    trainer = make_trainer(tmp_path, policy, ref_model=reference, **ADAPTIVE)
    inputs = batch_of(trainer)
    trainer.model.train()
    with torch.no_grad():
        trainer.compute_loss(trainer.model, inputs)
        trainer.compute_loss(trainer.model, inputs)
        expected = moments_by_hand(trainer, inputs, policy, reference)
    kappa = kappa_of(trainer)
    assert kappa.value == INITIAL  # both micro-batches belong to the step that is not over
    assert kappa.pending == pytest.approx(tuple(2 * x for x in expected), rel=1e-4)
    kappa.end_step()
    assert kappa.value != INITIAL, kappa

    # The next step's weights are those of the new kappa; evaluation keeps the first
    trainer.state.global_step = 1
    for mode, nonce, value in (("train", 2, kappa.value), ("eval", 0, INITIAL)):
        trainer.model.train(mode == "train")
        maskable = inputs["completion_mask"].bool()
        draws = trainer._draw(maskable, inputs["input_ids"], inputs["attention_mask"], nonce)
        expected = trainer._sampler(maskable, inputs["input_ids"], inputs["attention_mask"], nonce, value)
        assert torch.equal(draws.weight, expected.weight)


@pytest.mark.parametrize("make", [make_trainer, make_kto_trainer], ids=["vrpo", "elbo-kto"])
def test_by_default_it_is_learnt_for_long_responses_and_from_them(tmp_path, monkeypatch, make):
    """Short ones keep the control variate that subtracts all that is expected, and long ones have the adaptive one."""
    default, adaptive, fixed = (
        make(tmp_path, make_model(seed=1), ref_model=make_model(seed=2), **ADAPTIVE | {"control_variate": name})
        for name in (None, "adaptive", "leave_one_out")
    )
    inputs = batch_of(default)
    rows = (inputs["completion_mask"].bool(), inputs["input_ids"], inputs["attention_mask"], 1)
    lengths = rows[0].sum(1)
    monkeypatch.setattr(levels, "LONG", int(lengths.median()) + 1)
    is_long = lengths >= levels.LONG
    assert 0 < is_long.sum() < len(lengths)
    weight = default._sampler(*rows, 0.4).weight
    assert torch.equal(weight[:, is_long], adaptive._sampler(*rows, 0.4).weight[:, is_long])
    assert torch.equal(weight[:, ~is_long], fixed._sampler(*rows).weight[:, ~is_long])
    assert not torch.equal(weight, adaptive._sampler(*rows, 0.4).weight)

    def learnt(trainer, long):
        monkeypatch.setattr(levels, "LONG", long)
        trainer.model.train()
        kappa_of(trainer).pending = (0.0, 0.0, 0.0)
        with torch.no_grad():
            trainer.compute_loss(trainer.model, inputs)
        return kappa_of(trainer).pending

    assert learnt(default, 1) == learnt(adaptive, 1) != (0.0, 0.0, 0.0)
    assert learnt(default, 10_000) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "options",
    [{"precompute_ref_log_probs": True}, {"share_draws": False}, {"control_variate": "leave_one_out"}],
    ids=str,
)
def test_where_nothing_can_be_learnt_the_default_is_leave_one_out(tmp_path, monkeypatch, options):
    monkeypatch.setattr(levels, "LONG", 3)
    for make in (DiffusionVRPOConfig, ELBOKTOConfig):
        config = make(str(tmp_path), **CPU, **options)
        assert not config.learns_kappa
        fixed = make(str(tmp_path), **CPU, **options | {"control_variate": "leave_one_out"})
        assert config.mask_sampler() == fixed.mask_sampler()
    assert "control variate `leave_one_out`" in config.describe_estimator()


def test_the_default_of_fine_tuning_is_leave_one_out(tmp_path):
    config = DiffusionSFTConfig(str(tmp_path), **CPU)
    assert not config.learns_kappa and config.mask_sampler().control_variate == ControlVariate()


def test_a_run_whose_reference_was_stored_begins_to_learn(tmp_path, monkeypatch):
    monkeypatch.setattr(levels, "LONG", 3)
    options = {"peft_config": LoraConfig(r=4), "save_strategy": "steps", "save_steps": 1, "num_mc_samples": 4}
    make_trainer(tmp_path, max_steps=1, precompute_ref_log_probs=True, **options).train()
    trainer = make_trainer(tmp_path, max_steps=2, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2 and kappa_of(trainer).count > 0 and kappa_of(trainer).value != INITIAL


def test_splitting_a_batch_does_not_change_kappa(tmp_path):
    found = []
    for size in (1, 3):
        trainer = make_trainer(tmp_path, make_model(seed=1), ref_model=make_model(seed=2), max_steps=2, seed=3,
            per_device_train_batch_size=size, gradient_accumulation_steps=3 // size, **ADAPTIVE)  # fmt: skip
        trainer.train()
        found.append(kappa_of(trainer))
    assert found[0].count == found[1].count > 0
    assert found[0].value == pytest.approx(found[1].value, rel=1e-4)
    assert found[0].value != INITIAL


@pytest.mark.parametrize("make", [make_trainer, make_kto_trainer], ids=["vrpo", "elbo-kto"])
@pytest.mark.parametrize("options", [{"control_variate": "adaptive"}, {}], ids=["adaptive", "default"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, make, options):
    """Losses, weights and kappa, to the last bit."""
    monkeypatch.setattr(levels, "LONG", 3)

    def run(folder, max_steps, resume=False):
        trainer = make(folder, peft_config=LoraConfig(r=4), max_steps=max_steps, save_strategy="steps", save_steps=2,
            lr_scheduler_type="constant", num_mc_samples=4, **options)  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        logs = [(entry["loss"], entry.get("elbo/kappa")) for entry in trainer.state.log_history if "loss" in entry]
        return logs, kappa_of(trainer), [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    saved = json.loads((tmp_path / "cut" / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["RunningKappaCallback"]["attributes"]["saved"]["count"] > 0
    resumed = run(tmp_path / "cut", 4, resume=True)
    assert resumed[:2] == whole[:2] and whole[1].value != INITIAL
    assert whole[0][0][1] is None and whole[0][-1][1] is not None  # at first the policy is its reference
    assert all(torch.equal(a, b) for a, b in zip(resumed[2], whole[2], strict=True))


def test_resuming_a_run_with_another_control_variate_is_refused(tmp_path):
    options = {"peft_config": LoraConfig(r=4), "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, max_steps=1, control_variate="leave_one_out", **options).train()
    with pytest.raises(ValueError, match="trained with another `control_variate`"):
        make_trainer(tmp_path, max_steps=2, **ADAPTIVE, **options).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"control_variate": "loo"}, r"`control_variate` must be one of .*'leave_one_out'.*, got 'loo'"),
        ({**ADAPTIVE, "precompute_ref_log_probs": True}, r"valid for one set of weights. Set `control_variate="),
        ({**ADAPTIVE, "share_draws": False}, r"`share_draws=False` does not allow. Set `control_variate="),
    ],
    ids=str,
)
def test_refusals(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionVRPOConfig(str(tmp_path), **options)
