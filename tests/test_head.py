"""
The ELBO head against the plain definition, and what it costs: counted, not timed.
"""

import copy
import gc
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import make_model
from counters import HidesEverything, LiveBytes, matmul_flops
from peft import LoraConfig, get_peft_model
from processes import forget_processes
from trl.trainer.utils import add_fused_lm_head

from trl_diffusion import MaskSampler, elbo
from trl_diffusion.models import families
from trl_diffusion.models.family import Family
from trl_diffusion.scoring.head import ELBOHead, add_elbo_head, on_draws


def make_batch(lengths=(9, 14, 11), prompt=3, left=False, vocab=29, seed=0):
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids, mask = torch.zeros(len(lengths), longest, dtype=torch.long), torch.zeros(len(lengths), longest)
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        tokens = torch.randint(6, vocab, (length,), generator=generator)
        place = slice(longest - length, longest) if left else slice(0, length)
        ids[row, place], mask[row, place] = tokens, 1
        labels[row, place] = torch.where(torch.arange(length) < prompt, -100, tokens)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def scored(model, batch, sampler=None, nonce=1, **kwargs):
    head = ELBOHead(sampler or MaskSampler(5), mask_token_id=2, **kwargs)
    return head(model, batch["input_ids"], batch["labels"], batch["attention_mask"], nonce)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", [{}, {"n_kv_heads": 2}, {"weight_tying": True}, {"embedding_size": 40}])
@pytest.mark.parametrize("draws_per_forward", [None, 1, 2])
def test_equals_the_plain_definition(variant, draws_per_forward):
    """Value, terms, samples and gradient: the head in the small, the definition with full logits and padding."""
    model, batch = make_model(**variant), make_batch()
    output = scored(model, batch, draws_per_forward=draws_per_forward)
    maskable = batch["labels"] != -100
    draws = MaskSampler(5)(maskable, batch["input_ids"], batch["attention_mask"], 1)
    plain = elbo(model, batch["input_ids"], maskable, batch["attention_mask"], draws=draws)
    torch.testing.assert_close(output.log_probs, plain.terms[:, 1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.elbo.samples, plain.samples, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.mask_ratio, draws.masked.sum((0, 2)) / maskable.sum(1) / 5)

    weights = torch.tensor([1.0, -2.0, 0.5])
    ours = gradients(model, output.log_probs.sum(1) @ weights)
    theirs = gradients(model, plain.value @ weights)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5 * theirs[name].abs().max().item())


def test_a_row_does_not_depend_on_padding_or_batch_mates(model):
    """Each row runs alone at its exact length; only the order in which its draws are summed can differ."""
    lengths = (9, 14, 11)
    right = make_batch(lengths)
    wider = {k: torch.nn.functional.pad(v, (0, 7), value=-100 if k == "labels" else 0) for k, v in right.items()}
    for batch in (right, wider, make_batch(lengths, left=True)):
        terms = scored(model, batch).log_probs
        for row, length in enumerate(lengths):
            alone = scored(model, {k: v[row : row + 1, :length] for k, v in right.items()}).log_probs[0]
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(terms[row][real[1:]][-len(alone) :], alone, rtol=1e-6, atol=0)
            assert not terms[row][~real[1:]].any()


def test_logit_shift(model, monkeypatch):
    """A model whose logits at i - 1 predict token i, scored with shift 1, is its unshifted twin scored with shift 0."""
    batch = make_batch()
    expected = scored(model, batch).log_probs
    backbone_forward = model.model.forward

    def early(**kwargs):
        output = backbone_forward(**kwargs)
        output.last_hidden_state = output.last_hidden_state.roll(-1, dims=1)
        return output

    monkeypatch.setattr(model.model, "forward", early)
    monkeypatch.setattr(families, "FAMILIES", [Family(model_types=("llada",), logit_shift=1)])
    torch.testing.assert_close(scored(model, batch).log_probs, expected)


def test_forward_answers_both_ways(model):
    batch = make_batch()
    plain = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    add_elbo_head(model, ELBOHead(MaskSampler(5), mask_token_id=2))
    patched = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], draw_nonce=3).logits
    assert torch.equal(patched, plain)
    assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).logits, plain)
    output = model(**batch, use_cache=False, fused_lm_head=True, draw_nonce=1)
    assert torch.equal(output.log_probs, scored(model, batch).log_probs)


def test_a_copy_runs_its_own_weights(model):
    batch = make_batch()
    add_elbo_head(model, ELBOHead(MaskSampler(5), mask_token_id=2))
    twin = copy.deepcopy(model)
    twin.load_state_dict(make_model(seed=5).state_dict())
    inputs = {"input_ids": batch["input_ids"]}
    assert torch.equal(twin(**inputs).logits, make_model(seed=5)(**inputs).logits)
    assert torch.equal(
        twin(**batch, fused_lm_head=True, draw_nonce=1).elbo.samples, scored(make_model(seed=5), batch).elbo.samples
    )


def wrapped_as(wrapping, model):
    """The model as other libraries hand it on: each hides its own forward, and none says so in the same way."""
    if wrapping == "accelerate, bf16":
        forget_processes()
        return Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    if wrapping == "PEFT":
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    if wrapping == "hooks":
        add_hook_to_module(model, ModelHook())
    return model


