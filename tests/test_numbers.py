"""
No step is taken on a wrong number: what is not finite is named and stopped, sums over thousands of tokens keep their
precision, and the weights of a scheme cannot overflow.
"""

import math

import pytest
import test_kto
import test_trainers
import torch
from conftest import make_model, make_pairs, make_tokenizer
from datasets import Dataset
from peft import LoraConfig

from trl_diffusion import DiffusionVRPOConfig, DiffusionVRPOTrainer, draw_masks, elbo
from trl_diffusion.estimators.elbo import noise_inputs, weigh
from trl_diffusion.estimators.schemes import SCHEMES
from trl_diffusion.resuming.checkpoints import problem_of
from trl_diffusion.scoring.head import ELBOHead

EPS = torch.finfo(torch.float32).eps


def poison(model, token, value):
    """The logit of one token, and so every masked log-probability of a position, is no number."""
    with torch.no_grad():
        model.model.transformer["ff_out"].weight[token] = value
    return model


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("whose", ["policy", "reference", "precomputed reference"])
def test_the_example_and_the_draw_are_named(tmp_path, value, whose):
    bad, good = poison(make_model(), 9, value), make_model()
    names = r"row \d of the batch, position \d+, draw \d.* The example is 'what is .*<\|endoftext\|>"
    with pytest.raises(ValueError, match=f"log-probability of a masked token is .*{names}"):
        if whose == "precomputed reference":
            test_trainers.make_trainer(tmp_path, bad, precompute_ref_log_probs=True)
        else:
            policy, reference = (bad, good) if whose == "policy" else (good, bad)
            test_trainers.make_trainer(tmp_path, policy, ref_model=reference, max_steps=1).train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_named_example_is_the_one(tmp_path):
    """Only one row's answer meets the broken embedding."""
    model = make_model()
    rows = make_pairs(3).to_list() + [{"prompt": "what is two ", "chosen": "hi bye hi", "rejected": "six"}]
    trainer = test_trainers.make_trainer(
        tmp_path, model, dataset=Dataset.from_list(rows), per_device_train_batch_size=4
    )
    token = trainer._tokenizer.convert_tokens_to_ids("bye")
    with torch.no_grad():
        model.model.transformer["wte"].weight[token] = torch.nan
    trainer.model.train()
    with pytest.raises(ValueError, match=r"row 3 of the batch.* The example is 'what is two hi bye hi"):
        for _ in range(9):  # until a draw leaves the word visible
            trainer.compute_loss(trainer.model, test_trainers.batch_of(trainer, range(4)))
            trainer.state.global_step += 1


def test_an_optimiser_of_other_weights_trains_nothing(tmp_path):
    """Made before the adapter was, as TRL and transformers accept it."""
    model = make_model()
    trainer = DiffusionVRPOTrainer(
        model,
        args=DiffusionVRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=1),
        train_dataset=make_pairs(2),
        processing_class=make_tokenizer(),
        optimizers=(torch.optim.SGD(model.parameters()), None),
        peft_config=LoraConfig(r=2),
    )
    with pytest.raises(RuntimeError, match="At step 1 no weight of the optimiser has a gradient.*leave `optimizers`"):
        trainer.train()


