"""Whether a model can be scored as a masked diffusion model: its mask token, its attention and its head, tried."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .blocks import as_they_are
from .causality import check_attention
from .families import family_of, refuse_unscored
from .logits import acts_by_its_weight, logits_of, logits_of_weight, transformed
from .switches import refuse_switches
from .trying import close, evaluating, is_elsewhere, trial_tokens


def resolve_mask_token_id(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """
    The token that stands for a masked position: the model's, or else the tokenizer's, or else the family's.

    Raises:
        ValueError: neither has one, they differ, or it is the padding token, a word, or outside the vocabulary.
    """
    of_model = getattr(config, "mask_token_id", None)
    family = family_of(config)
    of_tokenizer = getattr(tokenizer, "mask_token_id", None)
    if of_tokenizer is None:
        of_tokenizer = _in_vocabulary(tokenizer, family.mask_tokens)
    known = (of_model, of_tokenizer, family.mask_token_id)
    mask_token_id = next((token for token in known if token is not None), None)
    if mask_token_id is None:
        raise ValueError(
            f"Neither the model (model_type={config.model_type!r}) nor the tokenizer has a mask token, so this is not "
            "a masked diffusion language model. If it is one, set `model.config.mask_token_id`."
        )
    if of_tokenizer is not None and of_tokenizer != mask_token_id:
        raise ValueError(
            f"The model's mask token is {mask_token_id} and the tokenizer's is {of_tokenizer}. Use the tokenizer that "
            "belongs to the model, or set `model.config.mask_token_id`."
        )
    if not 0 <= mask_token_id < config.vocab_size:
        raise ValueError(
            f"The mask token ({mask_token_id}) is outside the model's vocabulary of {config.vocab_size}. Call "
            "`model.resize_token_embeddings(len(tokenizer))`."
        )
    pad_token_id = getattr(tokenizer, "pad_token_id", None)
    if pad_token_id is not None and pad_token_id == mask_token_id:
        raise ValueError(
            f"The padding token and the mask token are the same ({mask_token_id}). Set `tokenizer.pad_token` to "
            "another token, the end of text for instance."
        )
    _refuse_words(mask_token_id, tokenizer)
    return mask_token_id


def _in_vocabulary(tokenizer: PreTrainedTokenizerBase | None, names: tuple[str, ...]) -> int | None:
    """The first of `names` that is a token, where none is registered as the mask token."""
    if tokenizer is None:
        return None
    for name in names:
        token = tokenizer.convert_tokens_to_ids(name)
        if token is not None and tokenizer.convert_ids_to_tokens(token) == name:
            return token
    return None


def is_word(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token is one that text is made of for the tokenizer, and no special token of its."""
    added = tokenizer.added_tokens_decoder.get(token)
    return token not in tokenizer.all_special_ids and not (added is not None and added.special)


def _refuse_words(mask_token_id: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a mask token that text may contain, or that the tokenizer does not have: one of the two is another's."""
    if tokenizer is None:
        return
    cure = "Use the tokenizer that belongs to the model, or correct `model.config.mask_token_id`."
    if mask_token_id >= len(tokenizer):
        raise ValueError(
            f"The mask token is {mask_token_id}, and the tokenizer has {len(tokenizer)} tokens: it belongs to another "
            f"model. {cure}"
        )
    name = str(tokenizer.convert_ids_to_tokens(mask_token_id))
    if "mask" in name.lower():
        return
    if is_word(mask_token_id, tokenizer):
        raise ValueError(
            f"The mask token is {mask_token_id}, which is {name!r} for the tokenizer, an ordinary token: it would be "
            f"taken for noise wherever it stands. {cure} If it is the mask all the same, say so: "
            f"`tokenizer.mask_token = {name!r}`."
        )
    special = {*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.added_tokens_decoder.values())}
    better = sorted(token for token in special if "mask" in token.lower())
    if better:
        raise ValueError(
            f"The mask token is {mask_token_id}, which is {name!r} for the tokenizer, and the tokenizer has "
            f"{better[0]!r}. {cure}"
        )


def check_denoiser(model: PreTrainedModel, mask_token_id: int) -> None:
    """
    Refuse a model that cannot be scored as a masked diffusion model, by trying it on eight tokens, or two blocks.

    Raises:
        ValueError: its family has another ELBO, attention is not what the family says, or the logits are not what it
            says of the last hidden state.
    """
    check_parts(model)
    if not is_elsewhere(model):
        check_head(model, mask_token_id)
        check_attention(model, mask_token_id)


def check_parts(model: PreTrainedModel) -> None:
    """Refuse a family that cannot be scored, a configuration that its class does not honour, and a missing head."""
    refuse_unscored(model.config)
    refuse_switches(model.config)
    if model.get_output_embeddings() is None or model.base_model is model:
        raise ValueError(
            f"`{type(model).__name__}` has no output head over a backbone, so it has no token log-probabilities."
        )


@torch.no_grad()
def check_head(model: PreTrainedModel, mask_token_id: int) -> None:
    """Masked positions are scored alone, from their hidden states: that has to give what the whole model gives."""
    name, head = type(model).__name__, model.get_output_embeddings()
    tokens = trial_tokens(model, mask_token_id)
    with evaluating(model):
        logits, hidden = as_they_are(model, tokens)
        called = logits_of(model, hidden)
        multiplied = logits_of_weight(model, transformed(model, hidden)) if acts_by_its_weight(head) else logits
    if not close(called, logits):
        raise ValueError(
            f"The logits of `{name}` are not its output head applied to the last hidden state, so masked positions "
            "cannot be scored alone. What lies between them is a fact of its family: see docs/adding-a-model.md."
        )
    if not close(multiplied, logits):
        raise ValueError(
            f"The output head of `{name}` is a `{type(head).__name__}` that does not answer with its input times its "
            "weight, so something else is hooked to it. Remove the hook, or put what it does into a `forward` of its "
            "own."
        )