@pytest.mark.parametrize("wrapping", ["none", "accelerate, bf16", "PEFT", "hooks"])
def test_the_answer_comes_through_what_wraps_the_model(model, wrapping):
    """And is that of the head that was added last, whether the first one was wrapped or not."""
    batch = make_batch()
    add_elbo_head(model, ELBOHead(MaskSampler(2), mask_token_id=2))
    model = wrapped_as(wrapping, model)
    answer = on_draws(model, 1)(**batch, fused_lm_head=True)
    precision = {"rtol": 2**-6, "atol": 0} if "bf16" in wrapping else {}
    torch.testing.assert_close(answer.elbo.value, scored(make_model(), batch, MaskSampler(2)).elbo.value, **precision)
    base = model.get_base_model() if wrapping == "PEFT" else model
    add_elbo_head(base, ELBOHead(MaskSampler(5), mask_token_id=2))
    assert on_draws(model, 1)(**batch, fused_lm_head=True).elbo.samples.shape[0] == 5
    assert model(input_ids=batch["input_ids"]).logits.shape[-1] == 30


def test_a_head_that_was_replaced_is_not_kept(model):
    """It would keep the trainer that it came from, and its optimiser, in memory."""
    sampler = MaskSampler(5)
    gone = weakref.ref(sampler)
    add_elbo_head(model, ELBOHead(sampler, mask_token_id=2))
    add_elbo_head(model, ELBOHead(MaskSampler(5), mask_token_id=2))
    del sampler
    gc.collect()
    assert gone() is None


class Rounding(torch.nn.Module):
    """What FSDP2's mixed precision does to the outputs of what it wraps."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        output = self.model(*args, **kwargs)
        output.log_probs = output.log_probs.bfloat16()
        return output


def test_an_answer_from_elsewhere_or_rounded_is_refused(model):
    batch = make_batch()
    add_fused_lm_head(model)  # TRL's own head, which would score the text as a causal model does
    swallowing = torch.nn.Module()
    swallowing.forward = lambda draw_nonce, **kwargs: model(**kwargs)
    with pytest.raises(RuntimeError, match="answered a request for an ELBO with a `FusedCausalLMOutput`"):
        on_draws(swallowing, 1)(**batch, fused_lm_head=True)
    model = make_model()
    add_elbo_head(model, ELBOHead(MaskSampler(5), mask_token_id=2))
    assert on_draws(model, 1)(**batch, fused_lm_head=True).log_probs.dtype == torch.float32
    with pytest.raises(RuntimeError, match="`Rounding` answers in float32, and torch.bfloat16 arrived.*output_dtype"):
        on_draws(Rounding(model), 1)(**batch, fused_lm_head=True)


def test_responses_where_there_are_none_are_refused(model):
    with pytest.raises(ValueError, match="marks padding as part of a response"):
        batch = make_batch()
        scored(model, {**batch, "labels": batch["input_ids"].index_fill(1, torch.arange(3), -100)})
    with pytest.raises(ValueError, match="position 0"):
        scored(model, make_batch(prompt=0))


def test_non_finite_logits_are_refused(model):
    with torch.no_grad():
        model.model.transformer["ff_out"].weight[7] = torch.nan
    with pytest.raises(ValueError, match="is nan"):
        scored(model, make_batch())


# Cost


def cost_model(width=256):
    """Layers large against the vocabulary, as in the 8B."""
    return make_model(d_model=width, n_heads=4, n_layers=2, mlp_hidden_size=3 * width, vocab_size=600)


def peak_of_training(model, batch, num_mc_samples, **kwargs):
    model.zero_grad(set_to_none=True)
    scored(model, batch, MaskSampler(1), **kwargs).log_probs.sum().backward()  # gradients exist before we count
    gc.collect()
    with LiveBytes() as memory:
        scored(model, batch, HidesEverything(num_mc_samples), **kwargs).log_probs.sum().backward()
    return memory


def test_memory_does_not_grow_with_the_number_of_draws():
    """Masks, weights and scores do: a few bytes for each token and draw."""
    model, batch = cost_model(), make_batch((64,), prompt=16, vocab=599)
    few, many = (peak_of_training(model, batch, number, draws_per_forward=1).peak for number in (2, 32))
    assert many <= 1.02 * few


def test_full_logits_are_never_built():
    length, vocab = 300, 600
    model, batch = cost_model(width=128), make_batch((length, length), prompt=280, vocab=vocab - 1)
    assert peak_of_training(model, batch, 4, draws_per_forward=1).largest < length * vocab * 4


@pytest.mark.parametrize("mode, linear, projected", [(None, 1, 1), ("immediate", 3, 4), ("checkpoint", 4, 5)])
def test_matrix_products_are_those_that_are_needed(mode, linear, projected):
    """
    Needed for one draw of T tokens with m masked: the block linears on T tokens and the head on m, once forward; and in
    training twice backward, and once more forward with checkpointing. The head recomputes its tile in the backward.
    """
    model, batch = cost_model(), make_batch((64, 48), prompt=16, vocab=599)
    sampler = MaskSampler(8)

    def run():
        with torch.set_grad_enabled(mode is not None):
            output = scored(model, batch, sampler, elbo_gradient=mode or "auto")
            if mode:
                output.log_probs.sum().backward()

    counted = matmul_flops(run)
    linears = sum(p.numel() for n, p in model.named_parameters() if ".blocks." in n and p.dim() == 2)
    head = model.get_output_embeddings().weight.numel()
    tokens = 8 * int(batch["attention_mask"].sum())
    masked = int((sampler(batch["labels"] != -100, batch["input_ids"], batch["attention_mask"], 1).masked).sum())
    assert counted == 2 * (linear * linears * tokens + projected * head * masked)
