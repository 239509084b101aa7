"""What a tokenizer puts around a text: its beginning, and its end, by what it says or else by what it does."""

from transformers import PreTrainedTokenizerBase


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens that a tokenizer puts before and after a text of its own accord, seen by trying it."""
    bare, whole = (tokenizer("x", add_special_tokens=add)["input_ids"] for add in (False, True))
    before = next(start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    return whole[:before], whole[before + len(bare) :]


def beginning(text: str, tokenizer: PreTrainedTokenizerBase, before: list[int]) -> list[int]:
    """Tokens of a text that goes on: after `before`, once, which the text or a chat template may have already."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if ids[: len(before)] == before else [*before, *ids]


def use_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Where a tokenizer names no end of text but puts one token after every text (BERT's `[SEP]`), that is it."""
    if tokenizer.eos_token_id is not None:
        return
    _, after = added_tokens(tokenizer)
    if len(after) == 1:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(after[0])
