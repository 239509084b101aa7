"""Whether a model sees both sides of a token, in every layer, or its block and those before it: tried, not believed."""

from typing import Any

import torch
from transformers import PreTrainedModel

from .blocks import History, as_they_are, denoise, read
from .families import blocks_of, family_of
from .logits import hidden_states, logits_of
from .trying import close, evaluating, trial_tokens

_CHANGED = 4  # the place of the token that is changed, of eight


@torch.no_grad()
def check_attention(model: PreTrainedModel, mask_token_id: int) -> None:
    """
    Refuse a model whose prediction for the first token does not change with the last, or a layer of which hands a
    change on to what comes after it only: short convolutions and recurrent layers do, whatever `is_causal` says.

    Raises:
        ValueError: names the layer.
    """
    tokens, name = trial_tokens(model, mask_token_id), type(model).__name__
    if family_of(model.config).in_blocks:
        return _check_blocks(model, tokens)
    changed = tokens.clone()
    changed[:, -1] = mask_token_id
    with evaluating(model):
        logits, after_change = (model(input_ids=ids).logits for ids in (tokens, changed))
        layer = _causal_layer(model, tokens)
    if torch.equal(logits[:, 0], after_change[:, 0]):
        raise ValueError(
            f"`{name}` attends causally: its prediction for the first token does not change with the last. Masked "
            "diffusion models see both sides; for a Llama-like architecture set `model.config.is_causal = False`. An "
            "autoregressive model has a likelihood and no ELBO: `trl.DPOTrainer` and `trl.KTOTrainer` are for it."
        )
    if layer:
        raise ValueError(
            f"`{layer}` of `{name}` sees what comes before a token and not what comes after it, while other layers see "
            "both: as an encoder it was not trained like that, and as an autoregressive model it has no ELBO. Use a "
            "class all of whose layers see both sides."
        )


def _check_blocks(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """A block is run behind the keys and values of the one before it: that has to give what the whole model gives."""
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    blocks = blocks_of(model.config, everywhere, everywhere)
    assert blocks is not None
    numbers, half = blocks[0], tokens.shape[1] // 2
    with evaluating(model):
        logits, _ = as_they_are(model, tokens)
        _, first = read(model, tokens[0, :half], numbers[:half])
        behind = [denoise(model, tokens[:, half:], numbers[half:], half, h) for h in (first, History(numbers[:0]))]
        seen, alone = (logits_of(model, each).float() for each in behind)
    if not close(seen, logits[:, half:]) or torch.equal(seen, alone):
        raise ValueError(
            f"`{type(model).__name__}` does not show a block what is before it and hide what is after it, when it is "
            "given an attention mask and `past_key_values`. Use a causal class of transformers for this architecture, "
            "see docs/adding-a-model.md."
        )


def _causal_layer(model: PreTrainedModel, tokens: torch.Tensor) -> str:
    """The first layer through which a change at a token reaches only those after it; empty if there is none."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    if not lists:
        return ""
    path, layers = max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def remember(number: int) -> Any:
        return lambda _, args, kwargs: calls.setdefault(number, (args, kwargs)) and None

    handles = [layer.register_forward_pre_hook(remember(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        hidden_states(model, tokens)  # without a cache, which a layer would add to each time
    finally:
        for handle in handles:
            handle.remove()
    return next((f"{path}.{number}" for number, call in calls.items() if _is_causal(layers[number], *call)), "")


def _is_causal(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if not args or not isinstance(args[0], torch.Tensor) or args[0].dim() != 3:
        return False  # no layer of hidden states
    moved = args[0].clone()
    moved[:, _CHANGED] += 1
    before, after = (_hidden(layer(hidden, *args[1:], **kwargs)) for hidden in (args[0], moved))
    earlier, later = ([before[:, place], after[:, place]] for place in (slice(_CHANGED), slice(_CHANGED + 1, None)))
    return torch.equal(*earlier) and not torch.equal(*later)


def _hidden(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]
