"""The memory estimate, which is counted on fake tensors, against the bytes of real steps; what a trainer says of it."""

import contextlib
import copy
import dataclasses
import gc
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_pairs
from counters import HidesEverything, LiveBytes
from peft import LoraConfig, PeftModel, get_peft_model
from test_gradients import TARGETS
from test_kto import make_trainer as make_kto_trainer
from test_trainers import make_trainer
from transformers import AutoModelForCausalLM, BertConfig, BitsAndBytesConfig, GPT2Config, LlamaConfig
from transformers.training_args import OptimizerNames
from what_fits import CARDS, LLADA_8B, needed

from trl_diffusion import estimate_memory
from trl_diffusion.planning import fit
from trl_diffusion.planning.as_on_a_gpu import as_on_a_gpu
from trl_diffusion.planning.fit import device_memory, estimate_run, warn_of_memory
from trl_diffusion.planning.live_bytes import nbytes
from trl_diffusion.planning.memory import length_of_largest_chunk
from trl_diffusion.planning.rehearsal import Step, rehearse, run
from trl_diffusion.planning.skeleton import equal_blocks, tensors_of, without_memory
from trl_diffusion.scoring.door import ChunkedLogProbFunction
from trl_diffusion.scoring.gradients import trainable_parameters
from trl_diffusion.scoring.head import ELBOHead
from trl_diffusion.scoring.precision import keep_differentiable
from trl_diffusion.scoring.responses import draws_per_chunk

LENGTH, RESPONSE, RESPONSES = 96, 64, 2
SIZES = {"d_model": 128, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 384, "vocab_size": 300}
STATIC = ("weights", "reference", "adapters", "gradients", "optimizer")


def int8():
    return BitsAndBytesConfig(load_in_8bit=True)


def nf4(double: bool = True):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=double,
    )


# Weights


@pytest.mark.parametrize(
    "quantization_config, bits",
    [(None, 16), (nf4(False), 4 + 32 / 64), (nf4(True), 4 + 8 / 64 + 32 / 64 / 256), (int8(), 8)],
)
def test_weights_of_llada_8b(quantization_config, bits):
    """By hand: four square matrices and three of the feed-forward layer in 32 blocks; two vocabularies; 65 norms."""
    model = without_memory(LLADA_8B, "bfloat16", LoraConfig(r=16), quantization_config)
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    beside = 32 * 7 * (16 * 4 + (4 + 256 * 4) * (bits < 4.2)) * (bits < 8)  # codes of the 4-bit format
    beside += 32 * 4 * (5 * 4096 + 2 * 12288) * (bits == 8)  # a scale for each row
    others = 2 * (2 * 126464 * 4096 + 65 * 4096) + nbytes(model.buffers())
    adapter = 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 12288)) * 4
    assert nbytes(tensors_of(model)) == linears * bits / 8 + beside + others + adapter
    assert nbytes(trainable_parameters(model)) == adapter


def test_parts_that_are_there_between_steps():
    base, adapted = (
        make_model(n_layers=1),
        get_peft_model(make_model(n_layers=1), LoraConfig(r=2, target_modules=TARGETS)),
    )
    size, trained = nbytes(tensors_of(base)), nbytes(trainable_parameters(adapted))
    full = estimate_memory(base, max_length=8, gradient_accumulation_steps=2)
    weights = size - nbytes(base.buffers())
    assert (full.weights, full.reference, full.adapters) == (size, size, 0)
    assert (full.gradients, full.optimizer) == (weights, 2 * weights)
    assert estimate_memory(base, max_length=8, separate_reference=False).reference == 0
    lora = estimate_memory(adapted, max_length=8, optimizer_bytes=2)
    assert (lora.weights, lora.reference, lora.adapters) == (size, 0, trained)
    assert (lora.gradients, lora.optimizer) == (0, trained // 4 * 2)  # nothing is accumulated
    half = estimate_memory(make_model(n_layers=1).to(torch.bfloat16), max_length=8)
    assert half.optimizer == weights  # Adam's numbers have the precision of the weights


@pytest.mark.parametrize("quantization_config", [nf4(False), nf4(True), int8()], ids=["nf4", "nf4, nested", "int8"])
def test_quantised_weights_are_those_that_are_loaded(tmp_path, quantization_config):
    make_model(d_model=256, mlp_hidden_size=320, vocab_size=90).save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config)
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    tensors = [t for s in states for t in s.as_dict(packed=False).values() if isinstance(t, torch.Tensor)]
    nested = [s.offset for s in states if s.offset is not None]  # which is not in `as_dict`
    rows = [p.SCB for p in model.parameters() if hasattr(p, "SCB")]
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *tensors, *nested, *rows))
    options = {"max_length": 8, "device": "cpu"}
    estimate = estimate_memory(
        model.config, quantization_config=quantization_config, peft_config=LoraConfig(r=2), **options
    )
    assert estimate.weights == held
    assert estimate_memory(get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS)), **options) == estimate


