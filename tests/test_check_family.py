"""
The law: what is wrong with a model, its tokenizer or its adapter is found before training and named, by `check_family`
and by the trainers alike.

The model is one that has learnt something: a small encoder that knows one text by heart.
"""

import copy

import pytest
import torch
from conftest import WORDS, make_model, make_tokenizer
from datasets import Dataset
from encoders import VOCABULARY, make_encoder, make_encoder_tokenizer
from peft import LoraConfig, get_peft_model
from test_alignment import make_counter
from test_families import make_llama
from transformers import BertConfig, Lfm2Config, Lfm2ForCausalLM

from trl_diffusion import DiffusionVRPOConfig, DiffusionVRPOTrainer, FamilyReport, check_family
from trl_diffusion.models import families
from trl_diffusion.models.encoders import ENCODERS
from trl_diffusion.models.families import FAMILIES, family_of
from trl_diffusion.models.family import Family

TEXT = " ".join(WORDS * 2)
FACTS = ["configuration", "mask token", "tokenizer", "head", "causality", "shift", "padding", "template"]


@pytest.fixture(scope="module")
def learnt():
    """An encoder that has seen `TEXT` with half of its words hidden, until it knows it."""
    model, tokenizer = make_encoder("bert", mask_token_id=2, initializer_range=0.02), make_encoder_tokenizer()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        hidden = torch.rand(ids.shape, generator=generator) < 0.5
        logits = model(input_ids=ids.masked_fill(hidden, 2)).logits
        torch.nn.functional.cross_entropy(logits[0], ids[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def make_trainer(tmp_path, model, tokenizer, peft_config=None):
    text = {"prompt": [TEXT[:16]] * 2, "chosen": [TEXT[16:]] * 2, "rejected": ["red blue"] * 2}
    return DiffusionVRPOTrainer(
        model,
        args=DiffusionVRPOConfig(str(tmp_path), use_cpu=True, report_to=[]),
        train_dataset=Dataset.from_dict(text),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def test_a_model_that_is_what_its_family_says(learnt, tmp_path):
    tokenizer = make_encoder_tokenizer()
    before = {name: weight.clone() for name, weight in learnt.state_dict().items()}
    report = check_family(learnt, tokenizer, TEXT)
    assert isinstance(report, FamilyReport) and report.family == "BERT" and report.ok
    assert [each.name for each in report.verdicts] == FACTS
    assert {each.verdict for each in report.verdicts} == {"right"}
    assert all(f"\n{name}" in str(report) for name in FACTS)
    assert tokenizer.eos_token is None and tokenizer.chat_template is None  # as it came
    assert all(torch.equal(weight, before[name]) for name, weight in learnt.state_dict().items())
    assert check_family(get_peft_model(copy.deepcopy(learnt), LoraConfig(r=2)), tokenizer, TEXT).ok
    make_trainer(tmp_path, copy.deepcopy(learnt), tokenizer)


def test_the_elbo_of_the_text_is_said_under_both_shifts(learnt):
    """The one that is the family's is the larger by far: what it knows by heart costs next to nothing."""
    detail = check_family(learnt, make_encoder_tokenizer(), TEXT)["shift"].detail
    in_place, before = (float(part.split()[0]) for part in (detail.partition("text ")[2], detail.partition(", ")[2]))
    assert before < 10 * in_place <= 0 and "the family has 0" in detail


def test_weights_that_have_learnt_nothing_leave_the_shift_unclear():
    report = check_family(make_model(), make_tokenizer(), TEXT)
    assert report["shift"].verdict == "unclear" and "learnt too little" in report["shift"].detail
    assert report.ok and report["template"].verdict == "right"  # after LLaDA's own was replaced


def test_weights_that_are_elsewhere_are_not_tried():
    with torch.device("meta"):
        report = check_family(type(make_model())(make_model().config), make_tokenizer(), TEXT)
    unclear = {each.name for each in report.verdicts if each.verdict == "unclear"}
    assert unclear == {"tokenizer", "head", "causality", "shift", "padding"} and report.ok


def test_a_text_has_to_have_tokens():
    with pytest.raises(ValueError, match="two tokens at least, got ''"):
        check_family(make_model(), make_tokenizer(), "")


def with_config(model, **entries):
    model = copy.deepcopy(model)
    for name, value in entries.items():
        setattr(model.config, name, value)
    return model


def with_token(name):
    """As Qwen3's has tokens of tools and thoughts: added, and not special."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([name])
    return tokenizer


def larger_llama(**config):
    model = make_llama(**config)
    model.resize_token_embeddings(40, mean_resizing=False)
    return model


def larger_tokenizer():
    tokenizer = make_encoder_tokenizer()
    tokenizer.add_tokens(["purple"])
    return tokenizer


def shifted_bert(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", [Family(**{**vars(ENCODERS[0]), "logit_shift": 1}), *FAMILIES])


BAD = {
    "wrong shift": ("shift", r"\(BERT, `logit_shift=1`\).* with `logit_shift=0`"),
    "another mask than the tokenizer's": ("mask token", "model's mask token is 1 and the tokenizer's is 2"),
    "a special token that is no mask": ("mask token", r"mask token is 5, which is .*the tokenizer has .*mdm_mask"),
    "a word as the mask": ("mask token", "mask token is 12, which is 'three'.*an ordinary token"),
    "a part of texts as the mask": ("mask token", "mask token is 30, which is '</tool>'.*an ordinary token.*say so"),
    "a word as the end of text": ("tokenizer", "end of text of the model .* is 12, which is no special token.*'three'"),
    "an end of text that is not there": ("tokenizer", "end of text of the model .* is 31, .*: None"),
    "a larger tokenizer": ("tokenizer", f"makes the token {len(VOCABULARY)}, .* has {len(VOCABULARY)} tokens"),
    "an autoregressive checkpoint": ("shift", "weights of an autoregressive model"),
    "causal attention": ("causality", "attends causally"),
    "layers that are causal among others": (
        "causality",
        "`model.layers.0` of `Lfm2ForCausalLM` sees what comes before",
    ),
    "an entry that the class does not know": ("configuration", "`position_embedding_type='relative_key'`, which `Bert"),
    "a soft cap that the class does not know": ("configuration", "`final_logit_softcapping=30.0`, which `Llama"),
    "a head that is more than the record says": ("head", "not its output head applied to the last hidden state"),
}


def make_hybrid():
    """LFM2 of transformers, made bidirectional as a Llama would be: its short convolutions stay as they are."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    tokens = {"vocab_size": 30, "mask_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0}
    config = Lfm2Config(**sizes, **layers, **tokens, initializer_range=0.2)
    config.is_causal = False
    return Lfm2ForCausalLM(config).eval()


def make_bad(name, learnt, monkeypatch):
    """The model and the tokenizer of a row of `BAD`."""
    if name == "wrong shift":
        shifted_bert(monkeypatch)
    if name == "a head that is more than the record says":
        monkeypatch.setattr(families, "FAMILIES", [])
    llama, encoders, own = make_tokenizer(), make_encoder_tokenizer(), copy.deepcopy(learnt)
    return {
        "wrong shift": lambda: (own, encoders),
        "another mask than the tokenizer's": lambda: (with_config(learnt, mask_token_id=1), encoders),
        "a special token that is no mask": lambda: (make_llama(mask_token_id=5), llama),
        "a word as the mask": lambda: (make_llama(mask_token_id=12), llama),
        "a part of texts as the mask": lambda: (larger_llama(mask_token_id=30), with_token("</tool>")),
        "a word as the end of text": lambda: (make_model(eos_token_id=12), llama),
        "an end of text that is not there": lambda: (make_model(vocab_size=40, eos_token_id=31), llama),
        "a larger tokenizer": lambda: (own, larger_tokenizer()),
        "an autoregressive checkpoint": lambda: (make_counter(1), llama),
        "causal attention": lambda: (make_llama(is_causal=True), llama),
        "layers that are causal among others": lambda: (make_hybrid(), llama),
        "an entry that the class does not know": lambda: (
            with_config(learnt, position_embedding_type="relative_key"),
            encoders,
        ),
        "a soft cap that the class does not know": lambda: (make_llama(final_logit_softcapping=30.0), llama),
        "a head that is more than the record says": lambda: (own, encoders),
    }[name]()


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_found_and_named(name, learnt, monkeypatch, tmp_path):
    """In the table, and by a trainer when it is made, with the same words."""
    fact, message = BAD[name]
    model, tokenizer = make_bad(name, learnt, monkeypatch)
    report = check_family(model, tokenizer, TEXT)
    assert not report.ok and report[fact].verdict == "wrong"
    with pytest.raises(ValueError, match=message):
        raise ValueError(report[fact].detail)
    if name != "a larger tokenizer":  # there it is a matter of the rows
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, model, tokenizer)


def test_a_tokenizer_of_the_same_size_makes_noise(learnt, tmp_path, caplog):
    """Words in another order, special tokens in the same: nothing but the numbers can tell."""
    tokenizer = make_encoder_tokenizer(words=[*VOCABULARY[:9], *reversed(VOCABULARY[9:])])
    report = check_family(learnt, tokenizer, TEXT)
    assert report["tokenizer"].verdict == "unclear" and "the tokenizer is another model's" in report["tokenizer"].detail
    make_trainer(tmp_path, copy.deepcopy(learnt), tokenizer)
    assert any("the tokenizer is another model's" in record.getMessage() for record in caplog.records)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_an_adapter_on_an_embedding_that_is_the_head_too(learnt, tmp_path):
    asked = LoraConfig(r=2, target_modules=["query", "word_embeddings"])
    message = "on the embedding `bert.embeddings.word_embeddings`, whose weight is the output head's too"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, copy.deepcopy(learnt), make_encoder_tokenizer(), asked)


