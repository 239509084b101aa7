"""
The trainer against a hand-written VRPO: every loss and its gradient, every way to get a reference, and the laws that
hold whatever the batch is cut into.
"""

import copy
import math

import pytest
import torch
from conftest import make_model, make_pairs, make_tokenizer
from datasets import load_from_disk
from dpo_reference import OPTIONS, losses, options_of
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from trl_diffusion import DiffusionVRPOConfig, DiffusionVRPOTrainer, elbo

LOSS_TYPES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
    "sigmoid_norm"
)


def make_trainer(
    tmp_path,
    model=None,
    *,
    ref_model=None,
    peft_config=None,
    dataset=None,
    eval_dataset=None,
    quantization_config=None,
    **options,
):
    options = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 3,
        "num_mc_samples": 3,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **options,
    }
    return DiffusionVRPOTrainer(
        model or make_model(),
        ref_model,
        DiffusionVRPOConfig(**options),
        train_dataset=make_pairs() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
        peft_config=peft_config,
        quantization_config=quantization_config,
    )


def batch_of(trainer, rows=range(3)):
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def elbos_by_hand(model, trainer, inputs, nonce):
    """The plain definition on the padded batch, on the draws of `nonce`."""
    maskable = inputs["completion_mask"].bool()
    draws = trainer._sampler(maskable, inputs["input_ids"], inputs["attention_mask"], nonce)
    out = elbo(model, inputs["input_ids"], maskable, inputs["attention_mask"], draws=draws)
    return out.value.chunk(2), maskable.sum(1).chunk(2)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, rtol=1e-4):
    assert ours.keys() == theirs.keys() and ours
    scale = max(g.abs().max().item() for g in theirs.values())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=1e-5 * scale)


# Losses


@pytest.mark.parametrize(
    "loss_type, loss_weights",
    [([name], None) for name in LOSS_TYPES.split()]
    + [(["sigmoid", "sft"], [1, 0.05]), (["hinge", "nca_pair", "sft"], [0.5, 2, 1])],
    ids=lambda value: "+".join(map(str, value)) if value else "",
)
def test_loss_and_gradient_equal_the_hand_written_ones(tmp_path, loss_type, loss_weights):
    policy, reference = make_model(seed=1), make_model(seed=2)
    trainer = make_trainer(
        tmp_path, policy, ref_model=reference, loss_type=loss_type, loss_weights=loss_weights, **options_of(loss_type)
    )
    inputs = batch_of(trainer)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    ours = gradients(trainer.model, loss)

    (w, l), (len_w, len_l) = elbos_by_hand(policy, trainer, inputs, nonce=1)
    with torch.no_grad():
        (ref_w, ref_l), _ = elbos_by_hand(reference, trainer, inputs, nonce=1)
    each = losses(w, l, ref_w, ref_l, len_w, len_l, **OPTIONS)
    by_hand = sum(
        weight * each[name].mean() for name, weight in zip(loss_type, loss_weights or [1] * len(loss_type), strict=True)
    )
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert_same_gradients(ours, gradients(policy, by_hand))


REFERENCES = [
    "adapter off",
    "ref adapter",
    "copy of the model",
    "separate model",
    "precomputed",
    "precomputed, adapter",
]


def trainer_with_reference(tmp_path, route, **options):
    lora = LoraConfig(r=4)
    if route == "ref adapter":
        torch.manual_seed(3)
        lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        return make_trainer(tmp_path, get_peft_model(make_model(), lora), **options)
    if route == "separate model":
        return make_trainer(tmp_path, make_model(), ref_model=make_model(), **options)
    return make_trainer(
        tmp_path,
        peft_config=lora if "adapter" in route else None,
        precompute_ref_log_probs="precomputed" in route,
        **options,
    )


