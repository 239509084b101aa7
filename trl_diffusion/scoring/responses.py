"""
A batch, cut into responses at their exact length, and each response's draws, cut into chunks that run together.

All positions are known here, on the host, before any forward: scoring indexes with integers and never asks the device
how many tokens are masked. That costs one wait for the device per micro-batch, where boolean masks cost two per chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..estimators.draws import MaskDraws

TOKENS_PER_FORWARD = 1024


@dataclass(frozen=True)
class Chunk:
    """
    Draws of one response that run together as the rows of one forward.

    Args:
        masked: `(k, T)` bool.
        weight: `(k, T)` float, of each masked token's log-probability.
        positions: `(n,)` int64, where `masked` is true in its flattened form, in order.
    """

    masked: torch.Tensor
    weight: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class Response:
    """
    One prompt with its response, without padding.

    Args:
        ids: `(T,)` tokens.
        where: `(T,)` int64, their places in the padded row.
        chunks: its draws.
    """

    ids: torch.Tensor
    where: torch.Tensor
    chunks: Sequence[Chunk]


def cut(input_ids: torch.Tensor, real: torch.Tensor, draws: MaskDraws, draws_per_forward: int | None) -> list[Response]:
    """
    The responses of a batch.

    Args:
        input_ids: `(B, L)` prompts and responses.
        real: `(B, L)` bool, the tokens that are not padding.
        draws: masks and weights.
        draws_per_forward: draws of a response that run together; by default as many as fit in a budget of tokens.
    """
    real_here, masked_here = real.cpu(), draws.masked.cpu()
    responses = []
    for row, ids in enumerate(input_ids):
        where = real_here[row].nonzero().squeeze(1)
        size = draws_per_chunk(len(where), draws_per_forward)
        positions = [
            part.flatten().nonzero().squeeze(1).to(ids.device) for part in masked_here[:, row, where].split(size)
        ]
        where = where.to(ids.device)
        parts = (draws.masked[:, row, where].split(size), draws.weight[:, row, where].split(size), positions)
        responses.append(Response(ids[where], where, [Chunk(*part) for part in zip(*parts, strict=True)]))
    return responses


def draws_per_chunk(length: int, draws_per_forward: int | None) -> int:
    """How many draws of a response of `length` tokens run together."""
    return draws_per_forward or max(1, TOKENS_PER_FORWARD // length)


def place(scored: Sequence[torch.Tensor], responses: Sequence[Response], length: int) -> torch.Tensor:
    """Put the `(K, T)` scores of each response to their places in `(K, B, L)`."""
    rows = [
        scores.new_zeros(scores.shape[0], length).index_copy(1, response.where, scores)
        for scores, response in zip(scored, responses, strict=True)
    ]
    return torch.stack(rows, dim=1)
