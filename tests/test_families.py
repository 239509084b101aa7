"""
The law: what a family says of a model is true, or else refused.

Every family is asked the same questions: a row in `ROWS` is all that a new one costs.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from block_reference import block_numbers, block_terms, naive_block_response, of_model
from conftest import HUB_TEMPLATE, make_model, make_tokenizer
from encoders import make_encoder
from test_decoders import FOLDERS
from test_generation import PROMPTS, naive_response
from test_head import gradients, make_batch, scored
from test_lfm2 import make_lfm2
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from trl_diffusion import MaskSampler, elbo, likelihood
from trl_diffusion.models import families
from trl_diffusion.models.chat_template import use_training_template
from trl_diffusion.models.decoders.family import DECODERS
from trl_diffusion.models.denoiser import check_denoiser, resolve_mask_token_id
from trl_diffusion.models.encoders import ENCODERS
from trl_diffusion.models.families import FAMILIES, family_of, refuse_unscored
from trl_diffusion.models.family import Blocks, Family, Head
from trl_diffusion.models.llada.family import LLADA
from trl_diffusion.models.sampler import generate
from trl_diffusion.scoring import output_head

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 30,
}


def make_llama(is_causal=False, mask_token_id=2, **overrides):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, mask_token_id=mask_token_id, initializer_range=0.2, **overrides)
    config.is_causal = is_causal
    return LlamaForCausalLM(config).eval()


def make_capped():
    torch.manual_seed(0)
    numbers = {"final_logit_softcapping": 2.0, "initializer_range": 0.2, "head_dim": 8, "is_causal": False}
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, **numbers, mask_token_id=2, pad_token_id=0, eos_token_id=0)).eval()


def make_scaled():
    torch.manual_seed(0)
    config = CohereConfig(**SIZES, logit_scale=0.25, initializer_range=0.2, mask_token_id=2, eos_token_id=0)
    config.is_causal = False
    return CohereForCausalLM(config).eval()


@dataclass(frozen=True)
class Row:
    """
    A family, and what is asked of all of them.

    Args:
        make: a small model of it.
        literal: its record, where the package has none.
        pads_left: whether the model itself can be given rows that are padded on the left.
        shift: how far before a token its logits stand.
        block: of a block diffusion model, tokens of a block.
    """

    make: Callable[[], PreTrainedModel]
    literal: Family | None = None
    pads_left: bool = True
    shift: int = 0
    block: int | None = None


# Learnt positions count from the left: BERT's. RoBERTa counts tokens that are no padding
PAD_LEFT = ("modernbert", "roberta")
ROWS = {
    "LLaDA": Row(make_model),
    "no literal": Row(make_llama),
    "shifted": Row(make_llama, Family(name="shifted", model_types=("llama",), logit_shift=1), shift=1),
    # With Ministral's sharpening of attention, positions count from the left
    **{
        name: Row(folder.model, shift=folder.shift, pads_left=not folder.yarn, block=folder.block)
        for name, folder in FOLDERS.items()
    },
    "blocks": Row(make_llama, Family(name="blocks", model_types=("llama",), attention=Blocks(3)), block=3),
    "LFM2.5": Row(make_lfm2),
    "soft cap": Row(
        make_capped, Family(name="cap", model_types=("gemma2",), head=Head(soft_cap="final_logit_softcapping"))
    ),
    "scale": Row(make_scaled, Family(name="scale", model_types=("cohere",), head=Head(scale="logit_scale"))),
    **{
        name: Row(partial(make_encoder, name, vocab_size=30, mask_token_id=2), pads_left=name in PAD_LEFT)
        for name in ("bert", "roberta", "distilbert", "electra", "modernbert")
    },
}


@pytest.fixture(params=ROWS)
def row(request, monkeypatch):
    """One of the rows, its literal known."""
    found = ROWS[request.param]
    if found.literal is not None:
        monkeypatch.setattr(families, "FAMILIES", [found.literal, *FAMILIES])
    return found


def in_place(model, shift):
    """The model as a function whose logits stand at the token that they predict, written by hand."""

    def denoise(input_ids, attention_mask=None):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        places = [max(place - shift, 0) for place in range(input_ids.shape[1])]
        return SimpleNamespace(logits=torch.stack([logits[:, place] for place in places], dim=1))

    denoise.training, denoise.config = False, model.config
    return denoise


# ------------------------------------------------------------------------------------- every family, the same questions


def test_a_family_is_found_and_its_model_is_accepted(row):
    model = row.make()
    family = family_of(model.config)
    assert family is row.literal if row.literal else family in (LLADA, *DECODERS, *ENCODERS, Family())
    check_denoiser(model, 2)


@pytest.mark.parametrize("mode", ["graph", "checkpoint", "immediate"])
def test_the_head_is_the_plain_definition(row, mode):
    """Value, terms and gradient, on rows with padding, against full logits of the whole model."""
    model, weights = row.make(), torch.tensor([1.0, -2.0, 0.5])
    for left in {False, row.pads_left}:
        batch = make_batch(left=left)
        output = scored(model, batch, elbo_gradient=mode)
        terms = plain_terms(row, model, batch)
        torch.testing.assert_close(output.log_probs, terms[:, 1:], rtol=1e-5, atol=1e-5)
        ours = gradients(model, output.log_probs.sum(1) @ weights)
        theirs = gradients(model, terms.sum(1) @ weights)
        assert_same_gradients(ours, {name: theirs[name] for name in ours})
        assert all(name in ours or not gradient.any() for name, gradient in theirs.items())


def plain_terms(row, model, batch):
    """Of the draws that the head makes, by full logits, or for each block of each draw alone."""
    maskable, real = batch["labels"] != -100, batch["attention_mask"]
    if row.block is None:
        draws = MaskSampler(5)(maskable, batch["input_ids"], real, 1)
        return elbo(in_place(model, row.shift), batch["input_ids"], maskable, real, draws=draws).terms
    numbers = block_numbers(batch, row.block)
    draws = MaskSampler(5)(maskable, batch["input_ids"], real, 1, blocks=numbers)
    return block_terms(of_model(model), batch, draws, numbers, row.shift)


def assert_same_gradients(ours, theirs):
    """To the rounding of the largest: some, such as that of a bias of keys, are zero in exact arithmetic."""
    assert ours.keys() == theirs.keys()
    atol = 1e-6 * max(gradient.abs().max().item() for gradient in theirs.values())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=atol)


def test_a_head_that_is_called_is_the_head_that_is_multiplied_with(row, monkeypatch):
    """In tiles of a few rows, so that there are several."""
    monkeypatch.setattr(output_head, "LOGITS_TILE", 30 * 7)
    batch, model, called = make_batch(), row.make(), row.make()
    called.set_output_embeddings(Called(called.get_output_embeddings()))
    check_denoiser(called, 2)
    for mode in ("graph", "checkpoint", "immediate"):
        expected, output = (scored(each, batch, elbo_gradient=mode).log_probs for each in (model, called))
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        ours = {name.replace(".inner.", "."): g for name, g in gradients(called, output.sum()).items()}
        assert_same_gradients(ours, gradients(model, expected.sum()))


@pytest.mark.parametrize("arguments", [{"max_new_tokens": 6}, {"max_new_tokens": 6, "steps": 2, "cfg_scale": 0.5}])
def test_generate_is_the_naive_sampler(row, arguments):
    model = row.make()
    if row.block:
        arguments = {**arguments, "cfg_scale": 0, "confidence_threshold": 0.2}
    for prompt in PROMPTS:
        if row.block:
            schedule = {"max_new_tokens": 6, "steps": arguments.get("steps"), "threshold": 0.2}
            expected = naive_block_response(of_model(model), prompt, row.block, row.shift, **schedule, pad=1)
        else:
            expected, _ = naive_response(in_place(model, row.shift), prompt, **arguments, pad=1)
        sequences = generate(model, torch.tensor([prompt]), **arguments, eos_token_id=[0], pad_token_id=1)
        assert sequences[0, len(prompt) :].tolist() == expected


@torch.no_grad()
def test_the_likelihood_of_a_text_honours_a_shift():
    """Each token from the logits that predict it, those before it shown and those after it hidden."""
    model, text = FOLDERS["Dream"].model(), "what is one plus two"
    ids, nats = make_tokenizer()(text)["input_ids"], 0.0
    for place, token in enumerate(ids):
        noised = torch.tensor([ids[:place] + [2] * (len(ids) - place)])
        nats += in_place(model, 1)(noised).logits[0, place].log_softmax(-1)[token].item()
    found = likelihood(model, make_tokenizer(), [text], method="chain_rule", order="left_to_right")
    assert found.nats == pytest.approx(nats, rel=1e-5)


class Called(torch.nn.Module):
    """A layer whose weight cannot be had, as many wrappers are; BERT asks for the bias."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def bias(self):
        return self.inner.bias

    def forward(self, hidden):
        return self.inner(hidden)


