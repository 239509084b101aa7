"""Every way to compute the gradient gives that of plain autograd; what they cost is counted."""

import logging
import re

import pytest
import torch
from conftest import make_model, make_pairs
from counters import HidesEverything, LiveBytes, matmul_flops
from dpo_reference import options_of
from peft import LoraConfig, get_peft_model
from test_head import cost_model, make_batch, peak_of_training, scored
from test_kto import make_trainer as make_kto_trainer
from test_trainers import LOSS_TYPES, assert_same_gradients, make_trainer
from transformers import TrainerCallback

from trl_diffusion import DiffusionVRPOConfig, LLaDAConfig, MaskSampler, elbo
from trl_diffusion.models.llada.family import LLADA
from trl_diffusion.planning.skeleton import without_memory
from trl_diffusion.scoring import gradients, head
from trl_diffusion.scoring.gradients import choose_gradient_mode
from trl_diffusion.trainers.elbo_kto.baselines import BASELINES

MODES = ("immediate", "checkpoint", "graph")
TARGETS = LLADA.lora_target_modules


def lora(**options):
    return LoraConfig(r=4, target_modules=TARGETS, **options)


def wrapped(model=None, dtype=torch.float32):
    """A model with an adapter that does something, its reference being itself without it."""
    torch.manual_seed(3)
    model = get_peft_model(
        (model or make_model()).to(dtype), lora(init_lora_weights=False), autocast_adapter_dtype=False
    )
    return model.train()


def gradients_of_two_micro_batches(trainer):
    """As in accumulation: the gradients of two batches add up in the weights."""
    trainer.model.train()
    for rows in ((0, 1, 2), (3, 4, 5)):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in rows])
        trainer.compute_loss(trainer.model, batch).backward()
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def by_mode(make, tmp_path, layers, **options):
    """Gradients by mode, from the same adapter weights."""
    found = {}
    for mode in MODES:
        torch.manual_seed(5)
        options |= {"elbo_gradient": mode, "gradient_checkpointing": layers, "draws_per_forward": 2}
        trainer = make(tmp_path, peft_config=lora(), **options)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # zero at the start, where the gradients of the other half are zero too
                torch.nn.init.normal_(parameter, std=0.1)
        found[mode] = gradients_of_two_micro_batches(trainer)
    return found


VRPO_LOSSES = [*(([name], None) for name in LOSS_TYPES.split()), (["sigmoid", "sft"], [1, 0.05])]


@pytest.mark.parametrize("loss_type, loss_weights", VRPO_LOSSES, ids=lambda v: "+".join(map(str, v)) if v else "")
@pytest.mark.parametrize("layers", [False, True])
def test_modes_agree_for_vrpo(tmp_path, loss_type, loss_weights, layers):
    found = by_mode(
        make_trainer, tmp_path, layers, loss_type=loss_type, loss_weights=loss_weights, **options_of(loss_type)
    )
    for mode in ("immediate", "checkpoint"):
        assert_same_gradients(found[mode], found["graph"], rtol=1e-5)


@pytest.mark.parametrize("baseline", [*sorted(BASELINES), "kl"])
def test_modes_agree_for_elbo_kto(tmp_path, baseline):
    found = by_mode(make_kto_trainer, tmp_path, True, baseline=baseline)
    for mode in ("immediate", "checkpoint"):
        assert_same_gradients(found[mode], found["graph"], rtol=1e-5)


def test_modes_agree_for_full_training(tmp_path):
    found = {}
    for mode in MODES:
        trainer = make_trainer(tmp_path, make_model(seed=1), ref_model=make_model(seed=2), elbo_gradient=mode)
        found[mode] = gradients_of_two_micro_batches(trainer)
    for mode in ("immediate", "checkpoint"):
        assert_same_gradients(found[mode], found["graph"], rtol=1e-5)


def test_bfloat16_is_no_worse_than_the_graph():
    """Error against float32, of a gradient that sums many draws."""
    batch, sampler = make_batch(), MaskSampler(16)
    weights = torch.tensor([1.0, -2.0, 0.5])

    def gradient(mode, dtype):
        model = wrapped(dtype=dtype)
        (scored(model.get_base_model(), batch, sampler, elbo_gradient=mode).log_probs.sum(1) @ weights).backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])

    truth = gradient("graph", torch.float32)
    errors = {mode: (gradient(mode, torch.bfloat16) - truth).norm() for mode in MODES}
    assert errors["immediate"] <= 1.05 * errors["graph"]
    assert errors["checkpoint"] <= 1.05 * errors["graph"]