@pytest.mark.parametrize("route", REFERENCES)
@pytest.mark.parametrize("bf16", [False, True])
def test_a_policy_equal_to_its_reference_has_loss_ln_2_exactly(tmp_path, route, bf16):
    trainer = trainer_with_reference(tmp_path, route, bf16=bf16, stratify=bf16, learning_rate=0.0, max_steps=2)
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        assert entry["loss"] == torch.tensor(2.0).log().item()
        for name in ("chosen", "rejected", "margins", "accuracies"):
            assert entry[f"rewards/{name}"] == 0.0


@pytest.mark.parametrize("route", REFERENCES)
def test_the_reference_stays_where_the_policy_began(tmp_path, route):
    """After some training, rewards are beta times the ELBO's change since the start, on the same draws."""
    trainer = trainer_with_reference(tmp_path, route, max_steps=3)
    start = copy.deepcopy(trainer.model)
    trainer.train()
    precomputed = trainer.precompute_ref_logps
    nonce = 0 if precomputed else trainer.state.global_step + 1
    inputs = batch_of(trainer)
    trainer._metrics["train"].clear()
    with torch.no_grad():
        trainer.model.train()
        trainer.compute_loss(trainer.model, inputs)
        (now, _), _ = elbos_by_hand(trainer.model, trainer, inputs, nonce)
        (before, _), _ = elbos_by_hand(start, trainer, inputs, nonce)
    expected = 0.2 * (now - before).mean().item()
    assert abs(expected) > 1e-3
    assert trainer._metrics["train"]["rewards/chosen"][0] == pytest.approx(expected, rel=1e-3)


def test_unshared_draws(tmp_path):
    """The reference is scored on draws of its own; everything else is as before."""
    policy, reference = make_model(seed=1), make_model(seed=2)
    trainer = make_trainer(tmp_path, policy, ref_model=reference, share_draws=False)
    inputs = batch_of(trainer)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    policy_nonce, reference_nonce = trainer._draw_nonces("train")
    assert policy_nonce != reference_nonce
    (w, l), lengths = elbos_by_hand(policy, trainer, inputs, policy_nonce)
    (ref_w, ref_l), _ = elbos_by_hand(reference, trainer, inputs, reference_nonce)
    assert loss.item() == pytest.approx(
        losses(w, l, ref_w, ref_l, *lengths, beta=0.2)["sigmoid"].mean().item(), rel=1e-5
    )


# Draws in a run


def test_every_step_has_new_draws_and_evaluation_has_its_own(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, eval_dataset=make_pairs(3))
    nonces, draw_nonces = [], trainer._draw_nonces
    trainer._draw_nonces = lambda mode: nonces.append((mode, draw_nonces(mode))) or draw_nonces(mode)
    trainer.train()
    assert [pair for mode, pair in nonces if mode == "train"] == [(1, 1), (2, 2), (3, 3)]
    assert {pair for mode, pair in nonces if mode == "eval"} == {(0, 0)}


def test_two_evaluations_meet_the_same_noise(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=4), eval_dataset=make_pairs(4), max_steps=2)
    keys = ("eval_loss", "eval_logps/chosen", "eval_rewards/margins")
    first, second = trainer.evaluate(), trainer.evaluate()
    assert [first[k] for k in keys] == [second[k] for k in keys]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != first["eval_loss"]


def test_evaluation_does_not_depend_on_its_batches(tmp_path):
    """A last batch that is smaller counts for what it holds."""
    policy, reference, found = make_model(seed=1), make_model(seed=2), []
    for size in (1, 3, 5):
        trainer = make_trainer(
            tmp_path, policy, ref_model=reference, eval_dataset=make_pairs(5), per_device_eval_batch_size=size
        )
        found.append({k: v for k, v in trainer.evaluate().items() if "runtime" not in k and "per_second" not in k})
        found[-1].pop("eval_model_preparation_time", None)
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)
    assert abs(found[0]["eval_rewards/margins"]) > 1e-3