# A step


def load(folder, quantization_config, dtype="bfloat16"):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization_config, dtype=getattr(torch, dtype)
    )


def make_stepped(folder, *, dtype="float32", peft_config=None, quantization_config=None, **sizes):
    model = make_model(**SIZES | sizes)
    model.to(getattr(torch, dtype))
    if quantization_config is not None:
        model.save_pretrained(folder)
        model = load(folder, quantization_config, dtype)
        keep_differentiable(model)
    return model if peft_config is None else get_peft_model(model, copy.copy(peft_config))


def peak_of_step(
    model,
    num_responses,
    num_mc_samples,
    draws_per_forward,
    elbo_gradient,
    bf16,
    layers=False,
    device="cpu",
    length=LENGTH,
    response=RESPONSE,
):
    """Bytes of a real step, of the policy and the reference, from which nothing but gradients was there before."""
    model.train()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if layers:
        base.activation_checkpointing_enable({"use_reentrant": False})
        if base is not model:
            base.enable_input_require_grads()
    ids = torch.randint(6, 299, (num_responses, length), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(length) < length - response, -100)
    ids, labels = ids.to(device), labels.to(device)

    def step(number):
        head = ELBOHead(HidesEverything(number), 2, draws_per_forward, elbo_gradient)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            policy = head(base, ids, labels).log_probs
            with torch.no_grad(), contextlib.nullcontext() if base is model else model.disable_adapter():
                reference = head(base, ids, labels).log_probs
        (policy - reference).sum().backward()

    step(1)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(num_mc_samples)
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as memory:
        step(num_mc_samples)
    return memory.peak


