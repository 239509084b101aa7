"""What becomes of tokens: one beginning and one end of text, not more than there are positions, rows by number."""

import logging

import pytest
import test_kto
import torch
from conftest import make_model, make_pairs, make_tokenizer
from datasets import Dataset
from test_trainers import make_trainer
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from trl_diffusion import DiffusionVRPOConfig, DiffusionVRPOTrainer
from trl_diffusion.models.positions import position_limit
from trl_diffusion.trainers.tokens import TokenRules

BOS, EOS, EOT = "<|startoftext|>", "<|endoftext|>", "<|eot_id|>"
ROWS = [{"prompt": "what is one ", "chosen": "one two", "rejected": "two"}] * 2


def trained_on(tmp_path, rows, tokenizer, **options):
    args = DiffusionVRPOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)
    trainer = DiffusionVRPOTrainer(
        make_model(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return [trainer.train_dataset[0][column] for column in ("prompt_ids", "chosen_ids", "rejected_ids")]


def adding(pattern):
    """A tokenizer that adds tokens to each text of its own accord, as BERT's adds [CLS] and [SEP]."""
    tokenizer = make_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS, EOT)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=special)
    return tokenizer


ADDED = {
    "nothing": ("$A", []),
    "a beginning": (f"{BOS} $A", [1]),
    "both, as BERT": (f"{EOT} $A {EOS}", [5]),
    "an end of text": (f"$A {EOS}", []),
    "another end": (f"{BOS} $A {EOT}", [1]),
    "two of each": (f"{BOS} {EOT} $A {EOT} {EOS}", [1, 5]),
}


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("written", [False, True])
def test_what_a_tokenizer_adds_stands_there_once(tmp_path, name, written):
    """Also where the texts have it already; completions are those of a tokenizer that adds nothing."""
    pattern, before = ADDED[name]
    prompt, chosen, rejected = trained_on(tmp_path, ROWS, make_tokenizer())
    rows = ROWS
    if written:
        spelled = "".join(f"{token} " for token in make_tokenizer().convert_ids_to_tokens(before))
        rows = [
            {"prompt": spelled + row["prompt"], **{name: f"{row[name]} {EOS}" for name in ("chosen", "rejected")}}
            for row in ROWS
        ]
    assert trained_on(tmp_path, rows, adding(pattern)) == [before + prompt, chosen, rejected]


def test_text_that_was_written_with_the_template_is_the_conversation(tmp_path):
    turns = {"prompt": "what is one", "chosen": "one", "rejected": "two"}
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    conversation = {name: [{"role": roles[name], "content": text}] for name, text in turns.items()}
    tokenizer = adding(f"{BOS} $A")
    expected = trained_on(tmp_path, [conversation] * 2, tokenizer)
    written = tokenizer.apply_chat_template(conversation["prompt"], tokenize=False, add_generation_prompt=True)
    row = {"prompt": written, "chosen": f"one{EOT}", "rejected": f"two{EOT}"}
    assert trained_on(tmp_path, [row] * 2, adding(f"{BOS} $A")) == expected


