"""How rows are read before they are tokenised: implicit prompts, typed parts, and what a chat template leaves out."""

import itertools
import re

import pytest
from conftest import WORDS

from trl_diffusion.checks.rows import RowForm, split_prompt
from trl_diffusion.checks.template import left_out

PAIRS, FEEDBACK = (("chosen", "rejected"),), (("prompt", "completion", "label"), ("chosen", "rejected"))


def said(role, content, **more):
    return {"role": role, "content": content, **more}


# Implicit prompts

SPLITS = [  # chosen, rejected, prompt
    ("say hi: one", "say hi: two", "say hi:"),
    ("say one two", "say one three", "say one"),  # two and three begin alike
    ("say hi you one two", "say hi you one two three", "say hi you one"),  # one is the beginning of the other
    ("say hi you one two", "say hi you one two", "say hi you one"),
    ("say hi one ", "say hi one", "say hi"),
    ("A: red\nB: blue", "A: red\nB: green", "A: red\nB:"),
    ("A:\nred", "A:\nblue", "A:\n"),
    ("one two ", "six seven eight", ""),
    ("only", "one", ""),
    ("", "one", ""),
    ("你好吗我很好", "你好吗他不好", "你好吗"),  # no spaces between words
]


@pytest.mark.parametrize("chosen, rejected, prompt", SPLITS)
def test_an_implicit_prompt_ends_with_a_word(chosen, rejected, prompt):
    assert split_prompt(chosen, rejected)["prompt"] == prompt
    assert split_prompt(rejected, chosen)["prompt"] == prompt


def test_nothing_is_lost_of_an_implicit_prompt():
    """Every pair of short texts over an alphabet of a letter, another, and a space."""
    texts = ["".join(letters) for n in range(1, 5) for letters in itertools.product("ab ", repeat=n)]
    for chosen, rejected in itertools.product(texts, texts):
        split = split_prompt(chosen, rejected)
        prompt = split["prompt"]
        assert (prompt + split["chosen"], prompt + split["rejected"]) == (chosen, rejected)
        ends = [text[len(prompt) - 1 : len(prompt) + 1] for text in (chosen, rejected)]
        assert not prompt or not any(len(end) == 2 and end.isalpha() for end in ends), split
        assert prompt == "" or (split["chosen"] and split["rejected"])


def test_an_implicit_prompt_of_turns_leaves_one_to_each():
    turns = [said("user", "say hi"), said("assistant", "hi"), said("user", "bye"), said("assistant", "one")]
    other = [*turns[:3], said("assistant", "two")]
    assert split_prompt(turns, other) == {"prompt": turns[:3], "chosen": turns[3:], "rejected": other[3:]}
    assert split_prompt(turns, turns) == {"prompt": turns[:3], "chosen": turns[3:], "rejected": turns[3:]}


# Faults of one row

