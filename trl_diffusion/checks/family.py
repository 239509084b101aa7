"""
Whether a model is what its family says, in one table: what the trainers refuse, and what they cannot try.

The checks are those of the trainers, run one by one on a text instead of on training data.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..estimators.draws import draw_masks
from ..estimators.elbo import elbo
from ..models.alignment import Alignment, check_shift, try_alignment
from ..models.causality import check_attention
from ..models.chat_template import give_chat_template, use_training_template
from ..models.denoiser import check_head, check_parts, resolve_mask_token_id
from ..models.end_of_text import use_end_of_text
from ..models.families import blocks_of, family_of
from ..models.full_logits import block_logits
from ..models.padded import check_padding
from ..models.positions import position_limit
from ..models.trying import evaluating, is_elsewhere
from ..scoring.adapters import base_of
from .inputs import check_tokenizer, refuse_unknown_token
from .template import left_out, refuse_open_turns

TEXT = (
    "The library opens at nine in the morning and closes at six in the evening. Visitors may borrow up to ten books at "
    "a time, and have to bring them back within three weeks. Children under twelve need a card of their own, which is "
    "free of charge."
)
_LONGEST = 128  # tokens of the text
_TURNS = [{"role": "user", "content": "What is two plus two?"}, {"role": "assistant", "content": "It is four."}]


class Unclear(Exception):
    """What cannot be tried here, and why."""


@dataclass(frozen=True)
class FamilyVerdict:
    """
    The verdict on one fact of a family.

    Args:
        name: of the fact.
        verdict: `"right"`, `"wrong"`, or `"unclear"` where it could not be told.
        detail: what was seen; if it is wrong, the error with which a trainer refuses it.
    """

    name: str
    verdict: Literal["right", "wrong", "unclear"]
    detail: str


@dataclass(frozen=True)
class FamilyReport:
    """
    Verdicts on a model. `str()` is a table of them.

    Args:
        family: name of the family that its configuration belongs to.
        verdicts: on each fact.
    """

    family: str
    verdicts: tuple[FamilyVerdict, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; what is unclear may be."""
        return all(each.verdict != "wrong" for each in self.verdicts)

    def __getitem__(self, name: str) -> FamilyVerdict:
        """The verdict on a fact."""
        return next(each for each in self.verdicts if each.name == name)

    def __str__(self) -> str:
        rows = [f"{each.name:<13} {each.verdict:<8} {each.detail}" for each in self.verdicts]
        return "\n".join([f"family: {self.family}", *rows])