# ----------------------------------------------------------------------------------------------------------- the record


def test_a_key_tells_families_apart_and_is_the_same_in_every_process():
    known = [*FAMILIES, Family(), *(row.literal for row in ROWS.values() if row.literal)]
    assert len({family.key() for family in known}) == len(known)
    assert replace(LLADA, only_if=lambda config: True).key() == LLADA.key() == replace(LLADA).key()
    assert "0x" not in LLADA.key()  # no address of an object
    for fact in fields(Family):
        if fact.name != "only_if":
            assert replace(LLADA, **{fact.name: OTHERWISE[fact.name]}).key() != LLADA.key(), fact.name


OTHERWISE = {
    "name": "x",
    "model_types": ("x",),
    "auto_class": "AutoModel",
    "mask_tokens": ("x",),
    "mask_token_id": 7,
    "logit_shift": 1,
    "first_token": "nothing",
    "attention": Blocks(4),
    "noise": "uniform",
    "head": Head(scale="logit_scale"),
    "end_of_turn": ("x",),
    "append_eos": False,
    "training_chat_template": "x",
    "chat_template": "x",
    "lora_target_modules": "x",
    "unquantized": ("x",),
    "sampling": (("steps", 3),),
    "unscored": "there is no class for it",
}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LlamaConfig(), Family().name),
        (LlamaConfig(architectures=["StableDiffcoderForCausalLM"]), "Stable-DiffCoder"),
        (SimpleNamespace(model_type="Dream"), "Dream"),
        (SimpleNamespace(model_type="Dream", block_size=32), "DreamReasoner"),
        (SimpleNamespace(model_type="llada"), "LLaDA"),
        (SimpleNamespace(model_type="sdar_moe", block_size=4), "SDAR-MoE"),
    ],
)
def test_a_family_is_a_function_of_the_whole_configuration(config, name):
    assert family_of(config).name == name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SimpleNamespace(model_type="sdar_moe"), "SDAR-MoE.*no class for its layers, which have experts"),
        (SimpleNamespace(model_type="llada2_moe", split_token_id=9), "LLaDA2.2.*deletes and inserts tokens"),
        (
            SimpleNamespace(model_type="nemotron_labs_diffusion", dlm_paradigm="block_diff"),
            "Nemotron.*clean text is seen token by token",
        ),
        (SimpleNamespace(model_type="diffusion_gemma"), "DiffusionGemma.*replaces tokens by other tokens"),
    ],
)
def test_a_family_with_another_elbo_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        refuse_unscored(config)
    model = make_model()
    model.config = config
    with pytest.raises(ValueError, match=message):
        check_denoiser(model, 2)