def chatml(after=""):
    """The end of turn is the end of text, and a line break may follow."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(AddedToken("\n", normalized=False))
    tokenizer.eos_token = EOT
    tokenizer.chat_template = (
        "{% for m in messages %}<|start_header_id|> {{ m.role }} <|end_header_id|> {{ m.content }} <|eot_id|>"
        + f"{{{{ {after!r} }}}}"
        + "{% endfor %}{% if add_generation_prompt %}<|start_header_id|> assistant <|end_header_id|> {% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("after", ["", "\n"])
@pytest.mark.parametrize("append_eos", [False, True])
def test_an_end_of_turn_that_is_the_end_of_text_stands_there_once(tmp_path, after, append_eos):
    turns = {"prompt": ("user", "one"), "chosen": ("assistant", "two"), "rejected": ("assistant", "six")}
    row = {name: [{"role": role, "content": text}] for name, (role, text) in turns.items()}
    tokenizer = chatml(after)
    args = DiffusionVRPOConfig(str(tmp_path), bf16=False, use_cpu=True, append_eos=append_eos)
    rows = Dataset.from_list([row] * 2)
    trainer = DiffusionVRPOTrainer(make_model(vocab_size=40), args=args, train_dataset=rows, processing_class=tokenizer)
    ids = trainer.train_dataset[0]["chosen_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["two", EOT, *after]


ENDS = [  # completion, as it is to end; E is the end of text, N a line break
    ("a", "aE"),
    ("aE", "aE"),
    ("aEE", "aE"),
    ("aEN", "aEN"),
    ("aENE", "aEN"),
    ("aENNEE", "aENN"),
    ("aN", "aNE"),
    ("EaE", "EaE"),
    ("aEaEE", "aEaE"),
    ("EE", "E"),
    ("", "E"),
]


@pytest.mark.parametrize("given, ended", ENDS)
def test_one_end_of_text(given, ended):
    tokenizer = chatml()
    ids = {"a": 10, "E": tokenizer.eos_token_id, "N": tokenizer.convert_tokens_to_ids("\n")}
    rules = TokenRules(tokenizer, conversational=True, mask_token_id=2, vocab_size=40)
    assert rules.ended([ids[letter] for letter in given]) == [ids[letter] for letter in ended]
    rules = TokenRules(tokenizer, conversational=True, mask_token_id=2, vocab_size=40, append_eos=False)
    assert rules.ended([ids[letter] for letter in given]) == [
        ids[letter] for letter in (ended if "E" in given else given)
    ]


# Positions

SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
TABLES = {
    "BERT": lambda: BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=12)),
    "RoBERTa": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, max_position_embeddings=12, pad_token_id=1)),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_position_table_is_as_long_as_the_longest_row_that_runs(name):
    model = TABLES[name]().eval()
    limit = position_limit(model)
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize("max_length", [None, 1024, 16])
def test_rows_longer_than_the_models_positions_are_dropped(tmp_path, caplog, max_length):
    rows = make_pairs(4).add_item({"prompt": "what is ", "chosen": "one " * 13 + "two", "rejected": "two"})
    rows = rows.add_item({"prompt": "what is ", "chosen": "one " * 14 + "two", "rejected": "two"})
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, make_model(max_sequence_length=17), dataset=rows, max_length=max_length)
    lengths = [len(row["prompt_ids"] + row["chosen_ids"]) for row in trainer.train_dataset]
    assert len(lengths) == (4 if max_length == 16 else 5) and max(lengths) <= 17
    reason = "`max_length`; raise it" if max_length == 16 else "the positions of the model"
    assert any(reason in record.getMessage() for record in caplog.records)


# Row numbers


def test_dropped_rows_are_numbered_as_they_were_given(tmp_path, caplog):
    """TRL makes two rows of a pair, all chosen ones first."""
    rows = make_pairs(4).to_list()
    rows[1]["rejected"] = rows[3]["chosen"] = rows[3]["rejected"] = ""
    with caplog.at_level(logging.WARNING):
        trainer = test_kto.make_trainer(tmp_path, dataset=Dataset.from_list(rows))
    assert len(trainer.train_dataset) == 5
    assert "trl_diffusion_row" not in trainer.train_dataset.column_names
    (message,) = [record.getMessage() for record in caplog.records if "Dropped" in record.getMessage()]
    assert "Dropped 3 of 8 rows" in message and message.endswith("(row 3, 1, 3).")


def test_more_rows_than_fit_a_message_are_counted(tmp_path, caplog):
    rows = make_pairs(20).to_list()
    for row in rows[3:17]:
        row["prompt"] = ""
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, dataset=Dataset.from_list(rows))
    assert any("14 because a prompt has no token" in r.getMessage() for r in caplog.records)
    assert any("(row 3, 4, 5, 6, 7, ...)." in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("chosen, rejected", [("say hi you one", "say hi you one two"), ("say hi one", "say hi two")])
def test_prompt_and_response_of_an_implicit_prompt_spell_the_text(tmp_path, chosen, rejected):
    prompt, *responses = trained_on(tmp_path, [{"chosen": chosen, "rejected": rejected}] * 2, make_tokenizer())
    decode = make_tokenizer().decode
    assert [decode(prompt + ids) for ids in responses] == [f"{text} {EOS}" for text in (chosen, rejected)]
    assert decode(prompt) in ("say hi you", "say hi")