@dataclass(frozen=True)
class _Subject:
    """What is tried: a model without its adapter's wrapper, a copy of its tokenizer, and token ids of a text."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: list[int]

    @property
    def mask(self) -> int:
        try:
            return resolve_mask_token_id(self.model.config, self.tokenizer)
        except ValueError as error:
            raise Unclear("it takes a mask token") from error


def check_family(model: Any, tokenizer: PreTrainedTokenizerBase, text: str = TEXT) -> FamilyReport:
    """
    Try whether a model and its tokenizer are what the family says, before any training.

    It takes a few forwards of short rows. Neither is changed.

    Args:
        model: with its weights; one of PEFT is tried with its adapter.
        tokenizer: that its token ids come from.
        text: a few sentences of a kind that the model has learnt, of which every other token is hidden.

    Returns:
        [`FamilyReport`], with a verdict on: configuration, mask token, tokenizer, head, causality, shift, padding and
        template.

    Raises:
        ValueError: the text has less than two tokens.
    """
    base = base_of(model)
    tokenizer = copy.deepcopy(tokenizer)
    use_end_of_text(tokenizer)
    ids = tokenizer(text)["input_ids"][: min(_LONGEST, position_limit(base) or _LONGEST)]
    if len(ids) < 2:
        raise ValueError(f"`text` has to have two tokens at least, got {text!r}. Leave it out for a few sentences.")
    subject = _Subject(base, tokenizer, ids)
    return FamilyReport(family_of(base.config).name, tuple(_judge(name, try_it, subject) for name, try_it in _CHECKS))


def _judge(name: str, try_it: Callable[[_Subject], str], subject: _Subject) -> FamilyVerdict:
    try:
        return FamilyVerdict(name, "right", try_it(subject))
    except Unclear as reason:
        return FamilyVerdict(name, "unclear", str(reason))
    except ValueError as error:
        return FamilyVerdict(name, "wrong", str(error))


def _configuration(subject: _Subject) -> str:
    check_parts(subject.model)
    return f"{type(subject.model).__name__}, model_type={subject.model.config.model_type!r}"


def _mask_token(subject: _Subject) -> str:
    mask = resolve_mask_token_id(subject.model.config, subject.tokenizer)
    return f"{mask}, {subject.tokenizer.convert_ids_to_tokens(mask)!r}"


def _tokenizer(subject: _Subject) -> str:
    vocab_size, _ = subject.model.config.vocab_size, subject.mask
    check_tokenizer(subject.tokenizer, subject.model.config)
    refuse_unknown_token(max(len(subject.tokenizer) - 1, *subject.ids), vocab_size)
    if _alignment(subject, try_alignment).is_worse_than_guessing:
        raise Unclear(
            f"the text costs more than a guess among {vocab_size} tokens: the tokenizer is another model's, or the "
            "weights are random"
        )
    return f"{len(subject.tokenizer)} tokens, a text ends in {subject.tokenizer.eos_token!r}"


def _head(subject: _Subject) -> str:
    _need_weights(subject)
    check_head(subject.model, subject.mask)
    return " -> ".join([*family_of(subject.model.config).head.transform, "output embedding"])


def _causality(subject: _Subject) -> str:
    _need_weights(subject)
    check_attention(subject.model, subject.mask)
    if family_of(subject.model.config).in_blocks:
        return "a block sees itself and what is before it"
    return "the first token's logits change with the last token"


def _shift(subject: _Subject) -> str:
    found, family = _alignment(subject, check_shift), family_of(subject.model.config)
    in_place, before = (_elbo(subject, shift) for shift in (0, 1))
    said = f"ELBO of the text {in_place:.1f} nats with logit_shift=0, {before:.1f} with logit_shift=1"
    if not found.is_right:
        raise Unclear(f"{said}: too close to tell. The weights have learnt too little, or the text is too short")
    return f"{said}; the family has {family.logit_shift}"


def _padding(subject: _Subject) -> str:
    _need_weights(subject)
    pad = subject.tokenizer.pad_token_id
    check_padding(subject.model, subject.mask, subject.tokenizer.eos_token_id if pad is None else pad)
    return "left and right, logits are those of the row alone"


def _template(subject: _Subject) -> str:
    tokenizer, family = subject.tokenizer, family_of(subject.model.config)
    given = give_chat_template(tokenizer, family) or use_training_template(tokenizer, family)
    if tokenizer.chat_template is None:
        raise Unclear("the tokenizer has no chat template: give prompts and completions as texts")
    refuse_open_turns(tokenizer)
    prompt = tokenizer.apply_chat_template(_TURNS[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(_TURNS, tokenize=False)
    lost = next(left_out(_TURNS, None, whole), None)
    if lost:
        raise ValueError(
            f"The chat template leaves out {lost[0]}. Set `tokenizer.chat_template` to one that writes it."
        )
    if not whole.startswith(prompt):
        raise ValueError(
            f"The chat template writes the prompt as {prompt!r} before an answer is there, and not after: {whole!r}. "
            "Set `tokenizer.chat_template` to one that writes both alike, or completions would begin elsewhere."
        )
    return f"{'of the family, ' if given else ''}an answer is written {whole.removeprefix(prompt)!r}"


_CHECKS = (
    ("configuration", _configuration),
    ("mask token", _mask_token),
    ("tokenizer", _tokenizer),
    ("head", _head),
    ("causality", _causality),
    ("shift", _shift),
    ("padding", _padding),
    ("template", _template),
)


def _need_weights(subject: _Subject) -> None:
    if is_elsewhere(subject.model):
        raise Unclear("the weights are not here")


def _alignment(subject: _Subject, try_it: Callable[..., Alignment | None]) -> Alignment:
    """Of the text, whose first token is the prompt."""
    _need_weights(subject)
    found = try_it(subject.model, [(subject.ids[:1], subject.ids[1:])], subject.mask)
    assert found is not None  # the weights are here
    return found


def _elbo(subject: _Subject, shift: int) -> float:
    """Of the text without its first token, if logits stood that far before their tokens."""
    model, family = subject.model, replace(family_of(subject.model.config), logit_shift=shift)
    ids = torch.tensor([subject.ids], device=model.get_input_embeddings().weight.device)
    maskable = torch.ones_like(ids).bool()
    maskable[:, 0] = False

    blocks = blocks_of(model.config, maskable, torch.ones_like(maskable))

    def in_place(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        if blocks is not None:
            return block_logits(model, input_ids[0], ids[0], blocks[0], shift).unsqueeze(0)
        return family.in_place(model(input_ids=input_ids).logits)

    draws = draw_masks(maskable, 4, "mirror", rows=ids, blocks=blocks)
    with torch.no_grad(), evaluating(model):
        return elbo(in_place, ids, maskable, draws=draws, mask_token_id=subject.mask).value.item()