def test_the_own_evaluation_set_can_be_named(tmp_path):
    trainer = make_trainer(tmp_path, precompute_ref_log_probs=True, eval_dataset=make_pairs(4))
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_precomputed_references_are_keyed_by_their_draws(tmp_path):
    """Another estimator on the same data and model must not find the first one's values."""
    make_pairs().save_to_disk(tmp_path / "rows")  # values are stored beside rows that are on disk
    dataset = load_from_disk(tmp_path / "rows")
    for options in ({}, {"num_mc_samples": 2}, {"seed": 7}, {"mask_scheme": "bernoulli"}, {"stratify": False}):
        trainer = make_trainer(tmp_path, dataset=dataset, precompute_ref_log_probs=True, **options)
        inputs = batch_of(trainer)
        (ref_w, ref_l), _ = elbos_by_hand(make_model(), trainer, inputs, nonce=0)
        torch.testing.assert_close(inputs["ref_chosen_logps"], ref_w.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inputs["ref_rejected_logps"], ref_l.detach(), rtol=1e-5, atol=1e-5)


def test_a_loss_of_the_router_is_refused(tmp_path):
    """TRL would add it from what the model returns, and a score does not return it."""
    model = make_model()
    model.config.output_router_logits = False
    assert make_trainer(tmp_path, model, router_aux_loss_coef=0.0).aux_loss_enabled is False
    with pytest.raises(ValueError, match=r"`router_aux_loss_coef=0.01` adds a loss of the router.*=0.0"):
        make_trainer(tmp_path, model, router_aux_loss_coef=0.01)


