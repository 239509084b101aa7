"""
The law of the mask level: how often how many tokens of a response are hidden.

The ELBO is a mean over counts l that are uniform on {1..L'} (VRPO, arXiv 2505.19223, eqs. 14-15). Any law P of the
count that leaves none out gives the same mean, if a draw's weight L'/l is multiplied by (1/L') / P(l), its importance.
A draw that hides l of L' tokens counts each of them L'/l times, so few hidden tokens make much noise: under the uniform
law the variance grows like ln L'. A law that has them come more often weighs them less, and its variance stays bounded.

The laws here are those of a level t ~ Beta(a, a), 0 < a <= 1: one token is hidden, and each of the other L' - 1 with
probability t, so that l - 1 is beta-binomial. a = 1 makes l uniform, and a = 1/2 is the arcsine law. They are
symmetric, as mirror pairs need: l and L' + 1 - l are equally likely.

Where a is None, the length of the response chooses it: [`concentration`].

Tables are made row by row on the CPU: what a sum rounds to depends on how many others are summed beside it, and a row's
draws must not.
"""

from functools import lru_cache
from math import log2
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

LONG = 30  # tokens: from there on a response has the laws and control variates of long ones


def concentration(total: int) -> float:
    """
    The a of a response of L' = `total` tokens: uniform levels for short ones; 0.9 at thirty tokens, 0.05 less for each
    doubling of them, and 0.75 from 240 on.

    What a law saves grows like ln L', and what it costs at the middle levels does not depend on L': see
    docs/choosing-an-estimator.md for where the two meet on text.
    """
    return max(0.9 - 0.05 * log2(total / LONG), 0.75) if is_long(total) else 1.0


def is_long(total: Any) -> Any:
    """Whether L' = `total`, a number or a tensor of them, is that of a long response."""
    return total >= LONG


def draw_counts(share: torch.Tensor, num_maskable: torch.Tensor, a: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Counts by inversion of their law.

    Args:
        share: `(U, B)` uniform on [0, 1), what part of the law is passed over.
        num_maskable: `(B,)` L'.
        a: of the law; None is [`concentration`] of each row.

    Returns:
        `(U, B)` counts l in {1..L'}, and `(U, B)` float64 importance (1/L') / P(l).
    """
    uniform = torch.minimum((share * num_maskable).long() + 1, num_maskable)  # half to even would favour some counts
    totals = [] if a == 1 else num_maskable.tolist()
    of_rows = [concentration(total) if a is None else a for total in totals]
    if all(of_row == 1 for of_row in of_rows):
        return uniform, torch.ones_like(share)
    laws = [_law_of_counts(total, of_row) for total, of_row in zip(totals, of_rows, strict=True)]
    ends, importance = (
        pad_sequence(list(parts), batch_first=True, padding_value=2.0).to(share.device)
        for parts in zip(*laws, strict=True)
    )
    passed = torch.searchsorted(ends, share.T.contiguous(), right=True).T
    passed = torch.minimum(passed, num_maskable - 1)  # the last end may be rounded below 1
    is_uniform = torch.tensor([of_row == 1 for of_row in of_rows], device=share.device)
    # To the last bit what it is beside other rows
    return (
        torch.where(is_uniform, uniform, passed + 1),
        torch.where(is_uniform, 1.0, importance.gather(1, passed.T).T),
    )


def importance(counts: torch.Tensor, total: int, a: float | None) -> torch.Tensor:
    """(1/L') / P(l) of each of the `counts` l of a response of L' = `total` tokens, float64."""
    a = concentration(total) if a is None else a
    return torch.ones_like(counts, dtype=torch.float64) if a == 1 else _law_of_counts(total, a)[1][counts - 1]


@lru_cache(maxsize=4096)
def _law_of_counts(total: int, a: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`(L',)` float64, by count: the share of the law up to it, and its importance."""
    count = torch.arange(1, total, dtype=torch.float64)
    ratio = (total - count) * (count - 1 + a) / (count * (total - count - 1 + a))  # P(l + 1) / P(l)
    law = torch.cat([torch.ones(1, dtype=torch.float64), ratio]).cumprod(0)
    law = law + law.flip(0)
    law = law / law.sum()
    return law.cumsum(0), 1 / (total * law)