def test_a_family_may_know_the_mask_token_that_nothing_else_names(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", [Family(model_types=("llada",), mask_token_id=5)])
    unnamed, named = make_model(mask_token_id=None), make_model(mask_token_id=2)
    assert resolve_mask_token_id(unnamed.config) == 5
    assert resolve_mask_token_id(named.config, make_tokenizer()) == 2
    arguments = {"max_new_tokens": 4, "mask_token_id": 5}
    ids = torch.tensor([[7, 8, 9]])
    assert torch.equal(unnamed.generate(ids, max_new_tokens=4), unnamed.generate(ids, **arguments))


def test_a_shifted_family_may_have_nothing_that_predicts_the_first_token(monkeypatch):
    model, nothing, shifted = make_llama(), torch.zeros(1, 0, dtype=torch.long), ROWS["shifted"].literal
    for first, expected in [("first", None), ("nothing", "prompt is empty, and shifted has no logits")]:
        monkeypatch.setattr(families, "FAMILIES", [replace(shifted, first_token=first)])
        if expected is None:
            at_once = {"max_new_tokens": 4, "steps": 1}  # the first logits are met twice, with equal confidence
            sampled = generate(model, nothing, **at_once, eos_token_id=[0], pad_token_id=1)
            assert sampled[0].tolist() == naive_response(in_place(model, 1), [], **at_once, pad=1)[0]
            continue
        with pytest.raises(ValueError, match=expected):
            generate(model, nothing, max_new_tokens=4)


def test_a_family_has_its_own_way_to_sample(monkeypatch):
    model, ids = make_model(), torch.tensor([[7, 8, 9]])
    expected = model.generate(ids, max_new_tokens=6, steps=2, block_length=3)
    monkeypatch.setattr(families, "FAMILIES", [replace(LLADA, sampling=(("steps", 2), ("block_length", 3)))])
    assert torch.equal(model.generate(ids, max_new_tokens=6), expected)
    assert torch.equal(
        model.generate(ids, max_new_tokens=6, steps=6, block_length=6),
        make_model().generate(ids, max_new_tokens=6, steps=6, block_length=6),
    )


# -------------------------------------------------------------------------------------------------------- chat template

USER, OTHER_USER = {"role": "user", "content": "what is two"}, {"role": "user", "content": "  say hi \n"}
SYSTEM = {"role": "system", "content": "red green"}
ANSWER, OTHER_ANSWER = {"role": "assistant", "content": "two is two"}, {"role": "assistant", "content": " hi \n"}
EMPTY_ANSWER = {"role": "assistant", "content": ""}
CONVERSATIONS = {
    "question": [USER],
    "answer": [USER, ANSWER],
    "two_turns": [USER, ANSWER, OTHER_USER, OTHER_ANSWER],
    "follow_up": [USER, ANSWER, OTHER_USER],
    "system": [SYSTEM, USER, ANSWER],
    "answer_first": [ANSWER, USER],
    "empty_answer": [USER, EMPTY_ANSWER],
}
HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def make_trained_tokenizer(**kwargs):
    tokenizer = make_tokenizer(**kwargs)
    assert use_training_template(tokenizer, LLADA)
    return tokenizer


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_the_training_template_writes_what_the_published_one_does(conversation):
    published, ours = make_tokenizer(), make_trained_tokenizer()
    expected = published.apply_chat_template(conversation, tokenize=False)
    assert expected.endswith("<|eot_id|>" + HEADER)
    assert ours.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True) == expected
    assert ours.apply_chat_template(conversation, tokenize=False) == expected.removesuffix(HEADER)


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("opened", [True, False])
def test_the_tokens_are_those_of_the_published_template(conversation, opened):
    published, ours = make_tokenizer(), make_trained_tokenizer()
    expected = published.apply_chat_template(conversation)["input_ids"]
    header = published(HEADER, add_special_tokens=False).input_ids
    expected = expected if opened else expected[: -len(header)]
    assert ours.apply_chat_template(conversation, add_generation_prompt=opened)["input_ids"] == expected
    if not opened:
        assert ours.convert_ids_to_tokens(expected)[-1] == "<|eot_id|>" in LLADA.end_of_turn


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_the_assistants_words_and_its_end_of_turn_are_marked(conversation):
    tokenizer = make_trained_tokenizer()
    marked = tokenizer.apply_chat_template(
        conversation, return_assistant_tokens_mask=True, return_dict=True, add_generation_prompt=True
    )
    words = [id for id, chosen in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if chosen]
    answers = [turn["content"].strip() + " <|eot_id|>" for turn in conversation if turn["role"] == "assistant"]
    assert words == [id for answer in answers for id in tokenizer(answer, add_special_tokens=False).input_ids]


