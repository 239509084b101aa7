"""
The law: under block diffusion a score is what one forward for each block of each draw gives, the noised block behind
clean text; and generated text is what it is without a cache. What it costs is counted.
"""

import pytest
import torch
from block_reference import block_log_probs, block_numbers, block_terms, naive_block_response, of_model
from conftest import WORDS, make_tokenizer
from counters import HidesEverything, LiveBytes
from peft import LoraConfig, get_peft_model
from test_decoders import FOLDERS, LN2, NF4, Folder, assert_parity, trained
from test_families import assert_same_gradients, make_llama
from test_head import gradients, make_batch, scored
from test_sampler_switches import ENDS, SWITCHES, sure
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from trl_diffusion import MaskSampler, check_family, elbo
from trl_diffusion.models import StableDiffcoderForCausalLM, families
from trl_diffusion.models.blocks import denoise, read
from trl_diffusion.models.denoiser import check_denoiser, resolve_mask_token_id
from trl_diffusion.models.families import class_to_load, family_of, spare_in_quantization
from trl_diffusion.models.family import Blocks, Family
from trl_diffusion.models.sampler import generate

MODES = ("immediate", "checkpoint", "graph")
WEIGHTS = torch.tensor([1.0, -2.0, 0.5])


def family(size=4, **facts):
    return Family(name="mine", model_types=("llama",), attention=Blocks(size, **facts.pop("blocks", {})), **facts)


def known(monkeypatch, *found):
    monkeypatch.setattr(families, "FAMILIES", [*found, *families.FAMILIES])


def by_definition(model, batch, size, shift=0, origin="sequence", sampler=None):
    numbers = block_numbers(batch, size, origin)
    maskable, real = batch["labels"] != -100, batch["attention_mask"]
    draws = (sampler or MaskSampler(5))(maskable, batch["input_ids"], real, 1, blocks=numbers)
    return block_terms(of_model(model), batch, draws, numbers, shift), draws


def assert_is_the_definition(model, batch, terms, **options):
    expected = gradients(model, terms.sum(1) @ WEIGHTS)
    output = scored(model, batch, **options)
    torch.testing.assert_close(output.log_probs, terms.detach()[:, 1:], rtol=1e-5, atol=1e-5)
    ours = gradients(model, output.log_probs.sum(1) @ WEIGHTS)
    assert_same_gradients(ours, {name: expected[name] for name in ours})


# ------------------------------------------------------------------------------------------------------ the definition


EVERY_PAIR = [  # of values of these four, in some row
    (0, "sdpa", None, "immediate"),
    (1, "eager", 2, "immediate"),
    (0, "eager", None, "checkpoint"),
    (1, "sdpa", 2, "checkpoint"),
    (0, "sdpa", 2, "graph"),
    (1, "eager", None, "graph"),
]


@pytest.mark.parametrize(("shift", "attention", "draws_per_forward", "mode"), EVERY_PAIR)
def test_a_score_is_the_sum_over_blocks(shift, attention, draws_per_forward, mode, monkeypatch):
    """Blocks that are cut by the beginning of the response and by its end, in value and gradient."""
    known(monkeypatch, family(logit_shift=shift))
    model, batch = make_llama(attn_implementation=attention), make_batch((9, 14, 12), prompt=3)
    terms, _ = by_definition(model, batch, 4, shift)
    assert_is_the_definition(model, batch, terms, elbo_gradient=mode, draws_per_forward=draws_per_forward)


@pytest.mark.parametrize(("shift", "origin"), [(0, "sequence"), (1, "response")])
@pytest.mark.parametrize("size", [1, 3, 5, 32])
def test_of_any_size_and_origin(size, shift, origin, monkeypatch):
    """Blocks of one token are autoregression, a block of all is full attention: the definition covers both."""
    known(monkeypatch, family(size, logit_shift=shift, blocks={"origin": origin}))
    model, batch = make_llama(), make_batch((9, 14, 4), prompt=3, left=True)
    terms, _ = by_definition(model, batch, size, shift, origin)
    assert_is_the_definition(model, batch, terms)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shift", [0, 1])