@pytest.mark.parametrize("name, clip", [("vrpo", 1.0), ("kto", 0.0)])
def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(tmp_path, name, clip):
    """One infinite element at step 2: after clipping all would be NaN. The weights are those of step 1."""
    make = {"vrpo": test_trainers.make_trainer, "kto": test_kto.make_trainer}[name]
    options = {"peft_config": LoraConfig(r=2), "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    trainer = make(tmp_path, max_grad_norm=clip, **options)
    first = next(p for n, p in trainer.model.named_parameters() if "lora_B" in n)

    def overflow(gradient):
        if trainer.state.global_step == 1:
            gradient = gradient.clone()
            gradient[0, 0] = torch.inf
        return gradient

    first.register_hook(overflow)
    with pytest.raises(FloatingPointError, match="gradient of step 2 is not finite.*the weights are those of step 1"):
        trainer.train()
    assert problem_of(tmp_path / "checkpoint-1") == "" and not (tmp_path / "checkpoint-2").exists()
    once = make(tmp_path / "once", max_grad_norm=clip, **{**options, "max_steps": 3, "save_steps": 9})
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    once.add_callback(Stop())
    once.train()
    for ours, expected in zip(trainer.model.parameters(), once.model.parameters(), strict=True):
        assert torch.equal(ours, expected)


# Weights of a scheme


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("level", [0.0, 1 - 2.0**-53], ids=["all", "least"])
def test_the_most_extreme_level_is_finite(monkeypatch, scheme, level):
    """1/t is at most 2^53, and such a draw hides a token with probability 2^-53; nothing overflows in float32."""

    def constant(bits):
        return torch.full(bits.shape, level, dtype=torch.float64)

    for module in ("draws", "schemes"):
        monkeypatch.setattr(f"trl_diffusion.estimators.{module}.uniform", constant)
    draws = draw_masks(torch.ones(2, 5, dtype=torch.bool), 4, scheme)
    assert torch.isfinite(draws.weight).all()
    assert (draws.weight <= 2.0**53).all() and (draws.weight[draws.masked] > 0).all()
    absurd = torch.full((4, 2, 5), -1e4)  # nats for a token
    out = weigh(absurd, draws)
    assert torch.isfinite(out.value).all() and torch.isfinite(out.samples).all()


def test_levels_are_in_the_half_open_interval():
    """A level of zero would divide by zero: t = 1 - u with u below one."""
    draws = draw_masks(torch.ones(64, 3, dtype=torch.bool), 256, "bernoulli", rows=torch.arange(192).view(64, 3))
    hidden = draws.weight[draws.masked]
    assert (hidden >= 1 / 256 - 1e-9).all() and torch.isfinite(hidden).all()


# Precision

LENGTH, VOCABULARY, DRAWS = 4096, 61, 4


def logits_of(dtype):
    generator = torch.Generator().manual_seed(0)
    return (4 * torch.randn(1, LENGTH, VOCABULARY, generator=generator)).to(dtype)


def exact_value(logits, ids, draws):
    """The same sum in float64, term by term."""
    log_probs = logits.double().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    terms = (draws.masked * draws.weight.double() * log_probs).flatten()
    return math.fsum(terms.tolist()), terms.abs().sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_over_thousands_of_tokens_keeps_float32(dtype):
    """
    The error of the estimate, logits given, against float64.

    A log-softmax in float32 is off by a few units in the last place of its largest term, and a pairwise sum of n terms
    by log2(n): within 2 log2(n) eps of the sum of magnitudes. In bfloat16 the same terms are off by far more, so the
    bound can tell.
    """
    logits = logits_of(dtype)
    ids = torch.randint(0, VOCABULARY - 1, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    draws = draw_masks(torch.ones(1, LENGTH, dtype=torch.bool), DRAWS, rows=ids)
    out = elbo(lambda **_: logits, ids, torch.ones(1, LENGTH, dtype=torch.bool), draws=draws, mask_token_id=60)
    exact, magnitude = exact_value(logits, ids, draws)
    bound = 2 * math.log2(DRAWS * LENGTH) * EPS * magnitude
    assert out.value.dtype == torch.float32
    assert abs(out.value.item() - exact) < bound < 1e-4 * magnitude
    coarse = logits.bfloat16().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    coarse = (draws.masked * draws.weight.bfloat16() * coarse).sum()
    assert abs(coarse.item() - exact) > 10 * bound


def test_the_head_scores_a_bfloat16_model_no_worse_than_its_logits():
    """
    Through the head, on the hidden states that a bfloat16 model has: against float64 from the same states.

    A logit that is rounded to bfloat16 is off by 2^-9 of itself at most, with either sign, and the log-probability is
    by no more than that of the largest logit: five standard deviations of the weighted sum.
    """
    model, length = make_model().bfloat16(), 512
    ids = torch.randint(7, 30, (1, length), generator=torch.Generator().manual_seed(2))
    maskable = (torch.arange(length) >= 4).unsqueeze(0)
    draws = draw_masks(maskable, 2, rows=ids, attention_mask=torch.ones_like(ids))

    class Given:
        num_mc_samples = 2

        def __call__(self, *args, blocks=None):
            return draws

    labels = ids.masked_fill(~maskable, -100)
    with torch.no_grad():
        scored = ELBOHead(sampler=Given(), mask_token_id=2)(model, ids, labels).log_probs
        exact, largest = 0.0, 0.0
        for masked, weight in zip(draws.masked, draws.weight, strict=True):
            noised = noise_inputs(ids, masked, 2)
            hidden = model.base_model(input_ids=noised.repeat(2, 1)).last_hidden_state[0].double()
            logits = hidden @ model.get_output_embeddings().weight.double().T
            largest = max(largest, logits.abs().max().item())
            log_probs = logits.log_softmax(-1).gather(-1, ids[0].unsqueeze(-1)).squeeze(-1)
            exact += (masked[0] * weight[0].double() * log_probs).sum().item()
    assert scored.dtype == torch.float32
    assert abs(scored.double().sum().item() - exact) < 5 * draws.weight.norm().item() * 2.0**-9 * largest
