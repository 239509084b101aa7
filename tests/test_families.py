"""
The law: what a family says of its chat template, its mask token and its attention is true, or else refused.
"""

import pytest
import torch
from conftest import HUB_TEMPLATE, make_model, make_tokenizer
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM

from trl_diffusion.models.chat_template import use_training_template
from trl_diffusion.models.denoiser import check_denoiser, resolve_mask_token_id
from trl_diffusion.models.families import family_of
from trl_diffusion.models.family import Family
from trl_diffusion.models.llada.family import LLADA

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


# -------------------------------------------------------------------------------------------------------- chat template


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


def test_families_are_found_by_model_type():
    assert family_of(make_model().config) is LLADA
    assert family_of(LlamaConfig()) == Family() != LLADA


# ------------------------------------------------------------------------------------------------------------- denoiser


def make_llama(is_causal, mask_token_id=2, **overrides):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=30, mask_token_id=mask_token_id, initializer_range=0.2, **overrides)
    config.is_causal = is_causal
    return LlamaForCausalLM(config)


def make_bert(**overrides):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(**sizes, vocab_size=30, mask_token_id=2, **overrides))


@pytest.mark.parametrize("mask_token_id", [0, 1, 2, 5, 29])
def test_attention_is_tried_and_not_believed(mask_token_id):
    check_denoiser(make_llama(is_causal=False, mask_token_id=mask_token_id), mask_token_id)
    with pytest.raises(ValueError, match=r"attends causally.*`model.config.is_causal = False`"):
        check_denoiser(make_llama(is_causal=True, mask_token_id=mask_token_id), mask_token_id)


def test_our_own_class_is_accepted():
    check_denoiser(make_model(), 2)


def test_logits_that_are_not_the_head_of_the_last_hidden_state_are_refused():
    with pytest.raises(ValueError, match="not its output head applied to the last hidden state"):
        check_denoiser(make_bert(), 2)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="`BertModel` has no output head"):
        check_denoiser(BertModel(make_bert().config), 2)
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
