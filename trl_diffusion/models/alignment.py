"""Whether the logits of a model predict the tokens that its family says, tried on text that it is to learn from."""

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from .denoiser import evaluating, is_elsewhere
from .families import family_of

_ROWS, _LONGEST, _FEWEST = 4, 192, 8  # rows that are tried, tokens of each, and hidden ones that say something


@torch.no_grad()
def check_shift(
    model: PreTrainedModel, rows: Iterable[tuple[Sequence[int], Sequence[int]]], mask_token_id: int
) -> None:
    """
    Refuse a model that predicts hidden tokens elsewhere than its family says.

    Every other token of a few responses is hidden, and predicted from the logits of both alignments. Only a verdict
    that is no accident counts: the other one has less than half of the nats, by five standard errors. A model that has
    learnt nothing is not refused.

    Args:
        model: with its adapters.
        rows: token ids of prompts and responses.
        mask_token_id: the mask token.

    Raises:
        ValueError: the logits stand elsewhere.
    """
    if is_elsewhere(model):
        return
    family = family_of(model.config)
    with evaluating(model):
        nats = [_nats(model, *row, mask_token_id) for _, row in zip(range(_ROWS), rows, strict=False)]
    aligned, shifted = torch.cat(nats, dim=1) if nats else torch.zeros(2, 0)
    ours, other = (shifted, aligned) if family.logit_shift else (aligned, shifted)
    gain = ours - other
    certain = len(gain) >= _FEWEST and gain.mean() > 5 * gain.std() / len(gain) ** 0.5
    if not (certain and 2 * other.mean() < ours.mean()):  # also where they are not finite, of which others tell
        return
    raise ValueError(
        f"Hidden tokens of the training data cost this model {ours.mean():.2f} nats each where its family "
        f"({family.name}, `logit_shift={family.logit_shift}`) puts their logits, and {other.mean():.2f} with "
        f"`logit_shift={1 - family.logit_shift}`. Either `model_type={model.config.model_type!r}` is not its family, "
        "see docs/adding-a-model.md for one of your own, or these are weights of an autoregressive model, which "
        "predicts the next token and has no ELBO."
    )


def _nats(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], mask_token_id: int) -> torch.Tensor:
    """`(2, n)` negative log-probabilities of n hidden tokens, from the logits at them, and from those before them."""
    prompt = prompt[-_LONGEST // 2 :]
    ids = torch.tensor([*prompt, *response[: _LONGEST // 2]], device=model.get_input_embeddings().weight.device)
    hidden = torch.arange(max(len(prompt), 1), len(ids), 2, device=ids.device)
    logits = model(input_ids=ids.index_fill(0, hidden, mask_token_id).unsqueeze(0)).logits[0]
    places = torch.stack([hidden, hidden - 1]).to(logits.device)
    log_probs = logits[places].float().log_softmax(-1)
    targets = ids[hidden].to(logits.device).expand(2, -1).unsqueeze(-1)
    return -log_probs.gather(-1, targets).squeeze(-1).cpu()