def test_sharded_weights_are_scored_without_shared_text(shift, mode, monkeypatch):
    """Nothing but its output may leave a layer that is gathered when it is called."""
    known(monkeypatch, family(logit_shift=shift))
    model, batch = make_llama(), make_batch((9, 14, 12), prompt=3)
    terms, _ = by_definition(model, batch, 4, shift)
    assert_is_the_definition(model, batch, terms, elbo_gradient=mode, sharded=True)


@pytest.mark.parametrize("mode", MODES)
def test_layers_that_are_checkpointed_keep_their_history(mode, monkeypatch):
    known(monkeypatch, family())
    model, batch = make_llama(), make_batch((9, 14, 12), prompt=3)
    terms, _ = by_definition(model, batch, 4)
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    assert_is_the_definition(model, batch, terms, elbo_gradient=mode, draws_per_forward=2)
    assert not any("_can_checkpoint_with_cache" in vars(module) for module in model.modules())


@pytest.mark.parametrize("mode", MODES)
def test_of_an_adapter(mode):
    """What is cut off between clean text and draws has no gradient where no adapter lies before it."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=[1], init_lora_weights=False)
    model, batch = get_peft_model(FOLDERS["SDAR"].model(), config), make_batch((9, 14, 12), prompt=3)
    base = model.get_base_model()
    terms, _ = by_definition(base, batch, 4)
    assert_is_the_definition(base, batch, terms, elbo_gradient=mode, draws_per_forward=2)


@pytest.mark.parametrize("name", ["SDAR", "LLaDA2"])
def test_against_the_architecture_in_plain_torch(name):
    """Nothing of transformers or of this package is in what it is compared with. A router of experts learns, too."""
    folder, batch = FOLDERS[name], make_batch((9, 14, 12), prompt=3)
    tensors = {name: tensor.requires_grad_() for name, tensor in folder.published.items()}

    def logits(ids, sees):
        return folder.answer(tensors, ids, sees)

    model, numbers = folder.model(), block_numbers(batch, 4)
    draws = MaskSampler(5)(batch["labels"] != -100, batch["input_ids"], batch["attention_mask"], 1, blocks=numbers)
    terms = block_terms(logits, batch, draws, numbers)
    (terms.sum(1) @ WEIGHTS).backward()
    output = scored(model, batch)
    torch.testing.assert_close(output.log_probs, terms.detach()[:, 1:], rtol=1e-5, atol=1e-5)
    found = gradients(model, output.log_probs.sum(1) @ WEIGHTS)
    assert tensors.keys() - found.keys() <= {"model.layers.1.mlp.gate.expert_bias"}  # which has none
    assert_same_gradients(found, {name: tensors[name].grad for name in found})


def test_draws_that_hide_nothing_of_a_block(monkeypatch):
    known(monkeypatch, family(2))
    model, batch, sampler = make_llama(), make_batch((5, 6, 9), prompt=3), MaskSampler(3, "bernoulli", seed=1)
    terms, draws = by_definition(model, batch, 2, sampler=sampler)
    assert (~draws.masked.any(-1)).any()
    assert_is_the_definition(model, batch, terms, sampler=sampler, draws_per_forward=1)


def test_a_last_token_decides_what_a_clean_block_predicts(monkeypatch):
    """With shifted logits the first token of a block is predicted from clean text, whatever the draw hides of it."""
    known(monkeypatch, family(4, logit_shift=1))
    model, batch = make_llama(), make_batch((12,), prompt=4)
    numbers = block_numbers(batch, 4)
    masked = torch.zeros(2, 1, 12, dtype=torch.bool)
    masked[0, 0, [4, 5, 8]], masked[1, 0, [6, 7, 8]] = True, True
    found = block_log_probs(of_model(model), batch["input_ids"][0], masked[:, 0], numbers[0].tolist(), 1)
    assert found[0, 8] == found[1, 8] != 0
    with torch.no_grad():
        log_probs = model(input_ids=batch["input_ids"], attention_mask=_sees(numbers)).logits[0, 7].log_softmax(-1)
    torch.testing.assert_close(found[0, 8].detach(), log_probs[batch["input_ids"][0, 8]])


def _sees(numbers):
    return (numbers.unsqueeze(2) >= numbers.unsqueeze(1)).unsqueeze(1)


# ------------------------------------------------------------------------------------------------------------ its cost


class Tokens:
    """Counts the tokens that a backbone runs."""

    def __init__(self, model):
        self.count = 0
        model.get_input_embeddings().register_forward_hook(self.add)

    def add(self, _, args, output):
        self.count += args[0].numel()


@pytest.mark.parametrize("num_mc_samples", [1, 8])
def test_draws_share_one_clean_copy(num_mc_samples, monkeypatch):
    """K N + C tokens: N of the response's blocks, C before the last of them; K (N + C) without that."""
    known(monkeypatch, family(4))
    model, batch = make_llama(), make_batch((32,), prompt=9)
    tokens = Tokens(model)
    scored(model, batch, MaskSampler(num_mc_samples), draws_per_forward=1)
    assert tokens.count == num_mc_samples * (32 - 8) + 28
    tokens.count = 0
    scored(model, batch, MaskSampler(num_mc_samples), draws_per_forward=1, sharded=True)
    assert tokens.count == num_mc_samples * (32 - 8 + 28)