@pytest.mark.parametrize("mode", MODES)
def test_draws_that_mask_nothing(mode):
    """A Bernoulli draw can; it costs a forward and adds nothing."""
    model, batch, sampler = wrapped(), make_batch((5, 6), prompt=3), MaskSampler(16, "bernoulli", seed=1)
    maskable = batch["labels"] != -100
    draws = sampler(maskable, batch["input_ids"], batch["attention_mask"], 1)
    assert (~draws.masked.any(-1)).any()
    plain = elbo(model.get_base_model(), batch["input_ids"], maskable, batch["attention_mask"], draws=draws).value.sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(plain, parameters)
    value = scored(model.get_base_model(), batch, sampler, elbo_gradient=mode, draws_per_forward=1).log_probs.sum()
    assert value.item() == pytest.approx(plain.item(), rel=1e-5)
    for found, wanted in zip(torch.autograd.grad(value, parameters), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("mode", MODES)
def test_a_second_backward_is_torchs_own_matter(mode):
    """An error that says what to do, or with `retain_graph=True` the same gradient again."""
    model, batch = wrapped(), make_batch()
    parameters = [p for p in model.parameters() if p.requires_grad]
    value = scored(model.get_base_model(), batch, elbo_gradient=mode).log_probs.sum()
    first = torch.autograd.grad(value, parameters, retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(value, parameters), strict=True):
        assert torch.equal(once, again)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


# What auto picks


@pytest.mark.parametrize("make", [wrapped, make_model])
def test_auto_is_immediate_as_long_as_the_waiting_gradients_are_small(monkeypatch, make):
    """By bytes, whatever is trained: a quarter of the weights, or a gigabyte; here by hand, in float32."""
    model = make()
    weights = 4 * sum(p.numel() for p in model.parameters())
    gradient = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert choose_gradient_mode("auto", model, num_responses=10**9 // gradient)[0] == "immediate"
    mode, reason = choose_gradient_mode("auto", model, num_responses=10**9 // gradient + 1)
    assert mode == "checkpoint" and "takes 1.00 GB, which is much" in reason
    monkeypatch.setattr(gradients, "SMALL", 0)
    most = weights // 4 // gradient
    assert choose_gradient_mode("auto", model, num_responses=most + 1)[0] == "checkpoint"
    assert most == 0 or choose_gradient_mode("auto", model, num_responses=most)[0] == "immediate"


@pytest.mark.parametrize(
    "modules_to_save, num_responses, mode",
    [(None, 24, "immediate"), (None, 25, "checkpoint"), (["wte", "transformer.ff_out"], 2, "checkpoint")],
)
def test_auto_at_the_size_of_llada_8b(modules_to_save, num_responses, mode):
    """An adapter's gradient takes 0.17 GB of the weights' 16.2; with both vocabularies trained it takes 4.3 GB."""
    lora = LoraConfig(r=16, modules_to_save=modules_to_save)
    model = without_memory(LLaDAConfig(mlp_hidden_size=12288), "bfloat16", lora)
    assert choose_gradient_mode("auto", model, num_responses=num_responses)[0] == mode


def reentrant(model):
    model.activation_checkpointing_enable({"use_reentrant": True})


def sharded_by_deepspeed(model):
    next(p for p in model.parameters() if p.requires_grad).ds_id = 0


def sharded_by_fsdp(model):
    next(p for p in model.parameters() if p.requires_grad).full_tensor = None


OBSTACLES = [
    (reentrant, "layer checkpointing is reentrant"),
    (sharded_by_deepspeed, "the weights are sharded"),
    (sharded_by_fsdp, "the weights are sharded"),
]


@pytest.mark.parametrize("obstruct, message", OBSTACLES)
def test_obstacles_to_immediate(obstruct, message):
    model = wrapped().get_base_model()
    obstruct(model)
    mode, reason = choose_gradient_mode("auto", model)
    assert mode == "checkpoint" and message in reason
    with pytest.raises(ValueError, match=f"`elbo_gradient='immediate'` cannot be used: {message}.*'checkpoint'"):
        choose_gradient_mode("immediate", model)


def test_reentrant_layer_checkpointing_under_checkpoint_is_exact():
    """What is advised against the obstacle."""
    found = []
    for layers in (None, True):
        model, batch = wrapped(), make_batch()
        base = model.get_base_model()
        if layers:
            base.activation_checkpointing_enable({"use_reentrant": True})
            base.enable_input_require_grads()
        scored(base, batch).log_probs.sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_same_gradients(found[1], found[0], rtol=1e-5)


def announcements(caplog):
    return [r.getMessage() for r in caplog.records if "`elbo_gradient='auto'` is" in r.getMessage()]


@pytest.mark.parametrize("room, mode, reason", [(10**9, "'immediate'", "which is little"), (0, "'checkpoint'", "much")])
def test_a_run_says_once_what_auto_is(tmp_path, monkeypatch, caplog, room, mode, reason):
    monkeypatch.setattr(gradients, "SMALL", room)
    with caplog.at_level(logging.INFO, logger="trl_diffusion"):
        trainer = make_trainer(tmp_path, max_steps=2, eval_dataset=make_pairs(2))
        trainer.evaluate()
        assert not announcements(caplog)  # nothing is trained yet
        trainer.train()
    (said,) = announcements(caplog)
    assert mode in said and reason in said and "for each of 6 responses" in said


def test_what_was_asked_for_is_not_announced(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="trl_diffusion"):
        make_trainer(tmp_path, peft_config=lora(), max_steps=1, elbo_gradient="checkpoint").train()
    assert not announcements(caplog)


def test_the_choice_is_made_once(monkeypatch):
    asked = []
    monkeypatch.setattr(head, "choose_gradient_mode", lambda *args: asked.append(1) or choose_gradient_mode(*args))
    model, batch = wrapped().get_base_model(), make_batch()
    scorer = head.ELBOHead(MaskSampler(2), mask_token_id=2)
    for _ in range(3):
        scorer(model, **batch)
    assert asked == [1]


class _Unfreezes(TrainerCallback):
    """Gradual unfreezing: the first block is trained from the second step on. Keeps the gradients of its weights."""

    def __init__(self):
        self.gradients = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if "blocks.0" in name and "lora" in name:
                parameter.requires_grad_(state.global_step > 0)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        mine = {n: p.grad for n, p in model.named_parameters() if "blocks.0" in n and p.grad is not None}
        self.gradients.append({name: gradient.clone() for name, gradient in mine.items() if bool(gradient.any())})


def test_weights_that_are_unfrozen_in_between(tmp_path):
    found = {}
    for mode in MODES:
        torch.manual_seed(5)
        callback = _Unfreezes()
        options = {"max_steps": 2, "optim": "sgd", "elbo_gradient": mode}
        trainer = make_trainer(tmp_path, peft_config=lora(), **options)
        trainer.add_callback(callback)
        trainer.train()
        found[mode] = callback.gradients
    for mode in MODES:
        assert not found[mode][0] and found[mode][1]
        assert_same_gradients(found[mode][1], found["graph"][1])


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_the_score_does_not_reach_have_no_gradient(mode):
    """None and not zero: weight decay would move them."""
    model = wrapped().get_base_model()
    model.unused = torch.nn.Linear(4, 4)
    scorer = head.ELBOHead(MaskSampler(3), mask_token_id=2, elbo_gradient=mode, draws_per_forward=1)
    scorer(model, **make_batch()).log_probs.sum().backward()
    assert model.unused.weight.grad is None
    assert sum(p.grad is not None for p in model.parameters()) == sum("lora" in n for n, _ in model.named_parameters())


class _Scaled:
    """Stands for the scaler of fp16, which `accelerate launch --mixed_precision fp16` asks for too."""


@pytest.mark.parametrize("elbo_gradient", ["auto", "immediate"])
def test_a_scaled_loss_is_not_for_immediate(tmp_path, monkeypatch, caplog, elbo_gradient):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "scaler", _Scaled(), raising=False)
    monkeypatch.setattr(Accelerator, "__setattr__", _unless_scaler)
    options = {"peft_config": lora(), "elbo_gradient": elbo_gradient}
    if elbo_gradient == "immediate":
        with pytest.raises(ValueError, match="`elbo_gradient='immediate'` cannot be used: the loss is scaled"):
            make_trainer(tmp_path, **options)
        return
    with caplog.at_level(logging.INFO, logger="trl_diffusion"):
        trainer = make_trainer(tmp_path, **options)
        gradients_of_two_micro_batches(trainer)
    (said,) = announcements(caplog)
    assert "'checkpoint'" in said and "fp16" in said


def _unless_scaler(self, name, value):
    if name != "scaler":
        object.__setattr__(self, name, value)


@pytest.mark.parametrize(
    "loss", [lambda terms: terms[:, 5:].sum(), lambda terms: terms.square().sum()], ids=["some tokens", "each its own"]
)
def test_losses_of_tokens_are_refused_under_immediate(loss):
    batch = make_batch()
    terms = scored(wrapped().get_base_model(), batch, elbo_gradient="immediate").log_probs
    with pytest.raises(ValueError, match="`elbo_gradient='immediate'` knows the gradient of a response's ELBO.*tokens"):
        loss(terms).backward()
    loss(scored(wrapped().get_base_model(), batch, elbo_gradient="checkpoint").log_probs).backward()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"elbo_gradient": "later"}, "`elbo_gradient` must be one of .*got 'later'"),
        ({"elbo_gradient": "immediate", "fp16": True}, "cannot be used with `fp16=True`.*bf16=True"),
        (
            {"elbo_gradient": "immediate", "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "cannot be used with `gradient_checkpointing_kwargs=.'use_reentrant': True.`.*'checkpoint'",
        ),
    ],
)
def test_refusals(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionVRPOConfig(str(tmp_path), use_cpu=True, **options)


# Cost


def cost_batch():
    return make_batch((64, 48), prompt=16, vocab=599)


@pytest.mark.parametrize("layers, bound", [(False, 1.02), (True, 1.35)])
def test_immediate_computes_nothing_twice(layers, bound):
    """
    Needed for a step: every frozen linear forward, for the policy and for the reference, and the gradient of its input;
    the adapters forward and both gradients; the head as the frozen linears. The kernel of the head computes its tile
    once more, layer checkpointing the blocks. The first block's input needs no gradient, as the embedding is frozen.
    """
    model, batch, sampler = wrapped(cost_model()), cost_batch(), MaskSampler(8)
    base = model.get_base_model()
    if layers:
        base.activation_checkpointing_enable()

    def step():
        with torch.no_grad(), model.disable_adapter():
            scored(base, batch, sampler)
        scored(base, batch, sampler).log_probs.sum().backward()

    counted = matmul_flops(step)
    frozen = sum(p.numel() for n, p in model.named_parameters() if "base_layer" in n)
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora" in n)
    head = base.get_output_embeddings().weight.numel()
    tokens = 8 * int(batch["attention_mask"].sum())
    masked = int(sampler(batch["labels"] != -100, batch["input_ids"], batch["attention_mask"], 1).masked.sum())
    first = [m for n, m in model.named_modules() if re.search(r"blocks\.0\.[qkv]_proj$", n)]
    not_needed = sum(m.base_layer.weight.numel() + m.lora_A["default"].weight.numel() for m in first)
    needed = 2 * (3 * frozen * tokens + 3 * adapters * tokens + 3 * head * masked)
    twice = 2 * (head * masked + layers * (frozen + adapters) * tokens)
    exact = needed + twice - 2 * not_needed * tokens
    # Layer checkpointing stops before the last product of a block, whose result nothing needs
    last = layers * sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("ff_out.lora_B.default"))
    assert counted == exact - 2 * last * tokens
    assert counted <= bound * needed


@pytest.mark.parametrize("layers", [False, True])
def test_memory_of_immediate_does_not_grow_with_the_number_of_draws(layers):
    model, batch = wrapped(cost_model()), make_batch((64,), prompt=16, vocab=599)
    base = model.get_base_model()
    if layers:
        base.activation_checkpointing_enable()
    few, many = (peak_of_training(base, batch, number, draws_per_forward=1).peak for number in (2, 32))
    assert many <= 1.02 * few


def test_immediate_keeps_a_tenth_of_what_the_direct_way_keeps():
    """At equal draws: the definition, with full logits and every graph kept until the backward."""
    model, batch = wrapped(cost_model()), cost_batch()
    base, maskable = model.get_base_model(), batch["labels"] != -100
    draws = HidesEverything(16)(maskable, batch["input_ids"], batch["attention_mask"])
    ours = peak_of_training(base, batch, 16, draws_per_forward=1).peak
    with LiveBytes() as direct:
        elbo(base, batch["input_ids"], maskable, batch["attention_mask"], draws=draws).value.sum().backward()
    assert ours <= direct.peak / 10