def test_accumulation_does_not_change_loss_or_gradient(tmp_path):
    """1 x 6, 2 x 3, 3 x 2 and 6 x 1: the same rows in one optimiser step."""
    weights = []
    for size in (6, 3, 2, 1):
        trainer = make_trainer(
            tmp_path,
            make_model(seed=1),
            ref_model=make_model(seed=2),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=6 // size,
            max_steps=1,
            optim="sgd",
        )
        trainer.train()
        weights.append(
            (trainer.state.log_history[0]["loss"], torch.cat([p.flatten() for p in trainer.model.parameters()]))
        )
    for loss, weight in weights[1:]:
        assert loss == pytest.approx(weights[0][0], rel=1e-6)
        torch.testing.assert_close(weight, weights[0][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precompute", [False, True])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, precompute):
    def run(folder, until=4, resume=False):
        trainer = make_trainer(
            folder,
            peft_config=LoraConfig(r=4),
            precompute_ref_log_probs=precompute,
            max_steps=until,
            save_strategy="steps",
            save_steps=2,
            lr_scheduler_type="constant",
        )
        trainer.train(resume_from_checkpoint=resume)
        history = {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}
        return history, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    whole, whole_weights = run(tmp_path / "whole")
    run(tmp_path / "cut", until=2)
    resumed, resumed_weights = run(tmp_path / "cut", resume=True)
    assert resumed == whole
    assert all(torch.equal(resumed_weights[n], whole_weights[n]) for n in whole_weights)


def test_sync_ref_model(tmp_path):
    """With alpha = 1 the reference becomes the policy after each step, so every loss is ln 2."""
    trainer = make_trainer(
        tmp_path, sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=1, max_steps=2
    )
    trainer.train()
    assert [e["loss"] for e in trainer.state.log_history[:-1]] == [torch.tensor(2.0).log().item()] * 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layer_checkpointing_changes_nothing(tmp_path, checkpointing):
    trainer = make_trainer(
        tmp_path, make_model(seed=1), ref_model=make_model(seed=2), gradient_checkpointing=checkpointing, max_steps=1
    )
    trainer.train()
    plain = make_trainer(tmp_path, make_model(seed=1), ref_model=make_model(seed=2), max_steps=1)
    plain.train()
    for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# Metrics and card


def test_metrics(tmp_path):
    trainer = make_trainer(tmp_path, make_model(seed=1), ref_model=make_model(seed=2), max_steps=1)
    inputs = batch_of(trainer, range(6))
    trainer.model.train()
    with torch.no_grad():
        trainer.compute_loss(trainer.model, inputs)
    logged = {key: values[0] for key, values in trainer._metrics["train"].items() if isinstance(values, list)}
    assert set(logged) == {
        "num_tokens",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "elbo/change_chosen",
        "elbo/change_rejected",
        "elbo/mask_ratio",
        "elbo/saturation",
        "elbo/score_variance",
        "elbo/score_standard_error",
    }
    maskable = inputs["completion_mask"].bool()
    draws = trainer._sampler(maskable, inputs["input_ids"], inputs["attention_mask"], 1)
    policy, reference = (
        elbo(model, inputs["input_ids"], maskable, inputs["attention_mask"], draws=draws).samples
        for model in (make_model(seed=1), make_model(seed=2))
    )
    chosen, rejected = (0.2 * (policy - reference)).chunk(2, dim=1)
    first, second, single = chosen - rejected  # a mirror pair and a draw of its own
    score = (first + second + single) / 3
    variance = ((first + second - 2 * score) ** 2 / 2 + (single - score) ** 2) / 3  # in proportion to a unit's draws
    assert logged["elbo/score_variance"] == pytest.approx(variance.mean().item(), rel=1e-4)
    assert logged["elbo/score_standard_error"] == pytest.approx(variance.sqrt().mean().item(), rel=1e-4)
    assert logged["elbo/saturation"] == pytest.approx(
        (1 / torch.cosh(score / 2) ** 2).neg().add(1).mean().item(), rel=1e-4
    )
    ratio = (draws.masked.sum((0, 2)) / maskable.sum(1) / 3).mean().item()
    assert logged["elbo/mask_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert logged["rewards/margins"] == pytest.approx(score.mean().item(), rel=1e-4)


@pytest.mark.parametrize("scheme, couple_pairs", [("fixed_count", False), ("mirror", True)])
def test_score_variance_is_the_variance_of_the_score(tmp_path, scheme, couple_pairs):
    """Over many nonces, the logged variance agrees with the spread of the margin itself."""
    trainer = make_trainer(
        tmp_path,
        make_model(seed=1),
        ref_model=make_model(seed=2),
        num_mc_samples=4,
        stratify=False,
        mask_scheme=scheme,
        control_variate="none",
        couple_pairs=couple_pairs,
    )
    inputs, margins = batch_of(trainer, [3]), []
    trainer.model.train()
    with torch.no_grad():
        for step in range(300):
            trainer.state.global_step = step
            trainer.compute_loss(trainer.model, inputs)
    margins = torch.tensor(trainer._metrics["train"]["rewards/margins"]).double()
    variances = torch.tensor(trainer._metrics["train"]["elbo/score_variance"]).double()
    squared = (margins - margins.mean()) ** 2
    error = math.hypot(squared.std() / 300**0.5, variances.std() / 300**0.5)
    assert abs(squared.mean() - variances.mean()) < 4 * error


def test_model_card(tmp_path):
    trainer = make_trainer(tmp_path, num_mc_samples=5)
    trainer.create_model_card(model_name="my-model", dataset_name="some/dataset", tags="mine")
    card = (tmp_path / "README.md").read_text()
    for expected in (
        "2505.19223",
        "generate(model, ",
        "AutoModelForCausalLM.from_pretrained",
        "5 draws per response",
        "- vrpo",
        "- mine",
        "some/dataset",
        "trl: 1.16",
    ):
        assert expected in card
    assert "pipeline(" not in card


def bidirectional_llama():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=30, **sizes, mask_token_id=2, pad_token_id=0, eos_token_id=0)
    config.is_causal = False
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("make", [make_model, bidirectional_llama])
def test_the_snippet_of_the_model_card_runs(tmp_path, make, capsys):
    """As it is printed, with a folder for the name of a repository."""
    trainer = make_trainer(tmp_path, make(), max_steps=1)
    trainer.save_model()
    trainer.create_model_card(model_name=str(tmp_path))
    snippet = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    words = make_tokenizer().get_vocab()
    capsys.readouterr()
    names = {}
    exec(snippet, names)
    assert type(names["model"]) is type(make())
    assert names["output"].shape[1] == names["inputs"]["input_ids"].shape[1] + 128
    assert set(capsys.readouterr().out.split()) <= set(words)