@pytest.mark.parametrize("number", [1, 3])
def test_attention_is_of_noised_tokens_on_clean_text(number, monkeypatch):
    """N queries of each draw, C + N keys: 4 products of the width for each two of them, in queries x keys x values."""
    known(monkeypatch, family(4))
    model, layers, width, clean, noised = make_llama().to("meta"), 2, 32, 28, 20
    ids, numbers = torch.empty(32, dtype=torch.long, device="meta"), (torch.arange(32) // 4).to("meta")
    _, history = read(model, ids[:clean], numbers[:clean])
    with FlopCounterMode(display=False) as counter:
        denoise(model, ids[-noised:].expand(number, -1), numbers[-noised:], 32 - noised, history)
    counted = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    assert counted["aten.bmm"] == number * layers * 4 * width * noised * (clean + noised)


@pytest.mark.parametrize("layers", [False, True])
def test_memory_does_not_grow_with_the_number_of_draws(layers, monkeypatch):
    known(monkeypatch, family(4))
    peaks = []
    for number in (2, 32):
        model, batch = make_llama(), make_batch((40,), prompt=8)
        if layers:
            model.train().activation_checkpointing_enable({"use_reentrant": False})
        with LiveBytes() as memory:
            value = scored(model, batch, HidesEverything(number), elbo_gradient="immediate", draws_per_forward=1)
            value.log_probs.sum().backward()
        peaks.append(memory.peak)
    few, many = peaks
    per_draw = 40 * (5 + 4 * 4)  # masks, weights, scores and what weighs them
    assert many - few <= 30 * per_draw


# ---------------------------------------------------------------------------------------------------- a model is tried


def test_what_a_model_shows_a_block_is_tried(monkeypatch):
    model = make_llama()
    for size in (1, 4, 32):
        with pytest.MonkeyPatch.context() as patch:
            known(patch, family(size))
            check_denoiser(model, 2)
    known(monkeypatch, family())
    run = model.model.forward
    cache = ("past_key_values", "cache")  # whichever transformers calls it

    def forget(**inputs):
        return run(**{name: value for name, value in inputs.items() if name not in cache})

    monkeypatch.setattr(model.model, "forward", forget)
    with pytest.raises(ValueError, match="The backbone of `LlamaForCausalLM` does not take `past_key_values`"):
        check_denoiser(model, 2)
    monkeypatch.setattr(model.model, "forward", lambda **inputs: run(**{**inputs, "attention_mask": None}))
    with pytest.raises(ValueError, match="`LlamaForCausalLM` does not show a block what is before it.*causal class"):
        check_denoiser(model, 2)


def test_a_family_in_blocks_is_checked_as_others_are(monkeypatch):
    known(monkeypatch, family())
    report = check_family(make_llama(), make_tokenizer(with_mask=True), " ".join(WORDS))
    verdicts = {each.name: (each.verdict, each.detail) for each in report.verdicts}
    assert all(verdicts[name][0] == "right" for name in ("configuration", "mask token", "head", "causality", "padding"))
    assert verdicts["causality"][1] == "a block sees itself and what is before it"
    assert verdicts["shift"][0] == "unclear"  # the weights are random


def test_kernels_that_cannot_show_it_are_refused(monkeypatch):
    known(monkeypatch, family())
    model = make_llama()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="`attn_implementation='flex_attention'`.*`attn_implementation='sdpa'`"):
        scored(model, make_batch())