PROMPT, ANSWER = [said("user", "say hi")], [said("assistant", "one")]
GOOD = {"prompt": PROMPT, "chosen": ANSWER, "rejected": [said("assistant", "two")]}
IMAGE = [{"type": "text", "text": "what is"}, {"type": "image"}]
FAULTS = {
    "whole conversations": (
        {"chosen": PROMPT + ANSWER, "rejected": PROMPT + ANSWER},
        r"`chosen` has a turn of the role 'user'.*`dataset.remove_columns\(\"prompt\"\)`",
    ),
    "a user's words": ({"rejected": PROMPT}, "`rejected` has a turn of the role 'user', which would be scored"),
    "a tool's words": ({"chosen": [*ANSWER, said("tool", "two"), *ANSWER]}, "`chosen` has a turn of the role 'tool'"),
    "a system prompt": ({"chosen": [said("system", "you"), *ANSWER]}, "`chosen` has a turn of the role 'system'"),
    "an image": ({"prompt": [said("user", IMAGE)]}, "message of `prompt` has content that is not text: image. Only"),
    "a bare part": ({"prompt": [said("user", ["say", "hi"])]}, "content that is not text: say, hi"),
    "a number": ({"chosen": [said("assistant", 3)]}, "message of `chosen` has content that is not text: 3"),
    "a text part without text": ({"prompt": [said("user", [{"type": "text", "text": None}])]}, "not text: text"),
    "a role of another type": ({"chosen": [said(3, "one")]}, "message of `chosen` has no `role`"),
    "no content and no calls": ({"chosen": [{"role": "assistant", "tool_calls": []}]}, "neither `content` nor `tool_c"),
    "no arguments of the template": ({"chat_template_kwargs": None}, r"`chat_template_kwargs` is no dictionary \(None"),
    "tools": ({"tools": "{not json"}, "`tools` is no list, and no JSON text of one: '{not json'. Correct it"),
    "one tool": ({"tools": {"name": "plus"}}, "`tools` is no list"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_conversation(name):
    change, message = FAULTS[name]
    form = RowForm.of(GOOD, PAIRS)
    assert form.judge(GOOD) == (None, None)
    (fault, _) = form.judge({**GOOD, **change})
    assert re.search(message, str(fault)), str(fault)


IMPLICIT = {
    "other system prompts": ([said("system", "red"), *PROMPT, *ANSWER], [said("system", "blue"), *PROMPT, *ANSWER]),
    "only a user's words": (PROMPT, PROMPT),
    "other questions": ([said("user", "say hi"), *ANSWER], [said("user", "say bye"), *ANSWER]),
}


@pytest.mark.parametrize("name", IMPLICIT)
def test_conversations_that_do_not_begin_alike(name):
    row = dict(zip(("chosen", "rejected"), IMPLICIT[name], strict=True))
    (fault, _) = RowForm.of(row, PAIRS).judge(row)
    assert "do not begin alike, so that there is no prompt" in fault.what


def test_calls_without_content_and_tools_as_json_are_no_faults():
    call = [{"type": "function", "function": {"name": "plus", "arguments": {"x": 1}}}]
    for turn in ({"role": "assistant", "tool_calls": call}, said("assistant", None, tool_calls=call)):
        row = {**GOOD, "chosen": [turn], "tools": '[{"name": "plus"}]'}
        assert RowForm.of(row, PAIRS).judge(row) == (None, None)


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_typed_parts_are_the_text_that_they_make(column):
    turn = GOOD[column][-1]
    words = turn["content"].partition(" ")
    parts = {**GOOD, column: [{**turn, "content": [{"type": "text", "text": word} for word in words]}]}
    form = RowForm.of(parts, PAIRS)
    assert form.judge(parts) == (None, None)
    assert form.read(parts) == GOOD


# Cures, tried


def test_the_cures_of_whole_conversations_are_cures():
    pairs = {"prompt": PROMPT, "chosen": PROMPT + ANSWER, "rejected": PROMPT + GOOD["rejected"]}
    cured = {name: value for name, value in pairs.items() if name != "prompt"}
    assert RowForm.of(cured, PAIRS).judge(cured) == (None, None)
    assert RowForm.of(cured, PAIRS).read(cured) == GOOD
    single = {"prompt": PROMPT, "completion": PROMPT + ANSWER, "label": True}
    form = RowForm.of(single, FEEDBACK)
    cure = 'lambda row: {"completion": row["completion"][len(row["prompt"]):]}'
    assert f"`dataset.map({cure})`" in form.judge(single).fault.cure
    cured = {**single, **eval(cure)(single)}
    assert form.judge(cured) == (None, None) and cured["completion"] == ANSWER


def test_responses_that_hold_the_text_of_the_prompt_are_remarked():
    row = {"prompt": "say hi ", "chosen": "say hi one", "rejected": "say hi two"}
    form = RowForm.of(row, PAIRS)
    remark = form.judge(row).remark
    cure = 'lambda row: {name: row[name].removeprefix(row["prompt"]) for name in ("chosen", "rejected")}'
    assert "begins with the text of `prompt`" in remark.what and f"`dataset.map({cure})`" in remark.cure
    assert form.judge({**row, **eval(cure)(row)}) == (None, None)
    assert form.judge({**row, "chosen": "one"}) == (None, None)


# What a template leaves out

CALL = {"type": "function", "function": {"name": "plus", "arguments": {"left": 1, "right": "t\two", "none": None}}}
TOOL = {"type": "function", "function": {"name": "plus", "description": "adds numbers", "parameters": {}}}
CONVERSATION = [
    said("system", "you say"),
    said("user", "what is one plus two"),
    said("assistant", "", tool_calls=[CALL], reasoning_content="minus?"),
    said("tool", '{"sum": "three"}'),
    said("user", "say  hi\nand bye "),
    said("assistant", " three\n\n"),
]
WRITTEN = (
    '<tools> plus: "adds numbers" </tools> <s>you say <u>what is one plus two <a><think> minus? </think>'
    '{"name": "plus", "arguments": {"left": 1, "right": "t\\two"}} <t>{\\"sum\\": \\"three\\"} '
    "<u>say hi and bye <a>three"
)
PIECES = [
    "adds numbers",
    "you say",
    "what is",
    "minus?",
    "left",
    "1",
    "t\\two",
    "sum",
    "say hi",
    "three",
    " plus:",
    '"plus"',
]


def test_what_is_written_in_other_words_is_not_left_out():
    """Trimmed, with lines broken anew, and as JSON."""
    assert list(left_out(CONVERSATION, [TOOL], WRITTEN)) == []


@pytest.mark.parametrize("piece", PIECES)
def test_each_piece_that_is_left_out_is_found(piece):
    """Also where the same words stand elsewhere: `plus` is a tool, a call and a word, `three` is said twice."""
    assert piece in WRITTEN
    assert list(left_out(CONVERSATION, [TOOL], WRITTEN.replace(piece, "", 1)))


def test_words_that_are_part_of_others_are_counted():
    turns = [said("user", word) for word in WORDS[:3]] + [said("assistant", " ".join(WORDS[:3]))]
    assert not list(left_out(turns, None, "zero / one / two / zero one two"))
    assert [words for _, words in left_out(turns, None, "zero / two / zero one two")] == ["one"]
