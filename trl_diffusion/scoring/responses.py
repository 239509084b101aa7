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
class Stretch:
    """
    The blocks of a response in which something is hidden, and the clean text before the last of them.

    Args:
        numbers: `(T,)` int64, the block of each token of prompt and response.
        first, last: its tokens, `last` not included. Whole blocks, but where the text ends.
        clean: that many tokens come before its last block.
    """

    numbers: torch.Tensor
    first: int
    last: int
    clean: int


@dataclass(frozen=True)
class Response:
    """
    One prompt with its response, without padding.

    Args:
        ids: `(T,)` tokens.
        where: `(T,)` int64, their places in the padded row.
        chunks: its draws.
        stretch: of a block diffusion model, what is run of it.
    """

    ids: torch.Tensor
    where: torch.Tensor
    chunks: Sequence[Chunk]
    stretch: Stretch | None = None


def cut(
    input_ids: torch.Tensor,
    real: torch.Tensor,
    draws: MaskDraws,
    draws_per_forward: int | None,
    blocks: torch.Tensor | None,
) -> list[Response]:
    """
    The responses of a batch.

    Args:
        input_ids: `(B, L)` prompts and responses.
        real: `(B, L)` bool, the tokens that are not padding.
        draws: masks and weights.
        draws_per_forward: draws of a response that run together; by default as many as fit in a budget of tokens.
        blocks: `(B, L)` int64, of a block diffusion model the number of each token's block; None is said of others.
    """
    real_here, masked_here = real.cpu(), draws.masked.cpu()
    blocks_here = None if blocks is None else blocks.cpu()
    responses = []
    for row, ids in enumerate(input_ids):
        where = real_here[row].nonzero().squeeze(1)
        stretch, length = None, len(where)
        if blocks_here is not None:
            stretch = _stretch(blocks_here[row, where], masked_here[:, row, where].any(0), ids.device)
            length = stretch.last - stretch.first
        size = draws_per_chunk(length, draws_per_forward)
        positions = [
            part.flatten().nonzero().squeeze(1).to(ids.device) for part in masked_here[:, row, where].split(size)
        ]
        where = where.to(ids.device)
        parts = (draws.masked[:, row, where].split(size), draws.weight[:, row, where].split(size), positions)
        chunks = [Chunk(*part) for part in zip(*parts, strict=True)]
        responses.append(Response(ids[where], where, chunks, stretch))
    return responses


def _stretch(numbers: torch.Tensor, hidden: torch.Tensor, device: torch.device) -> Stretch:
    """From `(T,)` numbers of blocks, and which tokens are hidden in any draw; the last block if none is."""
    touched = numbers[hidden] if bool(hidden.any()) else numbers[-1:]
    lowest, highest = touched[0], touched[-1]
    first, clean = (int((numbers < number).sum()) for number in (lowest, highest))
    return Stretch(numbers.to(device), first, int((numbers <= highest).sum()), clean)


def draws_per_chunk(length: int, draws_per_forward: int | None) -> int:
    """How many draws run together, of a response of which `length` tokens are run."""
    return draws_per_forward or max(1, TOKENS_PER_FORWARD // length)


def place(scored: Sequence[torch.Tensor], responses: Sequence[Response], length: int) -> torch.Tensor:
    """Put the `(K, T)` scores of each response to their places in `(K, B, L)`."""
    rows = [
        scores.new_zeros(scores.shape[0], length).index_copy(1, response.where, scores)
        for scores, response in zip(scored, responses, strict=True)
    ]
    return torch.stack(rows, dim=1)
