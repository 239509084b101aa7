"""
The law: trainers, references, the diagnosis and the estimate of memory know nothing of blocks, and are right.
"""

import pytest
import torch
from block_reference import block_numbers, block_terms, of_model
from peft import LoraConfig, get_peft_model
from test_decoders import FOLDERS
from test_diagnose import diagnose
from test_kto import make_trainer as make_kto_trainer
from test_memory import peak_of_step
from test_sft import batch_of as sft_batch_of
from test_sft import make_trainer as make_sft_trainer
from test_trainers import assert_same_gradients, batch_of, gradients, make_trainer

from trl_diffusion import MaskSampler, estimate_memory
from trl_diffusion.estimators.control_variate import ControlVariate
from trl_diffusion.estimators.variance import Scored, fixed_count_samples, repeats
from trl_diffusion.models.decoders.block_diffusion import SDARForCausalLM
from trl_diffusion.models.decoders.configuration import SDARConfig

LN2 = torch.tensor(2.0).log().item()
REFERENCES = {
    "adapter off": {"peft_config": LoraConfig(r=2)},
    "a copy": {},
    "precomputed": {"precompute_ref_log_probs": True, "peft_config": LoraConfig(r=2)},
}


def models(name="SDAR"):
    """A policy, and a reference that differs."""
    policy, reference = FOLDERS[name].model(), FOLDERS[name].model()
    generator = torch.Generator().manual_seed(1)
    for weight in reference.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return policy, reference


USERS = {"bf16": True, "gradient_checkpointing": True}
STARTS = [("SDAR", "adapter off", {}), ("Fast-dLLM v2", "a copy", {})]
STARTS += [("LLaDA2", "adapter off", USERS)]
STARTS += [(name, reference, USERS) for name in ("SDAR", "Fast-dLLM v2") for reference in REFERENCES]


@pytest.mark.parametrize(("name", "reference", "options"), STARTS, ids=str)
def test_a_policy_starts_at_its_reference(name, reference, options, tmp_path):
    """Exactly, whichever way the reference is had; and leaves it with the first step."""
    trainer = make_trainer(tmp_path, FOLDERS[name].model(), max_steps=2, **REFERENCES[reference], **options)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["loss"] == LN2 and first["rewards/margins"] == 0.0 and second["loss"] != LN2


def test_feedback_starts_at_its_reference(tmp_path):
    trainer = make_kto_trainer(tmp_path, FOLDERS["SDAR"].model(), peft_config=LoraConfig(r=2), max_steps=2)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["loss"] == 0.5 and second["loss"] != 0.5


@pytest.mark.parametrize("name", ["SDAR", "Fast-dLLM v2"])
def test_the_loss_is_that_of_the_definition(name, tmp_path):
    """A pair's margin and its gradient, from one forward for each block of each draw."""
    policy, reference = models(name)
    trainer = make_trainer(tmp_path, policy, ref_model=reference)
    inputs = batch_of(trainer)
    trainer.model.train()
    ours = trainer.compute_loss(trainer.model, inputs)
    found = gradients(trainer.model, ours)
    maskable = inputs["completion_mask"].bool()
    batch = {**inputs, "labels": inputs["input_ids"].masked_fill(~maskable, -100)}
    numbers = block_numbers(batch, 4)
    draws = trainer._sampler(maskable, inputs["input_ids"], inputs["attention_mask"], 1, blocks=numbers)
    shift = FOLDERS[name].shift
    values = block_terms(of_model(policy), batch, draws, numbers, shift).sum(1)
    with torch.no_grad():
        of_reference = block_terms(of_model(reference), batch, draws, numbers, shift).sum(1)
    chosen, rejected = (values - of_reference).chunk(2)
    by_hand = -torch.nn.functional.logsigmoid(trainer.beta * (chosen - rejected)).mean()
    torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=1e-6)
    assert_same_gradients(found, gradients(policy, by_hand))


def test_supervised_fine_tuning_is_of_the_definition(tmp_path):
    """Ends of text that follow an answer among it, and its blocks cut by both of its ends."""
    model = FOLDERS["SDAR"].model()
    trainer = make_sft_trainer(tmp_path, model, num_mc_samples=3)
    inputs = sft_batch_of(trainer)
    trainer.model.train()
    ours = trainer.compute_loss(trainer.model, dict(inputs))
    found, maskable, numbers = gradients(model, ours), inputs["labels"] != -100, block_numbers(inputs, 4)
    draws = trainer._sampler(maskable, inputs["input_ids"], inputs["attention_mask"], 1, blocks=numbers)
    by_hand = -block_terms(of_model(model), inputs, draws, numbers).sum() / maskable.sum()
    torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=0)
    assert_same_gradients(found, gradients(model, by_hand))


@pytest.mark.parametrize("control", [None, ControlVariate()], ids=["plain", "control"])
def test_the_diagnosis_adds_up_blocks(control):
    """All draws of a set together are the estimate that the sampler's own weights make of them."""
    blocks = torch.tensor([0, 0, 1, 1, 1, 1, 2]).expand(3, -1)
    maskable, ids = torch.ones(3, 7, dtype=torch.bool), torch.arange(21).view(3, 7)
    for row in range(3):
        sampler = MaskSampler(16, "mirror", True, control_variate=control)
        draws = [sampler(maskable, ids, None, nonce, blocks=blocks) for nonce in (0, 1)]
        masked = torch.stack([each.masked[:, row] for each in draws])
        values = torch.randn(masked.shape, generator=torch.Generator().manual_seed(row)).double() * masked
        weight = torch.stack([each.weight[:, row] for each in draws])
        scored = Scored(masked, values, sizes=(2, 4, 1))
        torch.testing.assert_close(
            repeats(scored, 16, control)[:, 0], (weight * values).sum((1, 2)), rtol=1e-5, atol=1e-5
        )
        if control is None:
            torch.testing.assert_close(fixed_count_samples(scored).mean(1), repeats(scored, 16)[:, 0])


def test_a_diagnosis_of_a_block_diffusion_model(tmp_path):
    policy, reference = models()
    report = diagnose(tmp_path, policy, reference)
    assert report.compares_with_reference and report.num_pairs == 4
    assert sum(report.parts.values()) == pytest.approx(1)
    for name in ("VRPO paper", "fixed counts"):
        assert report.variance[name, 2] > report.variance[name, 8] > 0


@pytest.mark.parametrize(
    ("mode", "layers", "response"), [("auto", False, 40), ("auto", True, 40), ("checkpoint", True, 90)]
)
def test_a_step_needs_what_is_estimated(mode, layers, response):
    """Within 1%, of which the clean text that draws share is a part."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "num_hidden_layers": 5, "vocab_size": 300, "mask_token_id": 2}
    config = SDARConfig(**sizes, bos_token_id=1, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    model = get_peft_model(SDARForCausalLM(config), LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    options = {"num_responses": 2, "num_mc_samples": 2, "draws_per_forward": 1, "elbo_gradient": mode, "bf16": False}
    estimate = estimate_memory(
        model,
        max_length=96,
        response_length=response,
        gradient_checkpointing=layers,
        gradient_accumulation_steps=2,
        device="cpu",
        **options,
    )
    measured = peak_of_step(model, **options, layers=layers, length=96, response=response)
    assert estimate.kept + estimate.working == pytest.approx(measured, rel=0.01)