@pytest.mark.parametrize(
    ("template", "family"),
    [
        (LLADA.training_chat_template, LLADA),  # as it should be already
        (HUB_TEMPLATE.replace("{{ '<|start", "{% if add_generation_prompt %}{{ '<|start") + "{% endif %}", LLADA),
        (HUB_TEMPLATE, Family()),  # a family that does not say what to put in its place
        (None, LLADA),
    ],
    ids=["ours", "guarded", "no_training_template", "none"],
)
def test_other_templates_are_left_alone(template, family):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert not use_training_template(tokenizer, family)
    assert tokenizer.chat_template == template


def test_the_end_of_turn_is_one_token():
    tokenizer = make_tokenizer()
    for token in LLADA.end_of_turn:
        assert tokenizer(token, add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids(token)]
        assert tokenizer.convert_tokens_to_ids(token) != tokenizer.unk_token_id


# ----------------------------------------------------------------------------------------------------------- mask token


@pytest.mark.parametrize(
    ("of_model", "with_mask"), [(2, False), (2, True), (None, True), (2, None), (0, None)], ids=str
)
def test_the_mask_token_is_the_models_or_the_tokenizers(of_model, with_mask):
    tokenizer = None if with_mask is None else make_tokenizer(with_mask=with_mask)
    expected = 2 if of_model is None else of_model  # where make_tokenizer puts it
    assert resolve_mask_token_id(make_model(mask_token_id=of_model).config, tokenizer) == expected


