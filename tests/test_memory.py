"""The memory estimate against counted bytes, and what a trainer says of it."""

import copy
import dataclasses
import gc
import logging
import re
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_pairs
from counters import HidesEverything, LiveBytes
from peft import LoraConfig, get_peft_model
from test_gradients import TARGETS
from test_kto import make_trainer as make_kto_trainer
from test_trainers import make_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config

from trl_diffusion import LLaDAConfig, estimate_memory
from trl_diffusion.planning import fit
from trl_diffusion.planning.fit import device_memory, estimate_run, warn_of_memory
from trl_diffusion.planning.memory import RESERVED, largest_chunk, without_memory
from trl_diffusion.scoring.head import ELBOHead
from trl_diffusion.scoring.precision import keep_differentiable
from trl_diffusion.scoring.responses import draws_per_chunk

LLADA_8B = LLaDAConfig(mlp_hidden_size=12288)
LENGTH, RESPONSE, RESPONSES = 96, 64, 2
SIZES = {"d_model": 128, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 384, "vocab_size": 300}
STATIC = ("blocks", "embeddings", "reference", "adapters", "gradients", "optimizer")


def nf4(double: bool = True):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=double,
    )


# Weights


@pytest.mark.parametrize(
    "quantization_config, bits", [(None, 16), (nf4(False), 4 + 32 / 64), (nf4(True), 4 + 8 / 64 + 32 / 64 / 256)]
)
def test_weights_of_llada_8b(quantization_config, bits):
    """By hand: four square matrices and three of the feed-forward layer in 32 blocks; two vocabularies; 65 norms."""
    estimate = estimate_memory(LLADA_8B, peft_config=LoraConfig(r=16), quantization_config=quantization_config)
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    tables = 32 * 7 * (16 * 4 + (4 + 256 * 4) * (bits < 4.2)) if quantization_config else 0  # of the code
    assert estimate.blocks == linears * bits / 8 + tables
    assert estimate.embeddings == 2 * (2 * 126464 * 4096 + 65 * 4096)
    adapter = 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 12288)) * 4
    assert (estimate.adapters, estimate.gradients, estimate.optimizer) == (adapter, adapter, 2 * adapter)
    assert (estimate.reference, estimate.buffers) == (0, 2 * adapter)


def test_weights_of_full_training():
    estimate = estimate_memory(LLADA_8B)
    assert estimate.blocks + estimate.embeddings == estimate.reference == estimate.gradients == 2 * 8_015_581_184
    assert estimate_memory(LLADA_8B, separate_reference=False).reference == 0


@pytest.mark.parametrize("double", [False, True])
def test_quantised_weights_are_those_that_are_loaded(tmp_path, double):
    make_model(d_model=256, mlp_hidden_size=320, vocab_size=90).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4(double), dtype=torch.bfloat16)
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    tensors = [t for s in states for t in s.as_dict(packed=False).values() if isinstance(t, torch.Tensor)]
    held = sum(p.nbytes for p in model.parameters()) + sum(t.nbytes for t in tensors) + 4 * double * len(states)
    estimate = estimate_memory(model.config, quantization_config=nf4(double), peft_config=LoraConfig(r=2))
    assert estimate.blocks + estimate.embeddings == held  # the offset of the nested scales is not in `as_dict`
    loaded = estimate_memory(get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS)))
    assert dataclasses.astuple(loaded) == dataclasses.astuple(estimate)


# A step


def make_stepped(folder, *, dtype="float32", peft_config=None, quantization_config=None, layers=False, **sizes):
    """A model that has been through a step, so that gradients are there."""
    model = make_model(**SIZES | sizes)
    model.to(getattr(torch, dtype))
    if quantization_config is not None:
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization_config, dtype=getattr(torch, dtype)
        )
        keep_differentiable(model)
    model = model if peft_config is None else get_peft_model(model, copy.copy(peft_config))
    base = model.train() if peft_config is None else model.train().get_base_model()
    if layers:
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    return model, base


