"""Logits at some positions of whole rows, which may be padded on the left."""

import inspect
from typing import Any

import torch

from .positions import counts_from_the_left


def logits_at(model: Any, rows: torch.Tensor, attention_mask: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """`(B, n, V)` logits at the positions `keep` `(n,)` of rows that may be padded on the left."""
    padding = (attention_mask == 0).sum(1)
    if not counts_from_the_left(model) or not bool(padding.any()):
        return _forward(model, rows, attention_mask, keep)
    found: dict[int, torch.Tensor] = {}
    for size in padding.unique().tolist():  # rows of one length at a time, without padding
        together = (padding == size).nonzero().squeeze(1)
        logits = _forward(model, rows[together, size:], attention_mask[together, size:], (keep - size).clamp(min=0))
        found.update(zip(together.tolist(), logits, strict=True))
    return torch.stack([found[row] for row in range(len(rows))])


def _forward(model: Any, rows: torch.Tensor, attention_mask: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(input_ids=rows, attention_mask=attention_mask, logits_to_keep=keep).logits
    return model(input_ids=rows, attention_mask=attention_mask).logits[:, keep]