@pytest.mark.parametrize(
    ("of_model", "tokenizer_kwargs", "message"),
    [
        (None, {}, "Neither the model .* nor the tokenizer"),
        (None, None, "Neither the model .* nor the tokenizer"),
        (3, {"with_mask": True}, "mask token is 3 and the tokenizer's is 2"),
        (30, {}, "30.*outside the model's vocabulary of 30"),
        (30, None, "30.*outside the model's vocabulary of 30"),
        (-1, {}, "-1.*outside the model's vocabulary of 30"),
        (0, {}, "padding token and the mask token are the same"),
    ],
)
def test_an_unclear_mask_token_is_refused(of_model, tokenizer_kwargs, message):
    tokenizer = None if tokenizer_kwargs is None else make_tokenizer(**tokenizer_kwargs)
    config = make_model(mask_token_id=of_model).config
    with pytest.raises(ValueError, match=message):
        resolve_mask_token_id(config, tokenizer)


def test_a_model_of_another_kind_has_no_mask_token():
    with pytest.raises(ValueError, match="model_type='llama'"):
        resolve_mask_token_id(LlamaConfig(vocab_size=30), make_tokenizer())


# ------------------------------------------------------------------------------------------------------------- denoiser


@pytest.mark.parametrize("mask_token_id", [0, 1, 2, 5, 29])
def test_attention_is_tried_and_not_believed(mask_token_id):
    check_denoiser(make_llama(is_causal=False, mask_token_id=mask_token_id), mask_token_id)
    with pytest.raises(ValueError, match=r"attends causally.*`model.config.is_causal = False`"):
        check_denoiser(make_llama(is_causal=True, mask_token_id=mask_token_id), mask_token_id)


def test_a_model_of_several_heads_is_refused():
    sizes = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = BertForPreTraining(BertConfig(**sizes, num_attention_heads=2))
    with pytest.raises(ValueError, match="with a `BertForPreTrainingOutput`, which has no `logits`.*MaskedLM"):
        check_denoiser(model, 2)


def test_logits_that_are_not_the_head_of_the_last_hidden_state_are_refused(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", [])
    with pytest.raises(ValueError, match="not its output head applied to the last hidden state"):
        check_denoiser(make_encoder("bert"), 2)


def test_a_step_of_the_head_that_is_not_there_is_named(monkeypatch):
    wrong = Family(name="Mine", model_types=("bert",), head=Head(("cls.predictions.transforms",)))
    monkeypatch.setattr(families, "FAMILIES", [wrong])
    with pytest.raises(ValueError, match=r"`cls.predictions.transforms` in .* of Mine is neither .*named_modules"):
        check_denoiser(make_encoder("bert"), 2)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="`BertModel` has no output head"):
        check_denoiser(BertModel(make_encoder("bert").config), 2)
    with pytest.raises(ValueError, match="`LLaDAModel` has no output head"):
        check_denoiser(make_model().model, 2)


@pytest.mark.parametrize("is_causal", [True, False])
def test_trying_a_model_leaves_it_as_it_was(is_causal):
    model = make_llama(is_causal, attention_dropout=0.1).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rng = torch.random.get_rng_state()
    try:
        check_denoiser(model, 2)
    except ValueError:
        assert is_causal
    assert all(module.training for module in model.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), rng)
