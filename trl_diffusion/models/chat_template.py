"""Chat templates that a preference trainer can cut completions out of."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .family import Family


def leaves_turns_open(tokenizer: PreTrainedTokenizerBase) -> bool:
    """
    Whether the chat template opens an assistant turn after every conversation, asked for or not.

    The beginning of that turn would be the end of every completion that is cut out of a conversation.
    """
    words = ["what is asked", "what is answered", "what is asked then"]
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), words, strict=True)]
    try:
        answered, asked = (tokenizer.apply_chat_template(turns[:end], tokenize=False) for end in (2, 3))
    except Exception:  # of another's making; reported when the data are written with it
        return False
    before_answer, _, after_answer = answered.partition(words[0])[2].partition(words[1])
    before_question = asked.partition(words[1])[2].partition(words[2])[0]
    return after_answer.strip() == before_answer.strip() != before_question.strip()


def give_chat_template(tokenizer: PreTrainedTokenizerBase, family: Family) -> bool:
    """Give a tokenizer that has no chat template the one of the family. Returns whether it was given one."""
    if tokenizer.chat_template is not None or family.chat_template is None:
        return False
    tokenizer.chat_template = family.chat_template
    return True


def use_training_template(tokenizer: PreTrainedTokenizerBase, family: Family) -> bool:
    """
    Replace a chat template that opens an assistant turn when not asked to. Returns whether it was replaced.

    The replacement writes a prompt with `add_generation_prompt=True` as before. A template for which it would not is
    left alone.
    """
    if family.training_chat_template is None or tokenizer.chat_template is None:
        return False

    def write(turn: list[dict[str, Any]], template: str | None = None, opened: bool = True) -> str:
        return tokenizer.apply_chat_template(turn, chat_template=template, tokenize=False, add_generation_prompt=opened)

    prompt = [{"role": "user", "content": "x"}]
    answer = [*prompt, {"role": "assistant", "content": "y"}]
    try:
        before = [write(turn) for turn in (prompt, answer)]
        if write(prompt, opened=False) != before[0]:
            return False
    except (TemplateError, TypeError):  # of another's making; reported when the data are written with it
        return False
    if before != [write(turn, family.training_chat_template) for turn in (prompt, answer)]:
        return False
    tokenizer.chat_template = family.training_chat_template
    return True
