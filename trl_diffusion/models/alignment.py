"""Whether the logits of a model predict the tokens that its family says, tried on text that it is to learn from."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .families import blocks_of, family_of
from .full_logits import block_logits, unwrapped
from .trying import evaluating, is_elsewhere

Rows = Iterable[tuple[Sequence[int], Sequence[int]]]
_ROWS, _LONGEST, _FEWEST = 4, 192, 8  # rows that are tried, tokens of each, and hidden ones that say something
_ERRORS = 5  # standard errors: a verdict is no accident


@dataclass(frozen=True)
class Alignment:
    """
    What hidden tokens cost under both alignments.

    Args:
        nats: `(2, n)` negative log-probabilities of n tokens: from the logits at them, and from those before them.
        shift: which of the two is the family's.
        vocab_size: of the model.
    """

    nats: torch.Tensor
    shift: int
    vocab_size: int

    @property
    def ours(self) -> torch.Tensor:
        """`(n,)` where the family has them."""
        return self.nats[self.shift]

    @property
    def other(self) -> torch.Tensor:
        """`(n,)` where it has not."""
        return self.nats[1 - self.shift]

    @property
    def is_wrong(self) -> bool:
        """Whether the other alignment has less than half of the nats. Not where numbers are not finite."""
        return self._less(self.other, self.ours) and bool(2 * self.other.mean() < self.ours.mean())

    @property
    def is_right(self) -> bool:
        """Whether the family's has less than half of the nats."""
        return self._less(self.ours, self.other) and bool(2 * self.ours.mean() < self.other.mean())

    @property
    def is_worse_than_guessing(self) -> bool:
        """Whether tokens cost more than a choice among all tokens, and a nat: of those that another tokenizer makes."""
        least = self.nats[int(self.nats.mean(1).argmin())]
        return self._less(torch.full_like(least, math.log(self.vocab_size) + 1), least)

    def _less(self, some: torch.Tensor, than: torch.Tensor) -> bool:
        gain = than - some
        return len(gain) >= _FEWEST and bool(gain.mean() > _ERRORS * gain.std() / len(gain) ** 0.5)


@torch.no_grad()
def try_alignment(model: PreTrainedModel, rows: Rows, mask_token_id: int) -> Alignment | None:
    """
    Hide every other token of a few responses, and predict them from the logits of both alignments.

    Args:
        model: with its adapters.
        rows: token ids of prompts and responses.
        mask_token_id: the mask token.

    Returns:
        None if the weights are not here.
    """
    if is_elsewhere(model):
        return None
    with evaluating(model):
        nats = [_nats(model, *row, mask_token_id) for _, row in zip(range(_ROWS), rows, strict=False)]
    found = torch.cat(nats, dim=1) if nats else torch.zeros(2, 0)
    return Alignment(found, family_of(model.config).logit_shift, model.config.vocab_size)


def check_shift(model: PreTrainedModel, rows: Rows, mask_token_id: int) -> Alignment | None:
    """
    Refuse a model that predicts hidden tokens elsewhere than its family says, see [`try_alignment`].

    Only a verdict that is no accident counts: the other alignment has less than half of the nats, by five standard
    errors. A model that has learnt nothing is not refused.

    Raises:
        ValueError: the logits stand elsewhere.
    """
    found, family = try_alignment(model, rows, mask_token_id), family_of(model.config)
    if found is None or not found.is_wrong:
        return found
    raise ValueError(
        f"Hidden tokens of the text cost this model {found.ours.mean():.2f} nats each where its family "
        f"({family.name}, `logit_shift={family.logit_shift}`) puts their logits, and {found.other.mean():.2f} with "
        f"`logit_shift={1 - family.logit_shift}`. Either `model_type={model.config.model_type!r}` is not its family, "
        "see docs/adding-a-model.md for one of your own, or these are weights of an autoregressive model, which "
        "predicts the next token and has no ELBO."
    )


def _nats(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], mask_token_id: int) -> torch.Tensor:
    """
    `(2, n)` negative log-probabilities of n hidden tokens, from the logits at them, and from those before them.

    A token that repeats the one before it tells nothing: logits at a token that is seen may be of that token.
    """
    prompt = prompt[-_LONGEST // 2 :]
    ids = torch.tensor([*prompt, *response[: _LONGEST // 2]], device=model.get_input_embeddings().weight.device)
    hidden = torch.arange(max(len(prompt), 1), len(ids), 2, device=ids.device)
    noised, is_response = (
        ids.index_fill(0, hidden, mask_token_id),
        torch.arange(len(ids), device=ids.device) >= len(prompt),
    )
    hidden = hidden[ids[hidden] != ids[hidden - 1]]
    log_probs = _both_alignments(model, noised, ids, is_response, hidden).float().log_softmax(-1)
    targets = ids[hidden].to(log_probs.device).expand(2, -1).unsqueeze(-1)
    return -log_probs.gather(-1, targets).squeeze(-1).cpu()


def _both_alignments(
    model: PreTrainedModel, noised: torch.Tensor, ids: torch.Tensor, is_response: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """`(2, n, V)` logits."""
    blocks = blocks_of(model.config, is_response.unsqueeze(0), torch.ones_like(is_response).unsqueeze(0))
    if blocks is None:
        logits = model(input_ids=noised.unsqueeze(0)).logits[0]
        return logits[torch.stack([hidden, hidden - 1]).to(logits.device)]
    inner = unwrapped(model)
    assert inner is not None
    return torch.stack([block_logits(inner, noised, ids, blocks[0], shift)[hidden] for shift in (0, 1)])