def peak_of_step(base, num_mc_samples, draws_per_forward, elbo_gradient, bf16):
    ids = torch.randint(6, 299, (RESPONSES, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(LENGTH) < LENGTH - RESPONSE, -100)

    def step(number):
        head = ELBOHead(HidesEverything(number), 2, draws_per_forward, elbo_gradient)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = head(base, ids, labels).log_probs.sum()
        loss.backward()

    step(1)
    gc.collect()
    with LiveBytes() as memory:
        step(num_mc_samples)
    return memory.peak


LORA = {"peft_config": LoraConfig(r=16, target_modules=TARGETS)}
WIDE = {"n_kv_heads": 2, "mlp_hidden_size": 640}
CASES = {
    "lora": LORA,
    "lora, layers, draws together": LORA | {"layers": True, "draws_per_forward": 3},
    "lora, bf16": LORA | {"dtype": "bfloat16", "bf16": True},
    "lora, bf16, layers": LORA | {"dtype": "bfloat16", "bf16": True, "layers": True},
    "lora, float32 weights in bf16": LORA | {"bf16": True},
    "lora, bfloat16 without autocast, wide": LORA | {"dtype": "bfloat16", "sizes": WIDE},
    "lora, dropout": {"peft_config": LoraConfig(r=16, target_modules=TARGETS, lora_dropout=0.1)},
    "lora, some layers": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
    "lora, eager attention": LORA | {"sizes": {"attn_implementation": "eager"}},
    "lora, checkpoint": LORA | {"elbo_gradient": "checkpoint"},
    "lora, graph": LORA | {"elbo_gradient": "graph"},
    "qlora": LORA | {"dtype": "bfloat16", "bf16": True, "quantization_config": nf4()},
    "qlora, layers": LORA | {"dtype": "bfloat16", "bf16": True, "quantization_config": nf4(), "layers": True},
    "full": {},
    "full, bf16, layers": {"dtype": "bfloat16", "bf16": True, "layers": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_needs_what_is_estimated(tmp_path, case):
    """Within 10%. Weights, gradients and the optimiser's state were there before; all else is counted."""
    options = dict(CASES[case])
    bf16, layers = options.pop("bf16", False), options.get("layers", False)
    draws_per_forward, mode = options.pop("draws_per_forward", 1), options.pop("elbo_gradient", "auto")
    model, base = make_stepped(tmp_path, **options, **options.pop("sizes", {}))
    num_mc_samples = 3 if mode == "graph" else max(2, draws_per_forward)
    common = {
        "max_length": LENGTH,
        "response_length": RESPONSE,
        "num_responses": RESPONSES,
        "num_mc_samples": num_mc_samples,
        "draws_per_forward": draws_per_forward,
        "bf16": bf16,
        "gradient_checkpointing": layers,
        "gradient_accumulation_steps": 2,
        "elbo_gradient": mode,
        "device": "cpu",
    }
    estimate = estimate_memory(model, **common)
    measured = peak_of_step(base, num_mc_samples, draws_per_forward, mode, bf16)
    assert estimate.total - sum(getattr(estimate, part) for part in STATIC) == pytest.approx(measured, rel=0.10)


def test_the_counter_counts_what_autograd_keeps():
    """Two ways to count the bytes that a forward leaves behind for its backward, weights not among them."""
    model = make_model(**SIZES)
    ids = torch.randint(6, 299, (1, LENGTH))
    before = {p.untyped_storage()._cdata for p in model.parameters()} | {ids.untyped_storage()._cdata}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in before:
            kept[storage._cdata] = storage
        return tensor

    with LiveBytes() as memory, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids).logits.sum()
        live = memory.live
    assert live == sum(storage.nbytes() for storage in kept.values()) + loss.nbytes


def test_draws_do_not_matter_and_their_number_at_once_does():
    config = LLaDAConfig(**SIZES, mask_token_id=2, pad_token_id=0, eos_token_id=0)

    def estimate(**options):
        return estimate_memory(config, peft_config=LoraConfig(r=16), max_length=512, **options)

    assert estimate(num_mc_samples=3) == estimate(num_mc_samples=64) == estimate(draws_per_forward=2)
    # All in one chunk: the sum that the gradients of later ones would be added to is not there yet
    one_adapter = estimate().buffers // 2
    assert estimate(num_mc_samples=2) == dataclasses.replace(estimate(num_mc_samples=3), buffers=one_adapter)
    totals = [estimate(draws_per_forward=number).total for number in (1, 2, 4)]
    assert totals == sorted(totals) and totals[0] < totals[1] < totals[2]
    few, many = (estimate(elbo_gradient="graph", num_mc_samples=number) for number in (8, 64))
    assert many.activations == 8 * few.activations


def test_the_table_has_every_part():
    estimate = estimate_memory(LLADA_8B, peft_config=LoraConfig(r=16))
    rows = dict(line.split(None, 1) for line in str(estimate).splitlines())
    assert list(rows) == [field.name for field in dataclasses.fields(estimate)] + ["total"]
    for name, size in rows.items():
        assert float(size.removesuffix(" GB")) == pytest.approx(getattr(estimate, name) / 1e9, abs=0.005)


def test_the_largest_chunk_is_that_of_any_length():
    """Short responses run several draws at once: an example of 500 tokens needs more than one of 600."""
    lengths, draws = range(1, 601), 8
    chunks = [length * min(draws, draws_per_chunk(length, None)) for length in lengths]
    assert 1000 <= max(chunks) <= largest_chunk(600, draws, None) == 1024
    assert largest_chunk(60, draws, None) == 480 and largest_chunk(2000, draws, None) == 2000


@pytest.mark.parametrize(
    "options, message",
    [
        ({"config": GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=30)}, "no .'intermediate_size'."),
        ({"response_length": 2000}, "got response_length=2000 and max_length=1024"),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "must be one with `load_in_4bit=True`"),
        ({"elbo_gradient": "later"}, "`elbo_gradient` must be one of .*got 'later'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(**{"config": LLADA_8B, **options})


# What a trainer says


@pytest.mark.parametrize(
    "make, options, named, unnamed",
    [
        (make_trainer, {}, ["gradient_checkpointing=True", "draws_per_forward=1", "max_length", "load_in_4bit"], []),
        (
            make_kto_trainer,
            {"gradient_checkpointing": True, "draws_per_forward": 1},
            ["per_device_train_batch_size", "max_length"],
            ["gradient_checkpointing", "draws_per_forward"],
        ),
    ],
)
def test_a_run_that_will_not_fit_is_warned_of_once(tmp_path, monkeypatch, caplog, make, options, named, unnamed):
    trainer = make(tmp_path, peft_config=LoraConfig(r=4), max_steps=1, **options)
    estimate = estimate_run(trainer)
    for available, warned in ((10**9 + estimate.total, False), (10**9 + estimate.total - 1, True)):
        caplog.clear()
        monkeypatch.setattr(fit, "device_memory", lambda _, available=available: available)
        with caplog.at_level(logging.WARNING, logger="trl_diffusion"):
            trainer.train()
            warn_of_memory(trainer)
        messages = [record.getMessage() for record in caplog.records if "estimated to need" in record.getMessage()]
        assert len(messages) == warned
    before_the_table = messages[0].splitlines()[0]
    assert str(estimate) in messages[0]
    assert all(name in before_the_table for name in named) and not any(name in before_the_table for name in unnamed)


def test_the_estimate_of_a_run_is_that_of_its_longest_example(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=4), dataset=make_pairs(5))
    rows = [(len(r["prompt_ids"]), len(r[c])) for r in trainer.train_dataset for c in ("chosen_ids", "rejected_ids")]
    expected = estimate_memory(
        trainer.model,
        max_length=max(map(sum, rows)),
        response_length=max(length for _, length in rows),
        num_responses=6,
        num_mc_samples=3,
        bf16=False,
        gradient_checkpointing=False,
        device="cpu",
    )
    assert estimate_run(trainer) == expected
    assert device_memory(trainer) is None  # on a CPU nothing is said


# The documents

CARDS = (12, 16, 24, 48, 80)  # GB
LENGTHS = (512, 768, 1024, 1536, 2048, 3072, 4096)  # LLaDA was trained on up to 4096 tokens
FITS = {
    "nf4, layer checkpointing": (nf4(), True),
    "nf4, no layer checkpointing": (nf4(), False),
    "bfloat16, layer checkpointing": (None, True),
    "bfloat16, no layer checkpointing": (None, False),
}


def what_fits():
    """Rows of the table: what 1024 tokens need, and the longest examples that fit."""
    model = without_memory(LLADA_8B, "bfloat16", LoraConfig(r=16))
    for name, (quantization_config, layers) in FITS.items():
        options = {"quantization_config": quantization_config, "gradient_checkpointing": layers}
        needed = {n: estimate_memory(model, max_length=n, **options).total + RESERVED for n in LENGTHS}
        longest = [max((n for n, size in needed.items() if size <= card * 10**9), default="-") for card in CARDS]
        yield f"| {name} | {needed[1024] / 1e9:.1f} | {' | '.join(map(str, longest))} |"


def test_what_fits_is_what_is_estimated():
    page = (Path(__file__).parent.parent / "docs" / "memory-and-speed.md").read_text()
    for row in what_fits():
        assert row in page


def test_the_readme_says_what_is_estimated():
    """Of its command: 1024 tokens, of which some belong to the prompt, in any case all."""
    readme = re.sub(r"\s+", " ", (Path(__file__).parent.parent / "README.md").read_text())
    estimate = estimate_memory(LLADA_8B, peft_config=LoraConfig(r=16), quantization_config=nf4())
    assert f"about {(estimate.total + RESERVED) / 1e9:.1f} GB of GPU memory at 1024 tokens" in readme


def test_the_readme_repeats_rows_of_the_table_of_costs():
    root = Path(__file__).parent.parent
    readme, page = ((root / name).read_text() for name in ("README.md", "docs/memory-and-speed.md"))
    table = readme[readme.index("| | FLOPs / needed |") :].split("\n\n")[0].splitlines()
    assert len(table) > 4 and set(table) <= set(page.splitlines())
