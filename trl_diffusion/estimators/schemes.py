"""
Masking schemes: how a mask level becomes masks.

A scheme makes *units* of draws. The draws of one unit are made together and depend on each other; units are independent
of each other, given their levels. A scheme maps

    share     (U, B)     uniform on [0, 1), one per unit and row: the share of the law of levels that is passed over
    noise     (U, B, L)  int64, independent per unit, row and token
    maskable  (B, L)
    a                    of the law of counts, or None, see [`levels`](levels.py)

to `masked` (U, S, B, L), the masks of the S draws of each unit; `inclusion` (U, S, B), the probability that a token of
the response is hidden, given the level; and `importance` (U, S, B), how likely the count is under the uniform law over
how likely it is under this one. The weight of a draw is importance over inclusion; under the uniform law that is VRPO's
(arXiv 2505.19223) 1/t in eq. 12, and L'/l in eq. 14.

Every scheme keeps the law of [`draws`](draws.py) for each of its draws alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .hashing import uniform
from .levels import draw_counts

Masks = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Scheme:
    """
    Args:
        make: the map described above.
        draws_per_unit: S.
    """

    make: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], Masks]
    draws_per_unit: int = 1


def check_levels(scheme: str, a: float | None) -> None:
    """Refuse an unknown scheme, an `a` that is no law of its levels, and one that the scheme does not have."""
    if scheme not in SCHEMES:
        raise ValueError(f"`scheme` must be one of {sorted(SCHEMES)}, got {scheme!r}.")
    if a is not None and (isinstance(a, bool) or not isinstance(a, (int, float)) or not 0 < a <= 1):
        raise ValueError(
            f"`level_concentration` must be None or a number in (0, 1], got {a!r}. Levels are drawn from Beta(a, a): 1 "
            "is uniform, as in the papers, 0.5 the arcsine law, and None goes by the length of a response."
        )
    if scheme == "bernoulli" and a != 1:
        raise ValueError(
            f"`level_concentration={a}` is a law of the number of hidden tokens, which the scheme 'bernoulli' does not "
            "draw: take 'mirror' or 'fixed_count', or leave `level_concentration` out."
        )


def _bernoulli(share: torch.Tensor, noise: torch.Tensor, maskable: torch.Tensor, a: float | None) -> Masks:
    """Each token hidden with probability t = 1 - share, in (0, 1]: uniform levels only."""
    t = 1 - share
    masked = (uniform(noise) < t.unsqueeze(-1)) & maskable
    return masked.unsqueeze(1), t.unsqueeze(1), torch.ones_like(t).unsqueeze(1)


def _fixed_count(share: torch.Tensor, noise: torch.Tensor, maskable: torch.Tensor, a: float | None) -> Masks:
    """Exactly l in {1..L'} tokens hidden, every subset of that size equally likely."""
    num_maskable = maskable.sum(-1)
    num_masked, importance = draw_counts(share, num_maskable, a)
    masked = (_rank(noise, maskable) < num_masked.unsqueeze(-1)) & maskable
    return masked.unsqueeze(1), (num_masked / num_maskable).unsqueeze(1), importance.unsqueeze(1)


def _mirror(share: torch.Tensor, noise: torch.Tensor, maskable: torch.Tensor, a: float | None) -> Masks:
    """
    Pairs of masks of sizes l and L' + 1 - l: the second hides what the first shows, and one random token of the first.

    Both sizes have one law, which is symmetric, and both masks are uniform among those of their size. What one mask
    leaves out the other counts, so the choice of tokens makes less noise; and a level is answered by its opposite.
    """
    num_maskable = maskable.sum(-1)
    num_masked, importance = draw_counts(share, num_maskable, a)
    rank = _rank(noise, maskable)
    first = rank < num_masked.unsqueeze(-1)
    second = rank >= (num_masked - 1).unsqueeze(-1)
    masked = torch.stack([first, second], dim=1) & maskable
    inclusion = torch.stack([num_masked, num_maskable + 1 - num_masked], dim=1) / num_maskable
    return masked, inclusion, torch.stack([importance, importance], dim=1)


SCHEMES = {
    "bernoulli": Scheme(_bernoulli),
    "fixed_count": Scheme(_fixed_count),
    "mirror": Scheme(_mirror, draws_per_unit=2),
}


def _rank(noise: torch.Tensor, maskable: torch.Tensor) -> torch.Tensor:
    """Place of each maskable token in a random order of them; the others come after."""
    order = noise.masked_fill(~maskable, torch.iinfo(torch.int64).max)
    return order.argsort(dim=-1, stable=True).argsort(dim=-1)
