"""
Masking schemes: how a mask level becomes masks.

A scheme makes *units* of draws. The draws of one unit are made together and depend on each other; units are independent
of each other, given their levels. A scheme maps

    level     (U, B)     uniform on [0, 1), one per unit and row
    noise     (U, B, L)  int64, independent per unit, row and token
    maskable  (B, L)

to `masked` (U, S, B, L), the masks of the S draws of each unit, and `inclusion` (U, S, B), the probability that a token
of the response is hidden, given the level. The weight of a draw is one over it: VRPO (arXiv 2505.19223) eq. 12 with
1/t, eq. 14 with L'/l.

Every scheme keeps the law of [`draws`](draws.py) for each of its draws alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .hashing import uniform

Masks = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Scheme:
    """
    Args:
        make: the map described above.
        draws_per_unit: S.
    """

    make: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Masks]
    draws_per_unit: int = 1


def _bernoulli(level: torch.Tensor, noise: torch.Tensor, maskable: torch.Tensor) -> Masks:
    """Each token hidden with probability t = 1 - level, in (0, 1]."""
    t = 1 - level
    masked = (uniform(noise) < t.unsqueeze(-1)) & maskable
    return masked.unsqueeze(1), t.unsqueeze(1)


def _fixed_count(level: torch.Tensor, noise: torch.Tensor, maskable: torch.Tensor) -> Masks:
    """Exactly l ~ U{1..L'} tokens hidden, every subset of that size equally likely."""
    num_maskable = maskable.sum(-1)
    num_masked = _count(level, num_maskable)
    masked = (_rank(noise, maskable) < num_masked.unsqueeze(-1)) & maskable
    return masked.unsqueeze(1), (num_masked / num_maskable).unsqueeze(1)


def _mirror(level: torch.Tensor, noise: torch.Tensor, maskable: torch.Tensor) -> Masks:
    """
    Pairs of masks of sizes l and L' + 1 - l: the second hides what the first shows, and one random token of the first.

    Both sizes are uniform on {1..L'} and both masks uniform among those of their size. What one mask leaves out the
    other counts, so the choice of tokens makes less noise; and a level is answered by its opposite.
    """
    num_maskable = maskable.sum(-1)
    num_masked = _count(level, num_maskable)
    rank = _rank(noise, maskable)
    first = rank < num_masked.unsqueeze(-1)
    second = rank >= (num_masked - 1).unsqueeze(-1)
    masked = torch.stack([first, second], dim=1) & maskable
    return masked, torch.stack([num_masked, num_maskable + 1 - num_masked], dim=1) / num_maskable


SCHEMES = {
    "bernoulli": Scheme(_bernoulli),
    "fixed_count": Scheme(_fixed_count),
    "mirror": Scheme(_mirror, draws_per_unit=2),
}


def _count(level: torch.Tensor, num_maskable: torch.Tensor) -> torch.Tensor:
    """The count l in {1..L'} at a uniform level. A floor: rounding half to even would favour some counts."""
    return torch.minimum((level * num_maskable).long() + 1, num_maskable)


def _rank(noise: torch.Tensor, maskable: torch.Tensor) -> torch.Tensor:
    """Place of each maskable token in a random order of them; the others come after."""
    order = noise.masked_fill(~maskable, torch.iinfo(torch.int64).max)
    return order.argsort(dim=-1, stable=True).argsort(dim=-1)