@pytest.mark.parametrize("size", [0, -4, 2.5, True])
def test_a_size_that_is_none_is_refused(size):
    """The configuration takes some of them, and any can be written into it later."""
    model = FOLDERS["SDAR"].model()
    model.config.__dict__["block_size"] = size
    message = f"`block_size`.*at least 1.*got {size!r}.*config.json"
    for use in (lambda: check_denoiser(model, 2), lambda: generate(model, torch.tensor([[3, 4]]), max_new_tokens=4)):
        with pytest.raises(ValueError, match=message):
            use()


def test_full_logits_are_those_of_the_definition(monkeypatch):
    """`elbo` on a model, with padding on either side."""
    known(monkeypatch, family(4, logit_shift=1))
    for left in (False, True):
        model, batch = make_llama(), make_batch((9, 14, 12), prompt=3, left=left)
        terms, draws = by_definition(model, batch, 4, 1)
        maskable = batch["labels"] != -100
        plain = elbo(model, batch["input_ids"], maskable, batch["attention_mask"], draws=draws)
        torch.testing.assert_close(plain.terms, terms, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- Stable-DiffCoder

STABLE = Folder(
    {
        "model_type": "llama",
        "architectures": ["StableDiffcoderForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.M"},
        "tie_word_embeddings": False,
    },
    block=4,
)


def test_stable_diffcoder_is_found_by_its_architecture(tmp_path):
    """Its `model_type` is that of Llama, which the auto classes make of it."""
    path = STABLE.write(tmp_path / "published")
    config = AutoConfig.from_pretrained(path)
    assert class_to_load(config) is StableDiffcoderForCausalLM and resolve_mask_token_id(config) == 5
    model = StableDiffcoderForCausalLM.from_pretrained(path)
    assert_parity(model, STABLE)
    model.save_pretrained(tmp_path / "saved")
    assert family_of(AutoConfig.from_pretrained(tmp_path / "saved")).name == "Stable-DiffCoder"
    batch = make_batch((9, 14, 12), prompt=3)
    terms, _ = by_definition(model, batch, 4)
    for each in (model, AutoModelForCausalLM.from_pretrained(path)):
        check_denoiser(each, 5)
        torch.testing.assert_close(scored(each, batch).log_probs, terms.detach()[:, 1:], rtol=1e-5, atol=1e-5)


def test_stable_diffcoder_is_trained_by_path(tmp_path):
    path = STABLE.write(tmp_path / "published", mask_token_id=2)
    make_tokenizer(with_mask=True).save_pretrained(path)
    trainer = trained(path, tmp_path / "out", LoraConfig(r=2), max_steps=2)
    assert type(trainer.model.get_base_model()) is StableDiffcoderForCausalLM
    assert trainer.state.log_history[0]["loss"] == LN2 != trainer.state.log_history[1]["loss"]
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from trl_diffusion.models import StableDiffcoderForCausalLM" in card and "block_length" not in card


@pytest.mark.slow
def test_stable_diffcoder_in_4_bits(tmp_path):
    """Loaded by its path, its head spared, it is scored as the function of its rounded weights that it is."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    path = STABLE.write(tmp_path / "published", mask_token_id=2)
    make_tokenizer(with_mask=True).save_pretrained(path)
    quantization = spare_in_quantization(NF4, AutoConfig.from_pretrained(path))
    loading = {"quantization_config": quantization, "dtype": torch.float32}
    model = StableDiffcoderForCausalLM.from_pretrained(path, **loading).train()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(linears) == STABLE.linears and not any("lm_head" in name for name in linears)
    rounded = StableDiffcoderForCausalLM.from_pretrained(path)
    for name, linear in linears.items():
        weight = bitsandbytes.functional.dequantize_4bit(linear.weight, linear.weight.quant_state)
        rounded.get_submodule(name).weight.data = weight
    batch = make_batch((9, 14, 12), prompt=3)
    terms, _ = by_definition(rounded, batch, 4)
    torch.testing.assert_close(scored(model, batch).log_probs, terms.detach()[:, 1:], rtol=1e-4, atol=1e-4)
    adapted = trained(path, tmp_path / "out", LoraConfig(r=2), max_steps=2, quantization_config=NF4)
    assert adapted.state.log_history[0]["loss"] == LN2 != adapted.state.log_history[1]["loss"]


# --------------------------------------------------------------------------------------------------------- generation

PROMPTS = [[5, 11, 3, 9, 28, 17, 4], [7, 23], [19, 10, 0, 13]]
SCHEDULES = [{}, {"steps": 5}, {"threshold": 0.15}, {"steps": 5, "threshold": 0.3}]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(("size", "shift", "part"), [(4, 0, None), (4, 1, None), (4, 1, 2), (1, 0, None), (32, 0, 3)])
def test_generated_text_is_that_without_a_cache(size, shift, part, schedule, monkeypatch):
    known(monkeypatch, family(size, logit_shift=shift, blocks={"part": part}))
    model, threshold = make_llama(), schedule.get("threshold", 1)
    arguments = {"max_new_tokens": 10, **schedule}
    for prompt in PROMPTS:
        for ends in ([], [0, 5, 9, 14, 21]):
            by_hand = {"part": part, "ends": ends, "pad": 1, **arguments}
            expected = naive_block_response(of_model(model), prompt, size, shift, **by_hand)
            given = {"max_new_tokens": 10, "steps": schedule.get("steps"), "confidence_threshold": threshold}
            found = generate(model, torch.tensor([prompt]).long(), **given, eos_token_id=ends, pad_token_id=1)
            assert found[0, len(prompt) :].tolist() == expected


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_of_the_sampler_acts_in_blocks(switch, monkeypatch):
    """As by hand, and otherwise than without it for one prompt at least; ends are not rare."""
    known(monkeypatch, family(4, logit_shift=1))
    given, by_hand = SWITCHES[switch]
    switches = {"forbidden": (ENDS[0],) if "no_eos" in by_hand else (), "ends_last": "ends_last" in by_hand}
    model, changed = make_llama(), 0
    with torch.no_grad():
        model.get_output_embeddings().weight[ENDS] *= 3
    others = torch.randint(6, 30, (12, 5), generator=torch.Generator().manual_seed(0)).tolist()
    for prompt in [*PROMPTS, *others]:
        expected = naive_block_response(
            of_model(model),
            *(prompt, 4, 1),
            **{"max_new_tokens": 10, "steps": 10, "ends": ENDS, "pad": 1},
            sure=lambda log_probs, token: sure(log_probs, token, by_hand.get("how", "low_confidence")),
            **switches,
        )
        canvas = {"max_new_tokens": 10, "steps": 10, "eos_token_id": ENDS, "pad_token_id": 1}
        found, plain = (
            generate(model, torch.tensor([prompt]), **canvas, **options)[0, len(prompt) :].tolist()
            for options in (given, {})
        )
        assert found == expected
        changed += found != plain
    assert changed
