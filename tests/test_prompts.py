"""Prompts that are answered have the tokens that training reads, or are refused before any is answered."""

import pytest
from conftest import HUB_TEMPLATE, make_model, make_tokenizer
from datasets import Dataset
from test_conversations import CALLS, with_template
from test_tokens import ADDED, ROWS, adding, trained_on

from trl_diffusion import compare_sampling, sample_pairs
from trl_diffusion.evaluation import answers
from trl_diffusion.evaluation.prompts import read_prompts


def length(completions, **kwargs):
    return [len(text if isinstance(text, str) else text[0]["content"]) for text in completions]


def turn(role, content):
    return {"role": role, "content": content}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


CONVERSATIONS = {
    "one turn": [turn("user", "say hi")],
    "a system turn": [turn("system", "red"), turn("user", "say hi")],
    "several turns": [turn("user", "say hi"), turn("assistant", "hi"), turn("user", "bye")],
    "parts": [turn("system", parts("red")), turn("user", parts("say ", "hi"))],
}
TOOLS = [{"type": "function", "function": {"name": "plus", "description": "green", "parameters": {}}}]


@pytest.mark.parametrize("columns", [{}, {"tools": TOOLS}, {"chat_template_kwargs": {"tools": TOOLS}}])
def test_conversations_have_the_tokens_of_training(tmp_path, columns):
    """And rows of pairs are given on with what their prompts were written with."""
    answer = {"chosen": [turn("assistant", "one")], "rejected": [turn("assistant", "two")]}
    rows = [{"prompt": prompt, **columns} for prompt in CONVERSATIONS.values()]
    trained = with_template(tmp_path / "trained", CALLS, [{**row, **answer} for row in rows]).train_dataset
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CALLS
    prompts, config = Dataset.from_list(rows, on_mixed_types="use_json"), make_model().config
    found = read_prompts(prompts, tokenizer, config).ids
    assert found == trained["prompt_ids"][:]
    assert (found == read_prompts([*CONVERSATIONS.values()], tokenizer, config).ids) == (not columns)  # tools are read
    pairs = sample_pairs(make_model(), tokenizer, prompts, length, output_dir=str(tmp_path / "a"), max_new_tokens=4)
    again = with_template(tmp_path / "again", CALLS, pairs.to_list()).train_dataset
    assert again["prompt_ids"][:] == [trained["prompt_ids"][number] for number in pairs["prompt_number"]]


@pytest.mark.parametrize("name", ADDED)
def test_texts_have_the_tokens_of_training(tmp_path, name):
    tokenizer = adding(ADDED[name][0])
    prompt, _, _ = trained_on(tmp_path, ROWS, tokenizer)
    written = tokenizer.decode(prompt)
    for text in (ROWS[0]["prompt"], written):
        assert read_prompts([text], tokenizer, make_model().config).ids == [prompt]


SAY_HI = [turn("user", "say hi")]


@pytest.mark.parametrize(
    "prompts, message",
    [
        (["say hi", "say <|mdm_mask|>"], r"1 of 2 prompts \(rows 1\) contain the mask token \(2\)"),
        (["say hi", None], r"In 1 of 2 rows of the prompt dataset \(1\) there is no `prompt` \(None\)"),
        ([SAY_HI, "say hi"], r"\(1\) `prompt` holds a text and other columns or rows hold messages"),
        ([[turn("user", [{"type": "image"}])]], "has content that is not text: image"),
        ([[{"role": "user"}]], "has no `role`, or neither `content` nor `tool_calls`"),
        (Dataset.from_list([{"prompt": SAY_HI, "tools": TOOLS}]), "leaves out a tool in `prompt`: 'green' is missing"),
        (
            Dataset.from_dict({"prompt": ["say hi"]}).with_transform(lambda rows: rows),
            "The prompt dataset transforms rows when they are read",
        ),
    ],
    ids=["mask", "none", "kinds", "image", "content", "tools", "transform"],
)
def test_what_cannot_be_answered_is_refused_before_any_is(tmp_path, monkeypatch, prompts, message):
    monkeypatch.setattr(answers, "generate", None)
    tokenizer = make_tokenizer()
    assert tokenizer.chat_template == HUB_TEMPLATE
    with pytest.raises(ValueError, match=message):
        sample_pairs(make_model(), tokenizer, prompts, length, output_dir=str(tmp_path), max_new_tokens=4)


def test_a_tokenizer_of_another_model(tmp_path):
    with pytest.raises(ValueError, match="makes the token 28, and the model's vocabulary has 25"):
        sample_pairs(make_model(vocab_size=25), make_tokenizer(), ["say hi"], length, output_dir=str(tmp_path))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_length": 20}, "`max_length=20` counts the prompt"),
        ({"num_return_sequences": 2}, "use `num_samples`"),
        ({"return_dict_in_generate": True}, "`return_dict_in_generate=True` is not taken here"),
        ({"temperature": 0.0}, r"greedy answers to a prompt \(`temperature=0`\) are all the same"),
        ({"do_sample": False}, "are all the same"),
        ({"strategy": "threshold", "threshold": 1.0, "margin": 0.5}, "`margin=0.5` is for pairs"),
        ({"strategy": "threshold", "threshold": float("nan")}, "`threshold` must be a finite number"),
    ],
)
def test_arguments_that_have_no_meaning(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sample_pairs(make_model(), make_tokenizer(), ["say hi"], length, output_dir=str(tmp_path), **options)


def test_a_batch_of_no_prompt():
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        compare_sampling(make_model(), make_tokenizer(), ["say hi"], {"a": {}}, batch_size=0)


def test_a_seed_of_one_setting():
    with pytest.raises(ValueError, match="`seed=1` is not taken here"):
        compare_sampling(make_model(), make_tokenizer(), ["say hi"], {"a": {"seed": 1}}, max_new_tokens=4)
