"""Whether a model can be scored as a masked diffusion model: its mask token, its attention and its head, tried."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .llada.modeling_llada import LLaDAPreTrainedModel


def resolve_mask_token_id(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """
    The token that stands for a masked position: the model's, or else the tokenizer's.

    Raises:
        ValueError: neither has one, they differ, or it is the padding token or outside the vocabulary.
    """
    of_model = getattr(config, "mask_token_id", None)
    of_tokenizer = getattr(tokenizer, "mask_token_id", None)
    mask_token_id = of_tokenizer if of_model is None else of_model
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
    return mask_token_id


def has_adapter(module: torch.nn.Module | None) -> bool:
    """Whether PEFT wraps this layer."""
    return hasattr(module, "base_layer")


@torch.no_grad()
def check_denoiser(model: PreTrainedModel, mask_token_id: int) -> None:
    """
    Refuse a model that cannot be scored as a masked diffusion model, by trying it on eight tokens.

    Raises:
        ValueError: attention is causal, or the logits are not the output head applied to the last hidden state.
    """
    head, backbone = model.get_output_embeddings(), model.base_model
    name = type(model).__name__
    if head is None or backbone is model:
        raise ValueError(f"`{name}` has no output head over a backbone, so it has no token log-probabilities.")
    if has_adapter(head):
        raise ValueError(
            f"An adapter wraps the output head of `{name}`. Log-probabilities are computed from the head's own weight, "
            "so the adapter would not be trained. Remove the head from `target_modules` (on LLaDA the name `ff_out` "
            "matches it: leave `target_modules` unset)."
        )
    if isinstance(model, LLaDAPreTrainedModel) or head.weight.is_meta or head.weight.numel() == 0:
        return  # our own class, or weights that are not here (ZeRO-3)
    was_training = model.training
    model.eval()
    device = backbone.get_input_embeddings().weight.device
    tokens = (mask_token_id + 1 + torch.arange(8, device=device)).remainder(model.config.vocab_size).unsqueeze(0)
    changed = tokens.clone()
    changed[:, -1] = mask_token_id
    logits, after_change = (model(input_ids=ids).logits.float() for ids in (tokens, changed))
    projected = head(backbone(input_ids=tokens).last_hidden_state).float()
    model.train(was_training)
    if torch.equal(logits[:, 0], after_change[:, 0]):
        raise ValueError(
            f"`{name}` attends causally: its prediction for the first token does not change with the last. Masked "
            "diffusion models see both sides; for a Llama-like architecture set `model.config.is_causal = False`."
        )
    if not torch.allclose(logits, projected, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"The logits of `{name}` are not its output head applied to the last hidden state, so masked positions "
            "cannot be scored alone. See docs/adding-a-model.md."
        )