LORA = {"peft_config": LoraConfig(r=16, target_modules=TARGETS)}
WIDE = {"n_kv_heads": 2, "mlp_hidden_size": 640}
BF16 = {"dtype": "bfloat16", "bf16": True}
CASES = {
    "lora, layers, draws together": LORA | {"layers": True, "draws_per_forward": 3},
    "lora, bf16": LORA | BF16,
    "lora, float32 weights in bf16, layers": LORA | {"bf16": True, "layers": True},
    "lora, bfloat16 without autocast": LORA | {"dtype": "bfloat16", "sizes": WIDE},
    "lora, dropout": {"peft_config": LoraConfig(r=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)},
    "lora, eager attention": LORA | {"sizes": {"attn_implementation": "eager"}},
    "lora, checkpoint": LORA | {"elbo_gradient": "checkpoint"},
    "lora, graph": LORA | {"elbo_gradient": "graph"},
    "lora, five layers, four responses": LORA | BF16 | {"sizes": {"n_layers": 5}, "num_responses": 4},
    "qlora": LORA | BF16 | {"quantization_config": nf4()},
    "qlora, layers, one response": LORA | BF16 | {"quantization_config": nf4(), "layers": True, "num_responses": 1},
    "int8": LORA | BF16 | {"quantization_config": int8()},
    "full": {},
    "full, layers, checkpoint": BF16 | {"layers": True, "elbo_gradient": "checkpoint"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_needs_what_is_estimated(tmp_path, case):
    """
    Within 1%. Weights, gradients and the optimiser's state were there before; all else is counted. What is left out of
    the estimate are the draws themselves and the scores of other responses.
    """
    options = dict(CASES[case])
    bf16, layers = options.pop("bf16", False), options.pop("layers", False)
    draws_per_forward, mode = options.pop("draws_per_forward", 1), options.pop("elbo_gradient", "auto")
    num_responses = options.pop("num_responses", RESPONSES)
    model = make_stepped(tmp_path, **options, **options.pop("sizes", {}))
    num_mc_samples = 3 if mode == "graph" else max(2, draws_per_forward)
    estimate = estimate_memory(
        model,
        max_length=LENGTH,
        response_length=RESPONSE,
        num_responses=num_responses,
        num_mc_samples=num_mc_samples,
        draws_per_forward=draws_per_forward,
        bf16=bf16,
        gradient_checkpointing=layers,
        gradient_accumulation_steps=2,
        elbo_gradient=mode,
        device="cpu",
    )
    measured = peak_of_step(model, num_responses, num_mc_samples, draws_per_forward, mode, bf16, layers)
    assert estimate.kept + estimate.working == pytest.approx(measured, rel=0.01)


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
    model = get_peft_model(make_model(**SIZES | {"n_layers": 1}), LoraConfig(r=16, target_modules=["q_proj"]))

    def estimate(**options):
        return estimate_memory(model, max_length=512, gradient_checkpointing=False, **options)

    assert estimate(num_mc_samples=4) == estimate(num_mc_samples=64) == estimate(draws_per_forward=2)
    assert estimate(draws_per_forward=1).total < estimate().total < estimate(draws_per_forward=4).total
    few, many = (estimate(elbo_gradient="graph", num_mc_samples=number) for number in (8, 64))
    assert many.kept == pytest.approx(8 * few.kept, rel=1e-2)


@pytest.mark.parametrize("mode, layers", [("immediate", False), ("checkpoint", True), ("graph", False)])
def test_any_number_of_layers_responses_and_draws_follows_from_few(mode, layers):
    """What is extrapolated, against a run of all: five layers, two responses, three chunks of draws."""
    model = get_peft_model(make_model(**SIZES | {"n_layers": 5}), LoraConfig(r=16, target_modules=["q_proj"]))
    step = Step(LENGTH, RESPONSE, 2, 3, 1, mode, True, layers, True, True)
    direct, found = run(model, step), rehearse(model, step)
    few = 2 * 3 * 16 * LENGTH  # bytes: scores and weights of the draws, noised inputs
    assert found.peak == pytest.approx(direct.peak, abs=few)


def test_layers_that_differ_are_all_run():
    """Where blocks are not alike, nothing follows from the first ones."""
    options = {"target_modules": ["q_proj"], "layers_to_transform": [4], "layers_pattern": "blocks"}
    model = get_peft_model(make_model(**SIZES | {"n_layers": 5}), LoraConfig(r=16, **options))
    assert equal_blocks(model) is None
    assert len(equal_blocks(make_model(n_layers=5))) == 5


def test_the_table_has_every_part():
    estimate = estimate_memory(make_model(**SIZES), max_length=32)
    rows = dict(line.split(None, 1) for line in str(estimate).splitlines())
    assert list(rows) == [field.name for field in dataclasses.fields(estimate)] + ["total"]
    for name, size in rows.items():
        assert float(size.removesuffix(" GB")) == pytest.approx(getattr(estimate, name) / 1e9, abs=0.005)


def test_the_largest_chunk_is_that_of_any_length():
    """Short responses run several draws at once: an example of 512 tokens needs more than one of 600."""

    def largest(longest, draws, draws_per_forward=None):
        length = length_of_largest_chunk(model, longest, draws, draws_per_forward)
        return length * min(draws, draws_per_chunk(length, draws_per_forward))

    model = make_model()
    for longest in (40, 60, 400, 600, 1000, 2000):
        for draws in (1, 2, 8):
            chunks = [n * min(draws, draws_per_chunk(n, None)) for n in range(1, longest + 1)]
            assert largest(longest, draws) == pytest.approx(max(chunks), abs=8)  # a whole number of draws
            assert largest(longest, draws, 2) == longest * min(draws, 2)
    eager = make_model(attn_implementation="eager")
    assert length_of_largest_chunk(model, 1000, 8, None) == 512
    assert length_of_largest_chunk(eager, 1000, 8, None) == 1000  # a million scores, and not twice a quarter


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_model_and_the_generator_are_left_alone(device):
    """A rehearsal works on a copy and draws nothing, although dropout is on and layers are checkpointed."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)
    model = get_peft_model(make_model(attn_implementation="eager"), lora).eval()

    def all_of_it():
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
        flags = [getattr(m, "gradient_checkpointing", None) for m in model.modules()]
        return hooks, flags, [(id(p), p.requires_grad, p.grad) for p in model.parameters()]

    before, weights, state = all_of_it(), [p.clone() for p in model.parameters()], torch.get_rng_state()
    estimate_memory(model, max_length=8, device=device, elbo_gradient="checkpoint")
    assert all_of_it() == before and torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, weights, model.parameters()))


# What a GPU does otherwise


def test_the_kernel_of_the_output_head_as_on_a_gpu():
    """By hand: a tile of logits, and the gradient of the hidden states in float32 and in their own precision."""
    rows, width, vocab = 64, 32, 500
    hidden, weight = torch.randn(rows, width, dtype=torch.bfloat16), torch.randn(vocab, width, dtype=torch.bfloat16)

    def peak(context):
        leaf = hidden.clone().requires_grad_()
        with context, LiveBytes() as memory:
            arguments = (torch.zeros(rows, dtype=torch.long), 1.0, vocab, None, 1.0, ())
            ChunkedLogProbFunction.apply(leaf, weight, None, *arguments)[0].sum().backward()
        return memory.peak

    by_hand = rows * vocab * 2 + rows * width * (4 + 2)
    statistics = rows * 4 * 8 + rows * 8  # of the rows: maxima, sums, targets
    assert by_hand < peak(as_on_a_gpu(False)) <= by_hand + statistics
    assert peak(contextlib.nullcontext()) > by_hand + 4 * rows * vocab * 4  # on the CPU: copies in float32
    assert not torch.is_autocast_enabled("cuda")


def test_dropout_as_on_a_gpu():
    """A mask of bytes beside the result, and none of the scores of attention."""
    x = torch.ones(1, 2, 64, 16, requires_grad=True)
    with as_on_a_gpu(False), LiveBytes() as memory:
        kept = torch.nn.functional.dropout(x, 0.5, True)
        assert memory.live == x.nbytes + x.numel()
        attention = torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        assert memory.peak < 3 * x.nbytes + 2 * 64 * 64 * 4
    assert kept.shape == attention.shape == x.shape


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["lora, bf16", "lora, dropout", "qlora", "full"])
def test_a_step_on_a_gpu_needs_what_is_estimated(tmp_path, case):
    """The allocator's peak; it rounds each tensor up to 512 bytes, and cuBLAS keeps a workspace."""
    options = dict(CASES[case]) | {"d_model": 1024, "mlp_hidden_size": 3072, "vocab_size": 8000}
    bf16 = options.pop("bf16", False)
    model = make_stepped(tmp_path, **options).to("cuda")
    common = {"num_responses": RESPONSES, "num_mc_samples": 2, "draws_per_forward": 1, "elbo_gradient": "auto"}
    lengths = {"max_length": LENGTH, "response_length": RESPONSE}
    estimate = estimate_memory(
        model, **lengths, **common, bf16=bf16, gradient_checkpointing=False, gradient_accumulation_steps=2
    )
    measured = peak_of_step(model, **common, bf16=bf16, device="cuda")
    assert estimate.kept + estimate.working == pytest.approx(measured, rel=0.1)


# What is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"config": torch.nn.Linear(2, 2)}, "must be a configuration or a model of transformers.*got Linear"),
        ({"config": make_model().model}, "`LLaDAModel` has no output head over a backbone"),
        ({"config": make_model(), "peft_config": LoraConfig()}, "`peft_config` is for a configuration.*get_peft_model"),
        ({"config": make_model(), "quantization_config": nf4()}, "`quantization_config` is for a configuration"),
        ({"response_length": 2000}, "got response_length=2000 and max_length=1024"),
        ({"elbo_gradient": "later"}, "`elbo_gradient` must be one of .*got 'later'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(**{"config": LLADA_8B, **options})


def test_a_model_that_looks_at_values_is_refused_by_name(monkeypatch):
    """A shape that depends on numbers, which a fake tensor has not got."""
    model = make_model()
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda input_ids, **_: forward(input_ids[input_ids == 0][None]))
    with pytest.raises(ValueError, match="`LLaDAModelLM` cannot be counted.*DynamicOutputShapeException"):
        estimate_memory(model, max_length=8)


@pytest.mark.parametrize("make", [BertConfig, GPT2Config, LlamaConfig])
def test_other_architectures(make):
    """Any model of transformers: with dropout, with layer norms, with grouped heads."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    config = make(**sizes, is_decoder=True) if make is BertConfig else make(**sizes)
    with_layers, without = (estimate_memory(config, max_length=64, gradient_checkpointing=on) for on in (True, False))
    held = nbytes(tensors_of(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)))
    assert with_layers.weights == without.weights == held
    assert 0 < with_layers.working < without.working


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
    monkeypatch.setattr(fit, "estimate_run", lambda _: estimate)
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


def test_the_estimate_of_a_run_is_that_of_its_longest_example(tmp_path, monkeypatch):
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
    monkeypatch.setattr(fit, "estimate_memory", lambda *_, optimizer_bytes, **options: optimizer_bytes)
    for name, size in (("sgd", 0), ("adamw_bnb_8bit", 2), ("adamw_torch", None)):
        trainer.args.optim = OptimizerNames(name)
        assert estimate_run(trainer) == size


def test_a_model_on_several_gpus_or_none_is_not_judged(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 80))

    def memory(device="cuda", device_map=None, **sharded):
        model = SimpleNamespace() if device_map is None else SimpleNamespace(hf_device_map=device_map)
        accelerator = SimpleNamespace(device=torch.device(device))
        whole = {"is_fsdp_enabled": False, "is_deepspeed_enabled": False}
        return device_memory(SimpleNamespace(accelerator=accelerator, model=model, **whole | sharded))

    assert memory() == memory(device_map={"": 0}) == 80
    assert memory("cpu") is None and memory(device_map={"model": 0, "head": 1}) is None
    assert memory(is_fsdp_enabled=True) is None and memory(is_deepspeed_enabled=True) is None


# The documents


@pytest.mark.parametrize("setting", ["nf4, layer checkpointing", "bfloat16, no layer checkpointing"])
def test_what_is_said_to_fit_is_what_is_estimated(setting):
    """Two rows of the table, which `benchmarks/what_fits.py` prints, at the length that the README speaks of."""
    root = Path(__file__).parent.parent
    page, readme = ((root / name).read_text() for name in ("docs/memory-and-speed.md", "README.md"))
    size = needed(setting, 1024) / 1e9
    assert f"| {setting} | {size:.1f} |" in page
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {setting} |"))
    for card, longest in zip(CARDS, row.split(" | ")[2:], strict=True):
        assert (size <= card) == (longest.strip(" |") != "-" and int(longest.strip(" |")) >= 1024)
    if setting.startswith("nf4"):
        assert f"about {size:.1f} GB at 1024 tokens" in re.sub(r"\s+", " ", readme)


def test_the_readme_repeats_figures_of_the_table_of_costs():
    root = Path(__file__).parent.parent
    readme, page = ((root / name).read_text() for name in ("README.md", "docs/memory-and-speed.md"))
    table = page[page.index("| | FLOPs / needed |") :].split("\n\n")[0].splitlines()
    rows = {cells[1]: cells[2:] for cells in ([cell.strip() for cell in line.split("|")] for line in table)}
    plain, checkpointed = rows["immediate gradient"], rows["immediate, layer checkpointing"]
    assert f"with layer checkpointing | {plain[0]}; {checkpointed[0]} |" in readme
    assert f"with layer checkpointing, K = 8 | {plain[4].split()[0]} |" in readme
    assert f"K = 32 over K = 8 | {int(plain[3]) / int(plain[2]):.2f} |" in readme
