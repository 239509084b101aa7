"""From hidden states to the log-probabilities of tokens: only where a token is masked, and never all logits at once."""

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..models.families import family_of
from ..models.logits import acts_by_its_weight, finished, transformed
from .door import ChunkedLogProbFunction, maybe_gather_lm_head_ctx

VOCABULARY_TILE = 32768  # columns of the output head that are multiplied together
LOGITS_TILE = 2**25  # logits that are alive together where the head is called


def token_log_probs(
    model: PreTrainedModel, hidden: torch.Tensor, predicting: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """
    `(n,)` log-probabilities of `targets` from the rows `predicting` of `hidden` `(N, H)`, in float32.

    No logits of a batch are built: by TRL's kernel on the weight, where that is all there is to the head, or else by
    calling the head on some rows at a time, whose logits are computed again in the backward.
    """
    head = model.get_output_embeddings()
    rows = transformed(model, hidden[predicting.to(hidden.device)])
    score = _by_weight if acts_by_its_weight(head) else _by_call
    return score(model, rows, targets).to(targets.device)


def _by_weight(model: PreTrainedModel, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        # Sharded on its own, and gathered by FSDP2 when it is called, which it is not: only its weight is used. A
        # gradient through `full_tensor()` would be that of this process's rows alone.
        head.unshard()
    weight, bias = head.weight, head.bias
    scale, soft_cap = family_of(model.config).head.numbers(model.config)
    rows, targets = rows.to(weight.device), targets.to(weight.device)
    # Triton launches on the current device, which is another one where a model is spread over several
    with torch.cuda.device_of(weight), maybe_gather_lm_head_ctx(weight, bias):
        columns = min(VOCABULARY_TILE, weight.shape[0])
        return ChunkedLogProbFunction.apply(rows, weight, bias, targets, 1.0, columns, soft_cap, scale, ())[0]


def _by_call(model: PreTrainedModel, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    size = max(1, LOGITS_TILE // model.config.vocab_size)
    tiles = zip(rows.split(size), targets.split(size), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(_tile, model, *tile, use_reentrant=False) for tile in tiles])
    return torch.cat([_tile(model, *tile) for tile in tiles])


def _tile(model: PreTrainedModel, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = finished(model, model.get_output_embeddings()(rows)).float()
    targets = targets.to(logits.device).unsqueeze(-1)
    return logits.gather(-1, targets).squeeze(-1) - logits.logsumexp(-1)