def test_an_entry_that_the_class_knows_or_that_is_off_is_let_be():
    published = BertConfig(position_embedding_type="absolute", num_experts=None)
    assert family_of(published).name == "BERT"
    model = with_config(make_encoder("bert", mask_token_id=2), position_embedding_type="absolute", alibi=False)
    assert check_family(model, make_encoder_tokenizer(), TEXT)["configuration"].verdict == "right"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['role'] }} {% endfor %}", "leaves out what the"),
        (
            "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if messages|length == 1 %}x{% endif %}",
            "writes the",
        ),
        ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}[assistant] ", "opens an assistant"),
    ],
)
def test_a_template_that_cannot_be_cut(template, message, learnt):
    tokenizer = make_encoder_tokenizer()
    tokenizer.chat_template = template
    verdict = check_family(learnt, tokenizer, TEXT)["template"]
    assert verdict.verdict == "wrong" and message in verdict.detail


def test_padding_that_is_not_hidden(learnt):
    class Ignoring(type(learnt)):
        def forward(self, *args, attention_mask=None, **kwargs):
            return super().forward(*args, **kwargs)

    model = copy.deepcopy(learnt)
    model.__class__ = Ignoring
    verdict = check_family(model, make_encoder_tokenizer(), TEXT)["padding"]
    assert verdict.verdict == "wrong" and "padded on the right" in verdict.detail
